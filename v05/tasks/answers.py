r"""What a reference answer and a completion say, and whether they say the same: every reward of a JSONL task and of `v05 eval`.

References and completions are read by one set of rules:

- The answer of a text is what its last `<answer>` or \boxed{} holds, else what follows `####` or "the answer is", else the text
  (v05.tasks.statements). A completion of prose without any of these is read by its last sentence.
- Two answers of one spelling are equal: letter case, spaces, fonts, dollar signs and a full stop aside.
- An answer may have parts ("x = 1 or x = 2", "5; 10"). All of them are wanted, in any order, and no others. A pair (1, 2) has an
  order.
- A number may be written in any way (v05.tasks.numbers), with a unit that may be left out but not replaced (v05.tasks.units).
- A word, a choice letter, a date or a unit is compared as text, never as a product of letters.
- The rest are formulas, which math-verify compares (v05.tasks.formulas).
- A false equation ("5 = 4") states nothing. A sum left to the reader ("26 + 15") is no answer where a number is wanted: it may be
  the question.
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

TIME_LIMIT = formulas.TIME_LIMIT  # seconds of a verdict
MOST_PARTS = 64

Equal = Callable[[str, str], bool]


@dataclass(frozen=True)
class Answer:
    """What a text answers: readings of it, the most literal first."""

    readings: tuple[Reading, ...]

    def __str__(self) -> str:
        """Its kinds and values, to a person: "number 41", "text east"."""
        return " and ".join(f"{part.kind} {part.label}{'=' * bool(part.label)}{part.text}" for part in self.readings[-1].parts)


def read_answer(value: object) -> Answer:
    """A reference answer: a text, a number or truth value as JSON has them, or a list of those, which are its parts.

    Raises ValueError for anything else, and for a text without an answer in it.
    """
    text = answer_text(value)
    readings = tuple(_readings(text, prose=False))
    if not readings:
        raise ValueError(f"the answer {text[:60]!r} is empty; give a text or a number")
    return Answer(readings)


def answer_text(value: object) -> str:
    """A reference answer as text. ValueError where it is none that `read_answer` takes."""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, list) and value:
        return "; ".join(map(answer_text, value))
    if isinstance(value, str | int) or (isinstance(value, float) and math.isfinite(value)):
        return str(value)
    raise ValueError(f"the answer {value!r} is neither text nor a finite number; give one, or a list of its parts")


def verify_answer(reference: Answer, completion: str) -> float:
    """1.0 if a completion's final answer equals the reference, else 0.0, after `TIME_LIMIT` seconds at the latest.

    Never raises, whatever the completion; any thread may call it.
    """
    deadline = time.monotonic() + TIME_LIMIT

    def equal(left: str, right: str) -> bool:
        return formulas.equal(left, right, deadline - time.monotonic())

    given = list(_readings(completion, prose=True))
    return float(any(_same_reading(wanted, reading, equal) for reading in given for wanted in reference.readings))


def _readings(text: str, *, prose: bool) -> Iterator[Reading]:
    """The readings of a text up to the first without words in it."""
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
    """Both, the items of a lone pair or set taken where the other is a bare list: "(1, 2)" is an answer to "1, 2"."""
    if len(wanted) > 1 and len(given) == 1 and given[0].brackets in ("()", "[]", "{}"):
        return wanted, given[0].items
    if len(given) > 1 and len(wanted) == 1 and wanted[0].brackets in ("()", "[]", "{}"):
        return (wanted if wanted[0].brackets != "{}" else wanted[0].items), (
            given if wanted[0].brackets == "{}" else (replace(wanted[0], text="", items=given),)
        )
    return wanted, given


def _same_set(mine: Sequence[Part], theirs: Sequence[Part], equal: Equal) -> bool:
    """Whether each of `mine` has a partner of its own among as many others."""
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
    """Whether two numbers with units are equal. A unit may be left out; 50 % is also 0.5."""
    if same_number(wanted, given):
        return same_unit(unit, other)
    if {unit, other} == {"%", ""}:
        percent, plain = (wanted, given) if unit else (given, wanted)
        return same_number(Number(percent.value / 100, False), plain)
    return False


def _bare(text: str) -> str:
    """A text without brackets and the full stops of abbreviations: "2:15 (p.m.)" is "2:15 pm"."""
    return re.sub(r"(?<=[a-z])\.|[()]", "", text)


def _left_to_do(formula: str) -> bool:
    """Whether arithmetic is a sum, difference or product: a power or a fraction is a way to write a number."""
    return bool(re.search(r"[\d)}]\s*(?:[-+*]|\\times|\\cdot|\()", formula))


def _formula_of(part: Part, other: Part) -> str:
    """A part as math-verify reads it; with its label where the other is an equation that may be solved for it."""
    formula = number_formula(part.number) if part.number else part.formula
    return f"{part.label}={formula}" if part.label and "=" in other.formula else formula
