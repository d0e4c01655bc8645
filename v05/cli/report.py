"""`v05 report`: runs on one HTML page."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from v05.cli.shared import console, fail, watched


def report(
    runs: Annotated[
        list[Path], typer.Argument(metavar="RUN_DIR...", help="Run directories, or directories of runs as compare's --out.")
    ],
    out: Annotated[Path | None, typer.Option(help="The page; left out, report.html in the first directory.")] = None,
    baseline: Annotated[
        str | None, typer.Option(help="Method whose final accuracy the others are to reach, such as grpo@16; the first grpo.")
    ] = None,
) -> None:
    """Draw runs, finished or not, on one HTML page that needs no network.

    Runs that differ in their seed alone are one curve with a band; a run whose files are damaged is left out and named. The page
    holds learning curves over rollouts, tokens and seconds, rollouts saved, group sizes, prior against outcome, gradient norm,
    entropy, where time went, and completions to read.

    Example: v05 report runs/compare --out page.html
    """
    from v05.report.figures import document
    from v05.report.page import write_page
    from v05.report.runs import find_runs, read_runs, seeds_of

    try:
        directories = find_runs(runs)
        read, left_out = read_runs(directories, lambda items: watched(items, "reading runs"))
        page = out or runs[0] / "report.html"
        title = ", ".join(place.resolve().name for place in runs)
        write_page(document(seeds_of(read), read, baseline, watched, left_out), title, page)
    except (ValueError, OSError) as error:
        fail(error)
    for name, why in left_out.items():
        console.out(f"left out: {name}: {why}", highlight=False)
    console.out(f"{len(read)} run{'s' * (len(read) > 1)} on {page}, {page.stat().st_size / 1e6:.1f} MB")
