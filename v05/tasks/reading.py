"""Parses the text of an answer into parts that can be compared: numbers, formulas, words, pairs and sets."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from fractions import Fraction

from v05.tasks.numbers import Number, arithmetic, leading_number, read_number, same_number
from v05.tasks.statements import folded, one_spelling
from v05.tasks.units import is_unit, leading_currency, read_unit, trailing_unit

DEEPEST = 20  # deepest nesting of brackets that is parsed
LARGEST_IN_FORMULA = 3000  # bits
LONGEST_CHOICE = 1000  # characters
ROUGHLY = Fraction(1, 100)  # relative difference allowed between the sides of an equation, because of rounding: "10/3 = 3.33"

_FUNCTIONS = (
    r"arcsin|arccos|arctan|sinh|cosh|tanh|sin|cos|tan|cot|sec|csc|log|ln|exp|sqrt|max|min|gcd|lcm|det|deg|mod|pi|infty|infinity|alpha|"
    r"beta|gamma|delta|theta|lambda|mu|sigma|phi|omega"
)
_FUNCTION = re.compile(rf"(?<![\\A-Za-z])({_FUNCTIONS})(?![A-Za-z])")
_NEVER_ARITHMETIC = re.compile(
    r"\d{1,4}([-/.])\d{1,2}\1\d{1,4}|.*\d:\d.*|\d+-0\d+|\d{3}-\d{4}|\d+ ?(?:st|nd|rd|th)|[\dA-F]+_\{?\d+\}?|.*[\"?@#~].*|.*:.*",
    re.IGNORECASE,
)  # dates, times and ratios, telephone numbers, ordinals, numerals of another base
_SYMBOL = r"(?:\\?[A-Za-z]+|[A-Za-z])(?:_\{?\w+\}?)?'*"
_LABEL = re.compile(rf"(?:{_SYMBOL}|{_SYMBOL}\s*\([^()=]*\)|\|\w+\||\\angle\s*\w+|[A-Za-z][A-Za-z ]*|\([a-z](?:\s*,\s*[a-z])+\))")
_EQUALS = re.compile(r"(?<![<>!=:\\])=(?!=)|\\approx(?![A-Za-z])")
_SEPARATOR = re.compile(r"\s*(?:[,;]\s*(?:and|or)(?=\s)|[,;]|\s(?:and|or|\|)(?=\s)|\\\\)\s*", re.IGNORECASE)
_THOUSANDS = re.compile(r"(?<![\d.,])[1-9]\d{0,2}(?:,\d{3})+(?![\d])")
_OPENING, _CLOSING = "([{", ")]}"


@dataclass(frozen=True)
class Part:
    """One part of an answer.

    Attributes:
        text: the folded spelling, without the label.
        label: the name of the quantity, such as "x" in "x = 5".
        number: the value of a number, else None.
        unit: the unit of a number or formula.
        formula: the LaTeX of a formula or of an equation between formulas.
        items, brackets: the items and brackets of a pair, an interval or a set.
    """

    text: str
    label: str = ""
    number: Number | None = None
    unit: str = ""
    formula: str = ""
    items: tuple[Part, ...] = ()
    brackets: str = ""

    @property
    def kind(self) -> str:
        """How the part is compared: "number", "formula", "text", "tuple" or "set"."""
        if self.items:
            return "set" if self.brackets == "{}" else "tuple"
        return "number" if self.number else "formula" if self.formula else "text"


@dataclass(frozen=True)
class Reading:
    """One reading of a text: its folded spelling and its parts. For a choice letter, `option` is the option's text if given."""

    text: str
    parts: tuple[Part, ...]
    option: str = ""

    @property
    def has_words(self) -> bool:
        return any(part.kind == "text" for part in self.parts)


def read(text: str) -> Reading | None:
    """The reading of a text, or None if the text is empty."""
    if "\\begin" not in text:
        text = re.sub(r"\s*\n\s*", "; ", text.strip())
    spelled = one_spelling(text)
    if not spelled:
        return None
    whole = _THOUSANDS.sub(lambda number: number[0].replace(",", ""), spelled)
    return Reading(folded(spelled), tuple(part for piece in _pieces(whole, _SEPARATOR) for part in _signed(piece)))


_CHOICE = re.compile(
    r"\(([A-J])\)\s*(.*)|(?:option|choice)\s+\(?([A-J])\)?(.*)|([A-J])(?:\)\s*|[:.]\s+)(\S.*)", re.IGNORECASE | re.DOTALL
)


