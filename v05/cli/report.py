"""`v05 report`: draw runs on one HTML page."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from v05.cli.shared import console, fail, watched


def report(
    runs: Annotated[
        list[Path],
        typer.Argument(
            metavar="RUN_DIR...", help="Run directories of v05 train, or directories of runs such as --out of v05 compare."
        ),
    ],
    out: Annotated[Path | None, typer.Option(help="The page to write. Default: report.html in the first directory.")] = None,
    baseline: Annotated[
        str | None,
        typer.Option(
            help="The method, such as grpo@16, whose final accuracy counts as the target for 'rollouts saved'. Default: the first "
            "grpo."
        ),
    ] = None,
) -> None:
    """Draw runs, finished or not, on one HTML page that needs no network.

    Runs that differ only in their seed make one curve with a band. A run with damaged files is left out and named. The page shows
    learning curves over rollouts, tokens and seconds, rollouts saved, group sizes, prior against outcome, gradient norm, entropy,
    where the time went, and sampled completions.

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
