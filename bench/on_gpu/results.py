"""The figures of a run: its rows, the file bench/results/gpu_advantage.csv, and the tables in docs/speed.md."""

from __future__ import annotations

import csv
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path

from on_gpu.batch import Shape
from on_gpu.cases import COPY

RESULTS = Path(__file__).parents[1] / "results" / "gpu_advantage.csv"
BEGIN, END = "<!-- gpu begins -->\n", "<!-- gpu ends -->\n"
NONE_YET = (
    "The figures of this version on a GPU have not been taken yet. `make bench-gpu` takes them, on a machine with one, in under\n"
    "four minutes.\n"
)


@dataclass(frozen=True)
class Row:
    """The figures of one case on one shape. A figure is None if it was not measured.

    Attributes:
        device_us, device_p20_us, device_p80_us: device time in a replayed CUDA graph; median and percentiles of the replays.
        host_us: median time until the call returns.
        whole_us: median time from an idle device to the result.
        floor_bytes: the least bytes that the call has to read and write.
        of_copy: floor_bytes / device_us, relative to the bandwidth of a copy of (rollouts, tokens) float32 in the same run.
    """

    case: str
    rollouts: int
    tokens: int
    group_size: int
    device_us: float | None
    device_p20_us: float | None
    device_p80_us: float | None
    host_us: float | None
    whole_us: float | None
    floor_bytes: int
    of_copy: float | None
    device: str
    commit: str
    torch: str
    triton: str

    @property
    def shape(self) -> Shape:
        return Shape(self.rollouts, self.tokens, self.group_size)


def summary(times: Sequence[float]) -> tuple[float | None, float | None, float | None]:
    """(median, 20th percentile, 80th percentile), or three times None without times."""
    if not times:
        return None, None, None
    fifths = statistics.quantiles(times, n=5, method="inclusive") if len(times) > 1 else list(times) * 4
    return statistics.median(times), fifths[0], fifths[3]


def share_of_copy(floor_bytes: int, microseconds: float | None, copy_bytes: int, copy_microseconds: float | None) -> float | None:
    if microseconds is None or copy_microseconds is None:
        return None
    return floor_bytes / microseconds / (copy_bytes / copy_microseconds)


def write(rows: Sequence[Row], path: Path = RESULTS) -> None:
    """Replace the file with the rows of one run, so that all its figures come from one machine and one commit."""
    path.parent.mkdir(exist_ok=True)
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, [field.name for field in fields(Row)], lineterminator="\n")
        writer.writeheader()
        for row in rows:
            writer.writerow({name: f"{value:.4f}" if isinstance(value, float) else value for name, value in asdict(row).items()})


def read(path: Path = RESULTS) -> list[Row]:
    """The rows of the file, or an empty list if there is no file."""
    if not path.exists():
        return []
    convert = {"int": int, "str": str, "float | None": lambda text: float(text) if text else None}
    kinds = {field.name: convert[str(field.type)] for field in fields(Row)}
    with path.open(newline="") as file:
        return [Row(**{name: kinds[name](text) for name, text in row.items()}) for row in csv.DictReader(file)]


def table(rows: Sequence[Row]) -> str:
    """The Markdown tables and the conditions under them."""
    if not rows:
        return NONE_YET
    timed = [row for row in rows if row.device_us is not None]
    shapes = list(dict.fromkeys(row.shape for row in timed))
    cells = {(row.case, row.shape): _cell(row) for row in timed}
    lines = [f"| case | {' | '.join(map(str, shapes))} |", "|---" * (len(shapes) + 1) + "|"]
    for case in dict.fromkeys(row.case for row in timed):
        lines.append(f"| {case} | {' | '.join(cells.get((case, shape), '') for shape in shapes)} |")
    whole = [row for row in rows if row.device_us is None and row.whole_us is not None]
    if whole:
        lines += ["", f"| whole call on {whole[0].rollouts} x {whole[0].tokens} of verl's tensors | milliseconds |", "|---|---|"]
        lines += [f"| {row.case} | {row.whole_us / 1e3:.3g} |" for row in whole if row.whole_us is not None]
    about = rows[0]
    conditions = f"`make bench-gpu` at commit {about.commit}; {about.device}; torch {about.torch}, triton {about.triton}."
    return "\n".join(lines) + f"\n\n{conditions}\n"


def _cell(row: Row) -> str:
    share = "" if row.of_copy is None or row.case == COPY else f"{row.of_copy:.0%}, "
    return f"{row.device_us:.1f} ({share}{row.host_us:.0f})"


def replaced(page: str, rows: Sequence[Row]) -> str:
    """`page` with the tables between the marks."""
    before, begin, rest = page.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not (begin and end):
        raise ValueError(f"the page has no {BEGIN.strip()!r} followed by {END.strip()!r}")
    return f"{before}{BEGIN}{table(rows)}{END}{after}"
