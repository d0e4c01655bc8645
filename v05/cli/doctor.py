"""`v05 doctor`: what of v05 runs here."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from v05.cli.shared import fail


def doctor(json: Annotated[Path | None, typer.Option(help="Also write the findings to this file.")] = None) -> None:
    """What of v05 runs here: versions, devices, active code paths, a self-check, and what to install for the rest.

    The self-check compares the op with its float64 specification; exit status 1 if they differ.

    Example: v05 doctor --json doctor.json
    """
    from v05.doctor import run

    try:
        status = run(json)
    except OSError as error:
        fail(error)
    raise typer.Exit(status)