def read_choice(text: str) -> Reading | None:
    """The reading of a text that begins with a choice letter, with the option's text: "(B) Paris". None for other texts."""
    match = _CHOICE.fullmatch(one_spelling(text)[:LONGEST_CHOICE])
    if match is None:
        return None
    letter, option = (group for group in match.groups() if group is not None)
    if (
        not letter.isupper()
        or re.match(r"(?:or|and|,|;|/)\b|[,;/&]", option, re.IGNORECASE)
        or re.search(r"\([A-J]\)|\b[A-J]\)", option)
    ):
        return None  # several letters are not a choice
    return Reading(letter.casefold(), (Part(letter.casefold()),), folded(option))


def _pieces(text: str, separator: re.Pattern[str]) -> list[str]:
    """The non-empty pieces of a text, split at the separators outside brackets."""
    pieces, depth, start, position = [], 0, 0, 0
    while position < len(text):
        found = separator.match(text, position) if depth == 0 else None
        if found and found.end() > position:
            pieces.append(text[start:position])
            start = position = found.end()
            continue
        if text.startswith(("\\begin", "\\end"), position):
            depth += 1 if text.startswith("\\begin", position) else -1
            position += 4
        else:
            depth += (text[position] in _OPENING) - (text[position] in _CLOSING)
        depth = max(depth, 0)
        position += 1
    return [piece.strip() for piece in (*pieces, text[start:]) if piece.strip()]


def _signed(text: str) -> Iterator[Part]:
    """The part that a text stands for, or two parts if the text has one plus-minus sign."""
    if len(re.findall(r"\\pm(?![A-Za-z])", text)) == 1:
        for sign in "+-":
            yield _part(re.sub(r"\\pm\s*", sign, text).lstrip("+"))
    else:
        yield _part(text)


def _part(text: str) -> Part:
    sides = _pieces(text, _EQUALS)
    if len(sides) > 1 and "\\begin" not in text:
        return _equation(text, sides)
    if labelled := re.match(rf"({_SYMBOL})\s*\\in(?![A-Za-z])\s*|([A-Za-z][A-Za-z ]*):\s+(?=\S)", text):
        return replace(_value(text[labelled.end() :]), label=_label(labelled[1] or labelled[2]))
    return _value(text)


def _value(text: str) -> Part:
    """A part without a label."""
    return _bracketed(text) or _quantity(text) or _formula(text) or Part(folded(text))


def _equation(text: str, sides: list[str]) -> Part:
    """The part of an equation: a labelled value, the value of a true equation of numbers, or an equation between formulas."""
    if not _LABEL.fullmatch(sides[0]) and _LABEL.fullmatch(sides[-1]):
        sides = sides[::-1]
    label = _label(sides[0]) if _LABEL.fullmatch(sides[0]) else ""
    if not label and re.search(r"[A-Za-z]", re.sub(r"\\[A-Za-z]+", "", _FUNCTION.sub("", "".join(sides)))):
        return _formula(text) or Part(folded(text))
    values = sides[1:] if label else sides
    numbers = [number for number in map(_computed, values) if number is not None]
    if any(not same_number(number, numbers[-1], ROUGHLY) for number in numbers):
        return Part(folded(text))  # a false equation has no value
    plain = [value for value in values if read_number(value) is not None]  # "41 = 26 + 15" states 41
    return replace(_value(plain[-1] if numbers and plain else values[-1]), label=label)


def _computed(text: str) -> Number | None:
    _, plain = leading_currency(text)
    found = leading_number(plain)
    if found and read_unit(found[1]) is not None:
        return found[0]
    return arithmetic(text)


def _label(text: str) -> str:
    """A label for comparison. f(x) counts as y. Labels made of words are dropped, because they do not distinguish answers."""
    label = folded(text)
    if re.fullmatch(r"[a-z]\([a-z]\)", label):
        return "y"
    return "" if re.search(r"[a-z]{4}| ", label) and "\\" not in label else label


