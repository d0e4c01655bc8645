"""Makes the table of bench/results/advantage.csv: `python bench/table.py` prints it, `--write docs/speed.md` puts it into the page.

The table shows v05's milliseconds, their ratio to the floor of the case in the same run, and how many times longer each peer took.
"""

from __future__ import annotations

import argparse
import csv
from collections import defaultdict
from pathlib import Path

from marks import replaced

RESULTS = Path(__file__).parent / "results" / "advantage.csv"
OURS, FLOOR = "v05", "floor"

Shape = tuple[str, str]


def table(results: Path = RESULTS) -> str:
    """The Markdown table, and a line with the conditions."""
    with results.open(newline="") as file:
        rows = list(csv.DictReader(file))
    cases: dict[tuple[str, Shape], dict[str, float]] = defaultdict(dict)
    for row in rows:
        cases[row["case"], (row["N"], row["T"])][row["provider"]] = float(row["median"])
    lines = ["| case | rollouts x tokens | v05, ms | times its floor | peers, times v05 |", "|---|---|---|---|---|"]
    for (case, shape), times in cases.items():
        peers = {name: time for name, time in times.items() if name not in (OURS, FLOOR) and not name.startswith(OURS)}
        if case.endswith(", out="):  # peers that allocate their output are in the case with a fresh output
            fresh = cases.get((case.replace("out=", "fresh output"), shape), {})
            peers |= {name: fresh[name] for name in fresh if name not in (OURS, FLOOR, *peers)}
        size = shape[0] if shape[1] == "1" else f"{shape[0]}, {shape[1]} in all" if "packed" in case else " x ".join(shape)
        ours = times[OURS]
        versus = ", ".join(f"{name} {time / ours:.1f}" for name, time in peers.items())
        floor = f"{ours / times[FLOOR]:.2f}" if FLOOR in times else ""
        lines.append(f"| {case} | {size} | {_milliseconds(ours)} | {floor} | {versus} |")
    about = rows[0]
    conditions = f"`make bench` at commit {about['commit']}; medians on {about['device']}; {about['versions']}."
    return "\n".join(lines) + f"\n\n{conditions}\n"


def _milliseconds(value: float) -> str:
    return f"{value:.3f}" if value < 1 else f"{value:.2f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--write", type=Path, metavar="PAGE", help="put the table into this page")
    page = parser.parse_args().write
    if page is None:
        print(table())
    else:
        page.write_text(replaced(page.read_text(), "bench/table.py", table()))


if __name__ == "__main__":
    main()
