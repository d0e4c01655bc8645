"""Reads numbers exactly, in the forms in which people and models write them, and compares them.

Forms: 1,234.5 and 1{,}234.5; 4.5e33, 4.5 \\times 10^{33} and 10^{33}; 5/2, \\frac{5}{2} and the mixed number 3 1/2. Arithmetic
(26+15) is computed only to check an equation such as "26+15=41".

Two whole numbers must be exactly equal. Two decimals may differ by a relative `DECIMAL_TOLERANCE`, which covers the noise of a JSON
number such as 0.30000000000000004. If one of the numbers has no finite decimal (1/3, a root), the other may be a rounded value of
it, so the relative tolerance is `ROUNDING_TOLERANCE`, six digits. Zero equals only zero.
"""

from __future__ import annotations

import ast
import math
import re
from dataclasses import dataclass
from fractions import Fraction

DECIMAL_TOLERANCE = Fraction(1, 10**9)
ROUNDING_TOLERANCE = Fraction(1, 10**6)
LONGEST_NUMBER = 1000  # characters
LARGEST_EXPONENT = 5000  # exponent of ten
LONGEST_ARITHMETIC = 200  # characters
LARGEST_POWER = 10_000  # bits of a power in arithmetic

_DIGITS = r"[1-9]\d{0,2}(?:(?:,|\{,\})\d{3})+(?!\d)|[1-9]\d{0,2}(?: \d{3})+(?![\d ]*/)(?!\d)|\d+"
_PLAIN = rf"(?:(?:{_DIGITS})(?:\.\d*)?|\.\d+)"
_EXPONENT = r"10\s*\^\s*(?:\{\s*(?P<sa>[+-]?\s*\d+)\s*\}|\(\s*(?P<sb>[+-]?\s*\d+)\s*\)|(?P<sc>[+-]?\d+))"
_TIMES = r"(?:\\times|\\cdot|[*x])"
_INTEGER = r"\d+"
_FRACTION = rf"(?:\\frac\s*(?:\{{\s*(?P<n1>-?{_PLAIN})\s*\}}|(?P<n2>\d))\s*(?:\{{\s*(?P<d1>{_PLAIN})\s*\}}|(?P<d2>\d)))"
_LITERAL = re.compile(
    rf"(?P<sign>[+-]?)\s*(?:"
    rf"(?P<whole>{_INTEGER})(?:\s*{_FRACTION}|\s+(?P<mn>{_INTEGER})\s*/\s*(?P<md>{_INTEGER}))"  # a mixed number
    rf"|(?P<mantissa>{_PLAIN})(?:[eE](?P<e>[+-]?\d+)|\s*{_TIMES}\s*{_EXPONENT})"
    rf"|{_EXPONENT.replace('?P<s', '?P<p')}"
    rf"|(?P<over>{_PLAIN})\s*/\s*(?P<under>{_PLAIN})"
    rf"|{_FRACTION.replace('?P<n', '?P<f').replace('?P<d', '?P<g')}"
    rf"|(?P<plain>{_PLAIN}))"
)


_REPEATING = re.compile(r"(-?)\s*(\d*)\.(\d*)\\overline\s*\{?(\d+)\}?")
_MAGNITUDES = {"hundred": 2, "thousand": 3, "million": 6, "billion": 9, "trillion": 12}
_MAGNITUDE = re.compile(rf"\s*({'|'.join(_MAGNITUDES)})\b", re.IGNORECASE)


@dataclass(frozen=True)
class Number:
    """An exact value. `whole` is True if it was written as an integer, `ends` if it has finitely many decimals."""

    value: Fraction
    whole: bool

    @property
    def ends(self) -> bool:
        denominator = self.value.denominator
        for factor in (2, 5):
            while denominator % factor == 0:
                denominator //= factor
        return denominator == 1


def leading_number(text: str) -> tuple[Number, str] | None:
    """The number at the beginning of a text, and the text after it. None if the text does not begin with a number."""
    if repeating := _REPEATING.match(text[:LONGEST_NUMBER]):
        return _repeated(repeating), text[repeating.end() :]
    match = _LITERAL.match(text)
    if match is None or match.end() > LONGEST_NUMBER:
        return None
    number = _value(match)
    if number is None:
        return None
    if magnitude := _MAGNITUDE.match(text, match.end()):
        scaled = number.value * 10 ** _MAGNITUDES[magnitude[1].lower()]
        return Number(scaled, scaled.denominator == 1), text[magnitude.end() :]
    return number, text[match.end() :]