def _bracketed(text: str) -> Part | None:
    """A pair, an interval or a set, or the content of brackets around a single item. None for other texts."""
    body = (
        re.sub(r"\\[lr]angle(?![A-Za-z])", lambda angle: "(" if angle[0][1] == "l" else ")", text)
        .replace("\\{", "{")
        .replace("\\}", "}")
    )
    if len(body) < 3 or body[0] not in _OPENING or body[-1] not in _CLOSING or (body[0] == "{") != (body[-1] == "}"):
        return None
    depth = deepest = 0
    for position, letter in enumerate(body):
        depth += (letter in _OPENING) - (letter in _CLOSING)
        deepest = max(deepest, depth)
        if depth == 0 and position < len(body) - 1:
            return None  # "(1, 2), (3, 4)" and "(x + 1)(x - 1)"
    if deepest > DEEPEST:
        return None
    inside, brackets = body[1:-1], body[0] + body[-1]
    if ", " in inside:
        inside = _THOUSANDS.sub(lambda number: number[0].replace(",", ""), inside)
    items = [_part(piece) for piece in _pieces(inside, re.compile(r"\s*[,;]\s*"))]
    if len(items) == 1 and brackets[0] + brackets[1] in ("()", "[]", "{}"):
        return items[0]
    return Part(folded(body), items=tuple(items), brackets=brackets) if len(items) > 1 else None


def _quantity(text: str) -> Part | None:
    """A number with its unit, if any. None for other texts."""
    if _NEVER_ARITHMETIC.fullmatch(text):
        return None
    currency, plain = leading_currency(text)
    found = leading_number(plain)
    if found is None:
        return None
    unit = read_unit(found[1])
    if unit is None or (currency and unit not in ("", currency)):
        return None
    return Part(folded(text), number=found[0], unit=currency or unit)


def _formula(text: str) -> Part | None:
    """A formula for math-verify. None if the text is words."""
    body, unit = trailing_unit(text.replace("$", ""))
    letters = re.sub(r"\\(?:begin|end)\s*\{\w+\*?\}|\\[A-Za-z]+", " ", body)
    letters = _FUNCTION.sub(" ", letters)
    runs = re.findall(r"[^\W\d_]+", letters)
    mathematical = re.search(r"[\d+*/^=<>|!_()\[\]\\-]", body)
    if (
        _NEVER_ARITHMETIC.fullmatch(body)
        or not mathematical
        or is_unit(body)
        or any(len(run) > 3 or not run.isascii() for run in runs)
        or re.search(r"[A-Za-z]\d|\.\d*\.|\. |[A-Za-z] [A-Za-z]{2}|[A-Za-z]{2} [A-Za-z\d]", letters)
        or not _balanced(body)
        or (re.search(r"[\d)}]\s*[-+]", body) and arithmetic(body) is not None)  # a sum left to do, a score, a range
    ):
        return None
    return Part(folded(text), formula=_latex(body), unit=unit)


def _balanced(text: str) -> bool:
    depth = 0
    for letter in text:
        depth += (letter in _OPENING) - (letter in _CLOSING)
        if depth < 0:
            return False
    return depth == 0


def _latex(text: str) -> str:
    """A formula in LaTeX, converted from plain-text notation if necessary."""
    text = text.replace("**", "^")
    text = re.sub(r"(?<![\\A-Za-z])sqrt\s*\(([^()]*)\)", r"\\sqrt{\1}", text)
    text = _FUNCTION.sub(lambda name: "\\infty " if name[1] == "infinity" else f"\\{name[1]} ", text)
    text = re.sub(r"(?<=\d)[eE]([+-]?\d+)(?![\dA-Za-z])", r" \\cdot 10^{\1}", text)
    text = re.sub(r"(?<=\d)i(?![A-Za-z])", " i", text)  # math-verify recognises the imaginary unit only if it stands alone
    text = re.sub(r"\^\s*(-?\d+(?:\.\d+)?|\([^()]*\))", lambda power: "^{" + power[1].strip("()") + "}", text)
    text = re.sub(r"_(\d+|[A-Za-z]{2,})", r"_{\1}", text)
    text = text.replace("<=", "\\le ").replace(">=", "\\ge ").replace("!=", "\\ne ").replace("*", "\\cdot ")
    return text.replace("\u00b0", "^{\\circ}").replace("%", "\\%")


def number_formula(number: Number) -> str:
    """A number in LaTeX: a whole number, a decimal or a fraction. Empty for a number above LARGEST_IN_FORMULA, about 900 digits."""
    value = number.value
    if max(value.numerator.bit_length(), value.denominator.bit_length()) > LARGEST_IN_FORMULA:
        return ""
    if value.denominator == 1 and number.whole:
        return str(value.numerator)
    if not number.ends:
        return f"\\frac{{{value.numerator}}}{{{value.denominator}}}"
    places = 0
    while value.denominator > 1:
        value, places = value * 10, places + 1
    return f"{value.numerator}.0 \\cdot 10^{{{-places}}}"
