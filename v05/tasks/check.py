"""Checks a JSON-lines task before training: how each reference answer is read, and whether a completion can match it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from v05.files import read_objects
from v05.tasks import formulas
from v05.tasks.answers import Answer, verify_answer
from v05.tasks.rows import TRAINING_FIELDS, read_row
from v05.tasks.statements import statements

FORMS = {"in a box": "\\boxed{%s}", "bare": "%s", "in a sentence": "The answer is %s."}
LONGEST_SHOWN = 60  # characters of a text


@dataclass(frozen=True)
class CheckedRow:
    """The result for one line of a task.

    Attributes:
        line: the line's number.
        prompt, answer: the beginnings of prompt and answer. Empty if the line cannot be read.
        kind: "number", "formula", "text", "tuple", "set" or "parts"; "unreadable" for a line that is not a valid row.
        reads: how the reference is read, or the reason why it cannot be read.
        unearned: the forms of `FORMS` in which the reference itself gets the reward 0.
        repeats: the number of an earlier line with the same prompt, or None.
        contradicts: whether that line has another answer.
    """

    line: int
    prompt: str
    answer: str
    kind: str
    reads: str
    unearned: tuple[str, ...] = ()
    repeats: int | None = None
    contradicts: bool = False

    @property
    def cannot_earn(self) -> bool:
        """Whether no completion that gives its final answer in a box, the usual instruction, can get the reward."""
        return self.kind == "unreadable" or "in a box" in self.unearned


def check_task(path: Path, progress: Callable[[], None] = lambda: None) -> list[CheckedRow]:
    """Check every line of a task. `progress` is called for each line. Raises ValueError for a line that is not a JSON object."""
    rows = []
    first: dict[str, tuple[int, Answer]] = {}
    for number, fields in read_objects(path):
        progress()
        try:
            row = read_row(fields, f"line {number}", TRAINING_FIELDS)
        except ValueError as error:
            rows.append(CheckedRow(number, "", "", "unreadable", str(error)))
            continue
        before, reference = first.setdefault(row.prompt, (number, row.reference))
        rows.append(
            CheckedRow(
                line=number,
                prompt=row.prompt[:LONGEST_SHOWN],
                answer=row.answer[:LONGEST_SHOWN],
                kind=_kind(row.reference),
                reads=_told(row.reference),
                unearned=_unearned(row.reference, row.answer),
                repeats=before if before != number else None,
                contradicts=reference != row.reference,
            )
        )
    return rows


def _kind(reference: Answer) -> str:
    parts = reference.readings[-1].parts
    return parts[0].kind if len(parts) == 1 else "parts"


def _told(reference: Answer) -> str:
    """How a reference is read, for users."""
    odd = [part.formula for part in reference.readings[-1].parts if part.formula and not formulas.readable(part.formula)]
    return f"{reference}{'; only its own spelling is right, as math-verify cannot read it' if odd else ''}"


def _unearned(reference: Answer, answer: str) -> tuple[str, ...]:
    statement = next(statements(answer, prose=False))
    return tuple(name for name, form in FORMS.items() if not verify_answer(reference, form.replace("%s", statement)))
