"""`v05 check-task`: how the reference answers of a task are read."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table
from rich.text import Text

from v05.cli.shared import INTERRUPTED, demand_input, fail, output, progress_bars, say

MOST_FAULTS = 20  # of a task's rows that are shown


def check_task(
    file: Annotated[Path, typer.Argument(help="A task for v05 train --jsonl, a prompt and its answer a line.")],
    show: Annotated[int, typer.Option(help="Rows of each kind to show.", min=0)] = 3,
    json: Annotated[Path | None, typer.Option(help="Also write a record for every line to this file.")] = None,
) -> None:
    """How is each reference answer of a task read, and can it be earned? Run this before training on a file of your own.

    Shows what the answers are read as (numbers, formulas, words), which rows cannot earn their reward even by a completion that is
    the reference, and which prompts repeat. Ends with status 1 if a row cannot earn its reward.

    Example: v05 check-task tasks.jsonl --json checked.json
    """
    from dataclasses import asdict

    from v05.tasks.check import check_task as check
    from v05.train.metrics import write_json

    try:
        demand_input("FILE", file, 'a JSON-lines file with one {"prompt": ..., "answer": ...} object per line')
        with progress_bars() as progress:
            bar = progress.add_task("rows", total=None, note="")
            rows = check(file, lambda: progress.advance(bar))
        if json is not None:
            write_json(json, [asdict(row) | {"cannot_earn": row.cannot_earn} for row in rows])
    except KeyboardInterrupt:
        raise typer.Exit(INTERRUPTED) from None
    except (ValueError, OSError, RuntimeError, ImportError) as error:
        fail(error)
    if not rows:
        fail(ValueError(f"{file} holds no row; give one JSON object a line"))
    kinds = Table("kind", "rows", "line", "answer", "is read as", title=f"{len(rows)} rows of {file}")
    for kind in dict.fromkeys(row.kind for row in rows):
        of_kind = [row for row in rows if row.kind == kind]
        for i, row in enumerate(of_kind[:show] or of_kind[:1]):
            kinds.add_row(
                *((kind, str(len(of_kind))) if i == 0 else ("", "")), str(row.line), *map(_plain, (row.answer, row.reads))
            )
    output().print(kinds)
    faults = [(row, ", ".join(row.unearned) or row.reads) for row in rows if row.unearned or row.kind == "unreadable"]
    if faults:
        table = Table("line", "answer", "earns nothing", title="rows whose reference itself is not rewarded")
        for row, why in faults[:MOST_FAULTS]:
            table.add_row(str(row.line), *map(_plain, (row.answer, why)))
        output().print(table)
        if len(faults) > MOST_FAULTS:
            say(f"{len(faults) - MOST_FAULTS} more such rows; --json FILE writes all")
    for row in [row for row in rows if row.repeats is not None][:MOST_FAULTS]:
        say(f"line {row.line} repeats the prompt of line {row.repeats}{', with another answer' if row.contradicts else ''}")
    cannot = sum(row.cannot_earn for row in rows)
    repeated = sum(row.repeats is not None for row in rows)
    say(f"{cannot} of {len(rows)} rows cannot earn their reward; {repeated} repeat a prompt")
    if cannot:
        raise typer.Exit(1)


def _plain(text: str) -> Text:
    """A text from a file, for a table: no markup, one line."""
    return Text(" ".join(text.split()))
