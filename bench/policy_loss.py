"""Measures the time and peak memory of the loss and its gradient: `python bench/policy_loss.py --write docs/speed.md`.

`token_statistics` and `policy_loss` are compared with plain torch. On a GPU they are also compared with torch.compile and, if their
wheels are in the folder --wheels (or that of the variable PEER_WHEELS), with the unchanged kernels of Liger and TRL. The floor is
the memory traffic of the logits at the bandwidth that a copy reaches in the run; from hidden states it is the time of the three
matrix products alone. A provider whose loss or gradients differ from v05's is not timed. On a CPU every row is measured in its own
process, with the number of threads in OMP_NUM_THREADS.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path

from marks import replaced

BENCH = Path(__file__).parent
PACKAGING = BENCH.parent / "packaging"
SECONDS = 75  # time limit of a run on a GPU
CPU_SECONDS = 15  # time limit of a row on a CPU
SIZES = {
    "cpu": [(8192, 49_152, 0), (8192, 49_152, 576), (6656, 98, 160)],
    "cuda": [(8192, 151_936, 0), (8192, 151_936, 1024), (8192, 151_936, 4096), (65_536, 151_936, 1024), (65_536, 151_936, 4096)],
}


@dataclass(frozen=True)
class Row:
    """The figures of a provider on a problem. `hidden` is 0 for logits, and unknown figures are None.

    Attributes:
        seconds: time of forward and backward pass.
        forward_seconds: time of the statistics alone.
        floor_seconds, forward_floor_seconds: the floors of these two, see the module's docstring.
        peak_bytes: peak memory beyond the inputs and the gradient of the weight.
        note: the reason why there are no figures, or empty.
    """

    provider: str
    tokens: int
    vocabulary: int
    hidden: int
    dtype: str
    seconds: float | None
    forward_seconds: float | None
    floor_seconds: float | None
    forward_floor_seconds: float | None
    peak_bytes: int | None
    note: str
    device: str
    threads: int
    commit: str
    versions: str


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--wheels", type=Path, metavar="FOLDER", default=os.environ.get("PEER_WHEELS") or None)
    parser.add_argument("--write", type=Path, metavar="PAGE", help="put the table into this page")
    parser.add_argument("--seconds", type=float, help="time limit of a run on a GPU, or of a row on a CPU")
    parser.add_argument("--size", metavar="TOKENS,VOCABULARY,HIDDEN", action="append", help="measure this size; may be given again")
    parser.add_argument("--one", help=argparse.SUPPRESS)  # the provider to measure, in the process of a row
    options = parser.parse_args()

    os.environ.pop("TRITON_INTERPRET", None)  # kernels are compiled here
    sys.path.append(str(PACKAGING))
    import in_place

    if (tree := in_place.folder()) is not None:
        sys.path.insert(0, str(tree))

    import torch

    kind = "cuda" if torch.cuda.is_available() else "cpu"
    sizes = [tuple(map(int, size.split(","))) for size in options.size] if options.size else SIZES[kind]
    if options.one is not None:
        print(json.dumps(_figures(options.one, sizes[0], torch.device(kind), options.wheels, options.seconds)))
        return
    rows = []
    for row in _rows(kind, sizes, options.wheels, options.seconds):
        print(_line(row), flush=True)
        rows.append(row)
    if options.size is None:
        results = BENCH / "results" / f"policy_loss_{kind}.csv"
        with results.open("w", newline="") as file:
            writer = csv.DictWriter(file, [field.name for field in fields(Row)])
            writer.writeheader()
            writer.writerows(asdict(row) for row in rows)
    if options.write is not None:
        page = options.write.read_text()
        options.write.write_text(replaced(page, f"policy loss on {kind}", table(rows)))


def _figures(name: str, size: Sequence[int], device: object, wheels: Path | None, seconds: float) -> dict[str, object]:
    from losses.measure import measure
    from losses.problem import Size

    dtype = _dtype(device)
    made = measure(name, Size(*size), device, dtype, wheels, seconds)
    return {"note": made} if isinstance(made, str) else asdict(made)


def _rows(kind: str, sizes: Sequence[Sequence[int]], wheels: Path | None, seconds: float | None) -> Iterator[Row]:
    import torch
    from losses.measure import copy_bandwidth, product_seconds
    from losses.problem import Size
    from losses.providers import providers
    from machine import commit, processor, versions

    device = torch.device(kind)
    dtype = _dtype(device)
    bandwidth = copy_bandwidth(device)
    names = {size: list(providers("hidden" if size[2] else "logits", wheels, device)) for size in map(tuple, sizes)}
    until, left = time.monotonic() + (seconds or SECONDS), sum(map(len, names.values()))
    for size in map(Size._make, names):
        logits = size.tokens * size.vocabulary * dtype.itemsize
        products = product_seconds(size, device, dtype, 1.0) if size.hidden else None
        for name in names[size]:
            share = (seconds or CPU_SECONDS) if kind == "cpu" else max(until - time.monotonic(), 0.0) / left
            left -= 1
            made = _apart(name, size, wheels, share) if kind == "cpu" else _figures(name, size, device, wheels, share)
            yield Row(
                provider=name,
                **size._asdict(),
                dtype=str(dtype).removeprefix("torch."),
                seconds=made.get("seconds"),
                forward_seconds=made.get("forward_seconds"),
                floor_seconds=products or 3 * logits / bandwidth,  # the logits are read twice and written once at least
                forward_floor_seconds=None if products else logits / bandwidth,
                peak_bytes=made.get("peak_bytes"),
                note=made.get("note", ""),
                device=torch.cuda.get_device_name() if kind == "cuda" else processor(),
                threads=torch.get_num_threads(),
                commit=commit(),
                versions=versions("torch", "triton"),
            )


def _apart(name: str, size: Sequence[int], wheels: Path | None, seconds: float) -> dict[str, object]:
    """The figures of a provider, measured in a new process."""
    command = [sys.executable, __file__, "--one", name, "--size", ",".join(map(str, size)), "--seconds", str(seconds)]
    if wheels is not None:
        command += ["--wheels", str(wheels)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        lines = done.stderr.strip().splitlines() or [f"status {done.returncode}, which may be memory that ran out"]
        return {"note": lines[-1]}
    found: dict[str, object] = json.loads(done.stdout.splitlines()[-1])
    return found


def _dtype(device: object) -> object:
    import torch

    return torch.bfloat16 if str(device) == "cuda" else torch.float32


def table(rows: Sequence[Row]) -> str:
    """The Markdown table, and a line with the conditions."""
    lines = [
        "| tokens x vocabulary, from | | ms | times its floor | forward, ms | of its floor | peak, MiB |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        start = f"{row.dtype} logits" if not row.hidden else f"{row.hidden} hidden"
        if row.seconds is None:
            figures = f"{row.note} | | | | "
        else:
            forward = "" if row.forward_seconds is None else f"{1e3 * row.forward_seconds:,.2f}"
            known = row.forward_seconds is not None and row.forward_floor_seconds is not None
            of_floor = f"{row.forward_floor_seconds / row.forward_seconds:.0%}" if known else ""
            ratio = f"{row.seconds / row.floor_seconds:.2f}"
            figures = f"{1e3 * row.seconds:,.2f} | {ratio} | {forward} | {of_floor} | {row.peak_bytes / 2**20:,.0f}"
        lines.append(f"| {row.tokens:,} x {row.vocabulary:,}, {start} | {row.provider} | {figures} |")
    about = rows[0]
    where = f"{about.device}, {about.threads} thread{'s' * (about.threads > 1)}"
    return "\n".join(lines) + f"\n\n`python bench/policy_loss.py` at commit {about.commit}; medians on {where}; {about.versions}.\n"


def _line(row: Row) -> str:
    what = (
        row.note or f"{1e3 * row.seconds:9.2f} ms, floor {1e3 * row.floor_seconds:9.2f} ms, peak {row.peak_bytes / 2**20:7.0f} MiB"
    )
    return f"{row.tokens:7} x {row.vocabulary} x {row.hidden:5}  {row.provider:15} {what}"


if __name__ == "__main__":
    main()
