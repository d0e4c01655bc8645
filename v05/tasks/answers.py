r"""Compares the answer in a completion with a reference answer. This gives every reward of a JSONL task and of `v05 eval`.

References and completions are read by the same rules:

- The answer of a text is the content of its last `<answer>` or \boxed{}, else the text after `####` or "the answer is", else the
  whole text (v05.tasks.statements). If a completion in prose has none of these marks, its last sentence is read.
- Two answers with the same spelling are equal. Letter case, spaces, fonts, dollar signs and a final full stop do not matter.
- An answer may have parts ("x = 1 or x = 2", "5; 10"). The completion must give exactly these parts, in any order. The order within
  a pair (1, 2) matters.
- A number may be written in any form (v05.tasks.numbers). Its unit may be omitted but not replaced (v05.tasks.units).
- A word, a choice letter, a date or a unit is compared as text, never as a product of variables.
- Everything else is a formula, which math-verify compares (v05.tasks.formulas).
- A false equation ("5 = 4") has no value. An uncomputed sum ("26 + 15") is wrong if the reference is a number, because it may just
  repeat the question.
"""

from __future__ import annotations

import math
import re
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

from v05.tasks import formulas
from v05.tasks.numbers import Number, arithmetic, same_number
from v05.tasks.reading import Part, Reading, number_formula, read, read_choice
from v05.tasks.statements import statements
from v05.tasks.units import same_unit

TIME_LIMIT = formulas.TIME_LIMIT  # seconds per verdict
MOST_PARTS = 64

Equal = Callable[[str, str], bool]


@dataclass(frozen=True)
class Answer:
    """The answer in a text: its possible readings, the most literal first."""

    readings: tuple[Reading, ...]

    def __str__(self) -> str:
        """The kinds and values of the parts, for users: "number 41", "text east"."""
        return " and ".join(f"{part.kind} {part.label}{'=' * bool(part.label)}{part.text}" for part in self.readings[-1].parts)


def read_answer(value: object) -> Answer:
    """Read a reference answer: a text, a JSON number or boolean, or a list of these, which are the answer's parts.

    Raises ValueError for any other value, and for a text without an answer.
    """
    text = answer_text(value)
    readings = tuple(_readings(text, prose=False))
    if not readings:
        raise ValueError(f"the answer {text[:60]!r} is empty; give a text or a number")
    return Answer(readings)


def answer_text(value: object) -> str:
    """A reference answer as text. Raises ValueError for values that `read_answer` does not accept."""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, list) and value:
        return "; ".join(map(answer_text, value))
    if isinstance(value, str | int) or (isinstance(value, float) and math.isfinite(value)):
        return str(value)
    raise ValueError(f"the answer {value!r} is neither text nor a finite number; give one, or a list of its parts")


def verify_answer(reference: Answer, completion: str) -> float:
    """1.0 if a completion's final answer equals the reference, else 0.0. It takes about `TIME_LIMIT` seconds at most.

    No completion makes it raise. It is safe to call from any thread.
    """
    deadline = time.monotonic() + TIME_LIMIT

    def equal(left: str, right: str) -> bool:
        return formulas.equal(left, right, deadline - time.monotonic())

    given = list(_readings(completion, prose=True))
    return float(any(_same_reading(wanted, reading, equal) for reading in given for wanted in reference.readings))


def _readings(text: str, *, prose: bool) -> Iterator[Reading]:
    """The readings of a text, up to the first reading without words."""
    for statement in statements(text, prose=prose):
        reading = read(statement)
        if reading is None:
            continue
        yield reading
        choice = read_choice(statement)
        if choice is not None:
            yield choice
        if choice is not None or not reading.has_words:
            return


def _same_reading(wanted: Reading, given: Reading, equal: Equal) -> bool:
    if wanted.option and given.option and wanted.option != given.option:
        return False
    if wanted.text == given.text:
        return True
    mine, theirs = _aligned(wanted.parts, given.parts)
    if len(mine) != len(theirs) or len(mine) > MOST_PARTS:
        return False
    names = [part.label for part in mine]
    if len(mine) == 1 or (len(set(names)) > 1 and not any(part.label for part in theirs)):
        return all(_same(a, b, equal) for a, b in zip(mine, theirs, strict=True))
    return _same_set(mine, theirs, equal)


def _aligned(wanted: tuple[Part, ...], given: tuple[Part, ...]) -> tuple[tuple[Part, ...], tuple[Part, ...]]:
    """The parts to compare. A single pair or set is opened if the other side is a bare list: "(1, 2)" is an answer to "1, 2"."""
    if len(wanted) > 1 and len(given) == 1 and given[0].brackets in ("()", "[]", "{}"):
        return wanted, given[0].items
    if len(given) > 1 and len(wanted) == 1 and wanted[0].brackets in ("()", "[]", "{}"):
        return (wanted if wanted[0].brackets != "{}" else wanted[0].items), (
            given if wanted[0].brackets == "{}" else (replace(wanted[0], text="", items=given),)
        )
    return wanted, given


def _same_set(mine: Sequence[Part], theirs: Sequence[Part], equal: Equal) -> bool:
    """Whether `mine` and `theirs`, which are equally many, can be paired off with equal parts."""
    left = list(theirs)
    for part in mine:
        found = next((i for i, other in enumerate(left) if _same(part, other, equal)), None)
        if found is None:
            return False
        del left[found]
    return True


def _same(wanted: Part, given: Part, equal: Equal) -> bool:
    if wanted.label and given.label and wanted.label != given.label:
        return False
    if wanted.text == given.text:
        return True
    if wanted.items or given.items:
        if len(wanted.items) != len(given.items) or wanted.brackets != given.brackets:
            return False
        if wanted.brackets == "{}":
            return _same_set(wanted.items, given.items, equal)
        return all(_same(a, b, equal) for a, b in zip(wanted.items, given.items, strict=True))
    if wanted.kind == "text" or given.kind == "text":
        return _bare(wanted.text) == _bare(given.text)
    if wanted.number and given.number:
        return _same_quantity(wanted.number, wanted.unit, given.number, given.unit)
    if not same_unit(wanted.unit, given.unit):
        return False
    if wanted.number and (computed := arithmetic(given.formula)):
        return not _left_to_do(given.formula) and same_number(wanted.number, computed)
    return equal(_formula_of(wanted, given), _formula_of(given, wanted))


def _same_quantity(wanted: Number, unit: str, given: Number, other: str) -> bool:
    """Whether two numbers with units are equal. A unit may be omitted, and 50 % equals 0.5."""
    if same_number(wanted, given):
        return same_unit(unit, other)
    if {unit, other} == {"%", ""}:
        percent, plain = (wanted, given) if unit else (given, wanted)
        return same_number(Number(percent.value / 100, False), plain)
    return False


def _bare(text: str) -> str:
    """A text without brackets and without the full stops of abbreviations: "2:15 (p.m.)" becomes "2:15 pm"."""
    return re.sub(r"(?<=[a-z])\.|[()]", "", text)


def _left_to_do(formula: str) -> bool:
    """Whether arithmetic has a sum, difference or product left to compute. A power or a fraction is a way to write a number."""
    return bool(re.search(r"[\d)}]\s*(?:[-+*]|\\times|\\cdot|\()", formula))


def _formula_of(part: Part, other: Part) -> str:
    """A part's formula for math-verify, with its label if the other part is an equation that may be solved for the label."""
    formula = number_formula(part.number) if part.number else part.formula
    return f"{part.label}={formula}" if part.label and "=" in other.formula else formula