def _repeated(match: re.Match[str]) -> Number:
    """The value of a repeating decimal such as 0.1\\overline{6}."""
    sign, whole, first, period = match.groups()
    value = Fraction(int(whole or "0") * 10 ** len(first) + int(first or "0"), 10 ** len(first))
    value += Fraction(int(period), (10 ** len(period) - 1) * 10 ** len(first))
    return Number(-value if sign else value, False)


def read_number(text: str) -> Number | None:
    """The value of a text that is one number, or None."""
    found = leading_number(text)
    return found[0] if found and not found[1].strip() else None


def _value(match: re.Match[str]) -> Number | None:
    groups = {name: value for name, value in match.groupdict().items() if value is not None}
    sign = -1 if groups["sign"] == "-" else 1
    exponents = [int(groups[name].replace(" ", "")) for name in ("e", "sa", "sb", "sc", "pa", "pb", "pc") if name in groups]
    if any(abs(exponent) > LARGEST_EXPONENT for exponent in exponents):
        return None
    scale = Fraction(10) ** exponents[0] if exponents else Fraction(1)

    def first(*names: str) -> Fraction:
        return _decimal(next(groups[name] for name in names if name in groups))

    if "plain" in groups:
        return Number(sign * first("plain"), re.sub(r"[{}, ]", "", groups["plain"]).isdigit())
    if "mantissa" in groups:
        return Number(sign * first("mantissa") * scale, False)
    if "whole" in groups:
        over, under = first("mn", "n1", "n2"), first("md", "d1", "d2")
        return None if under == 0 or over < 0 else Number(sign * (first("whole") + over / under), False)
    if exponents:
        return Number(sign * scale, False)
    over, under = first("over", "f1", "f2"), first("under", "g1", "g2")
    return None if under == 0 else Number(sign * over / under, False)


def _decimal(text: str) -> Fraction:
    digits = re.sub(r"[{}, ]", "", text)
    return -Fraction(digits[1:] + "0" * digits.endswith(".")) if digits[0] == "-" else Fraction(digits + "0" * digits.endswith("."))


def same_number(left: Number, right: Number, tolerance: Fraction | None = None) -> bool:
    """Whether two numbers are equal by the module's rules. `tolerance`, if given, replaces both relative tolerances."""
    if left.value == right.value:
        return True
    if left.whole and right.whole:
        return False
    if tolerance is None:
        tolerance = DECIMAL_TOLERANCE if left.ends and right.ends else ROUNDING_TOLERANCE
    return abs(left.value - right.value) <= tolerance * max(abs(left.value), abs(right.value))


def arithmetic(text: str) -> Number | None:
    """The value of numbers joined by + - * / ^ and parentheses. None if the text is anything else, or too long or too large."""
    if len(text) > LONGEST_ARITHMETIC:
        return None
    plain = re.sub(r"\\times|\\cdot|\u00d7", "*", re.sub(r"\\div|\u00f7", "/", text)).replace("^", "**")
    plain = re.sub(r"\\frac\{([^{}]*)\}\{([^{}]*)\}", r"((\1)/(\2))", plain).replace("{,}", "")
    plain = re.sub(r"(?<=\d),(?=\d{3}(?!\d))", "", plain.replace("{", "(").replace("}", ")"))
    if not re.fullmatch(r"[\d.+\-*/() ]+", plain):
        return None
    plain = re.sub(r"(?<![\d.])0+(?=\d)", "", plain)
    try:
        value = _computed(ast.parse(plain.strip(), mode="eval").body)
        return Number(value, value.denominator == 1 and "." not in plain)
    except (SyntaxError, ValueError, ZeroDivisionError, RecursionError, MemoryError):
        return None


def _computed(node: ast.expr) -> Fraction:
    """The value of a syntax tree of arithmetic. Raises ValueError for anything else."""
    if isinstance(node, ast.Constant) and type(node.value) in (int, float):
        return Fraction(str(node.value))
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.UAdd | ast.USub):
        value = _computed(node.operand)
        return -value if isinstance(node.op, ast.USub) else value
    if not isinstance(node, ast.BinOp):
        raise ValueError
    left, right = _computed(node.left), _computed(node.right)
    match node.op:
        case ast.Add():
            return left + right
        case ast.Sub():
            return left - right
        case ast.Mult():
            return left * right
        case ast.Div():
            return left / right
        case ast.Pow() if right.denominator == 1 and abs(right) * math.log2(abs(left) + 2) < LARGEST_POWER:
            power = left ** int(right)
            return Fraction(power)
    raise ValueError
