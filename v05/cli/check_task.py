"""`v05 check-task`: show how the reference answers of a task are read."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table
from rich.text import Text

from v05.cli.shared import INTERRUPTED, demand_input, fail, output, progress_bars, say

MOST_FAULTS = 20  # faulty rows to show


def check_task(
    file: Annotated[
        Path,
        typer.Argument(metavar="FILE", help='A task for v05 train --jsonl: one {"prompt": ..., "answer": ...} object per line.'),
    ],
    show: Annotated[int, typer.Option(help="Example rows to show of each kind of answer.", min=0)] = 3,
    json: Annotated[Path | None, typer.Option(help="Also write one record per line of the task to this file.")] = None,
) -> None:
    """Check a task file before you train on it: how is each reference answer read, and can a completion earn its reward?

    Shows what each answer is read as (number, formula, text), the rows whose own reference answer would earn no reward, and the
    prompts that repeat. Exit status 1 means that some row can never earn its reward: correct or remove it.

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
        fail(ValueError(f"{file} holds no row; give one JSON object per line"))
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
        table = Table("line", "answer", "earns nothing", title="rows whose own reference answer earns no reward")
        for row, why in faults[:MOST_FAULTS]:
            table.add_row(str(row.line), *map(_plain, (row.answer, why)))
        output().print(table)
        if len(faults) > MOST_FAULTS:
            say(f"{len(faults) - MOST_FAULTS} more such rows; --json FILE writes all of them")
    for row in [row for row in rows if row.repeats is not None][:MOST_FAULTS]:
        say(f"line {row.line} repeats the prompt of line {row.repeats}{', with another answer' if row.contradicts else ''}")
    cannot = sum(row.cannot_earn for row in rows)
    repeated = sum(row.repeats is not None for row in rows)
    say(f"{cannot} of {len(rows)} rows cannot earn their reward; {repeated} repeat a prompt")
    if cannot:
        raise typer.Exit(1)


def _plain(text: str) -> Text:
    """Text from a file as one line of a table cell, in which rich finds no markup."""
    return Text(" ".join(text.split()))
