"""`v05 doctor`: which parts of v05 work on this machine."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from v05.cli.shared import fail


def doctor(json: Annotated[Path | None, typer.Option(help="Also write the findings to this file.")] = None) -> None:
    """List the parts of v05 that work on this machine, test them, and say what to install for the rest.

    Shows versions, devices, active code paths, optional packages and the cache. The self-check compares the op with its float64
    specification; exit status 1 means that they differ.

    Example: v05 doctor --json doctor.json
    """
    from v05.doctor import run

    try:
        status = run(json)
    except OSError as error:
        fail(error)
    raise typer.Exit(status)
