"""Interprets formulas that a policy wrote (arithmetic, polynomials and antiderivatives) without executing them.

`ast` parses a formula into a tree that is never compiled. `_interpreted` handles numbers, names, operators and calls of the
functions in `DERIVATIVES`, and rejects everything else. Lengths and numbers are bounded, so that no formula takes long. An invalid
formula mostly raises ValueError or SyntaxError, but also KeyError, ArithmeticError, RecursionError or MemoryError.
"""

from __future__ import annotations

import ast
import cmath
import operator
import random
import re
from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction
from typing import Any, TypeVar

Value = TypeVar("Value", Fraction, "Polynomial", "Differentiable")

LONGEST_PUZZLE = 1_000  # characters of arithmetic
LONGEST_FORMULA = 20_000  # characters of a formula with variables
LARGEST_COEFFICIENT = 10_000  # bits
LARGEST_EXPONENT = 1_000  # exponent of a polynomial
FORMULA = re.compile(r"[\w\s.+\-*/()]*", re.ASCII)

OPERATORS: dict[type[ast.operator], Callable[[Any, Any], Any]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.Pow: operator.pow,
}


def _parsed(formula: str, longest: int = LONGEST_FORMULA) -> ast.expr:
    if len(formula) > longest or not FORMULA.fullmatch(formula):
        raise ValueError(f"{formula[:60]!r} has {len(formula)} characters, or characters that are not allowed")
    return ast.parse(formula.strip(), mode="eval").body


def _interpreted(node: ast.expr, leaf: Callable[[ast.expr], Value]) -> Value:
    """The value of a formula. `leaf` interprets its numbers, names and calls.

    A long sum is a tree that is deep on the left, so left operands are handled in a loop and only right operands by recursion.
    """
    chain = []
    while isinstance(node, ast.BinOp):
        chain.append(node)
        node = node.left
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub | ast.UAdd):
        operand = _interpreted(node.operand, leaf)
        value = -operand if isinstance(node.op, ast.USub) else operand
    else:
        value = leaf(node)
    for parent in reversed(chain):
        value = OPERATORS[type(parent.op)](value, _interpreted(parent.right, leaf))
    return value


def _number(node: ast.expr) -> int | float:
    if isinstance(node, ast.Constant) and type(node.value) in (int, float):
        return node.value  # type: ignore[return-value]
    raise ValueError(f"expected a number, found a {type(node).__name__}")


def _whole(node: ast.expr) -> int:
    number = _number(node)
    if not isinstance(number, int):
        raise ValueError(f"{number} is not a whole number")
    return number


def arithmetic(formula: str) -> tuple[Fraction, list[int]]:
    """The value of a formula of whole numbers, + - * / and parentheses, and the list of its numbers."""
    numbers: list[int] = []

    def leaf(node: ast.expr) -> Fraction:
        numbers.append(_whole(node))
        return Fraction(numbers[-1])

    tree = _parsed(formula, LONGEST_PUZZLE)
    if any(isinstance(node, ast.Pow) for node in ast.walk(tree)):
        raise ValueError("the formula has a power, which the puzzles do not allow")
    return _interpreted(tree, leaf), numbers


Monomial = tuple[tuple[str, int], ...]  # (variable, exponent), sorted


@dataclass(frozen=True)
class Polynomial:
    """A polynomial as a sum of terms: the coefficient of each monomial. No coefficient is 0.

    A sum can only be multiplied by numbers, because the tasks ask for an expanded polynomial: the factors in the question must not
    count as an answer.
    """

    terms: dict[Monomial, int]

    @property
    def constant(self) -> int:
        """The value of a polynomial without variables. Raises ValueError for other polynomials."""
        if self.terms.keys() - {()}:
            raise ValueError("expected a number, found a polynomial with variables")
        return self.terms.get((), 0)

    @property
    def term(self) -> tuple[dict[str, int], int]:
        """The exponents and the coefficient of a polynomial with one term. Raises ValueError for other polynomials."""
        if len(self.terms) != 1:
            raise ValueError("the formula has a product, quotient or power of a sum, which is not expanded")
        ((monomial, coefficient),) = self.terms.items()
        return dict(monomial), coefficient

    def __neg__(self) -> Polynomial:
        return self * Polynomial({(): -1})

    def __add__(self, other: Polynomial) -> Polynomial:
        terms = dict(self.terms)
        for monomial, coefficient in other.terms.items():
            terms[monomial] = terms.get(monomial, 0) + coefficient
            if not terms[monomial]:
                del terms[monomial]
        return Polynomial(terms)

    def __sub__(self, other: Polynomial) -> Polynomial:
        return self + -other

    def __mul__(self, other: Polynomial) -> Polynomial:
        number, scaled = (other, self) if len(self.terms) > 1 else (self, other)
        if len(scaled.terms) > 1:
            factor = number.constant
            return Polynomial({monomial: _bounded(factor * c) for monomial, c in scaled.terms.items() if factor})
        if not self.terms or not other.terms:
            return Polynomial({})
        (exponents, coefficient), (others, factor) = self.term, other.term
        product = {name: exponents.get(name, 0) + others.get(name, 0) for name in exponents.keys() | others.keys()}
        return Polynomial({_monomial(product): _bounded(coefficient * factor)})

    def __truediv__(self, other: Polynomial) -> Polynomial:
        exponents, divisor = other.term
        if any(coefficient % divisor for coefficient in self.terms.values()):
            raise ValueError(f"the division by {divisor} leaves a remainder")
        quotient = Polynomial({monomial: coefficient // divisor for monomial, coefficient in self.terms.items()})
        return quotient * Polynomial({_monomial({name: -n for name, n in exponents.items()}): 1})

    def __pow__(self, other: Polynomial) -> Polynomial:
        n = other.constant
        exponents, coefficient = self.term
        if not 0 <= n <= LARGEST_EXPONENT or coefficient.bit_length() * n > LARGEST_COEFFICIENT:
            raise ValueError(f"exponent={n} does not give a polynomial, or gives one that is too large")
        return Polynomial({_monomial({name: k * n for name, k in exponents.items()}): coefficient**n})


def _monomial(exponents: dict[str, int]) -> Monomial:
    return tuple(sorted((name, n) for name, n in exponents.items() if n))


def _bounded(coefficient: int) -> int:
    if coefficient.bit_length() > LARGEST_COEFFICIENT:
        raise ValueError(f"a coefficient has {coefficient.bit_length()} bits; at most {LARGEST_COEFFICIENT} are allowed")
    return coefficient


def polynomial(formula: str) -> Polynomial:
    """Read a polynomial with whole coefficients that is written as a sum of terms."""

    def leaf(node: ast.expr) -> Polynomial:
        if isinstance(node, ast.Name):
            return Polynomial({((node.id, 1),): 1})
        number = _whole(node)
        return Polynomial({(): number} if number else {})

    return _interpreted(_parsed(formula), leaf)


@dataclass(frozen=True)
class Differentiable:
    """The value of a formula at a complex point, and its derivative there."""

    value: complex
    slope: complex = 0j

    def __neg__(self) -> Differentiable:
        return Differentiable(-self.value, -self.slope)

    def __add__(self, other: Differentiable) -> Differentiable:
        return Differentiable(self.value + other.value, self.slope + other.slope)

    def __sub__(self, other: Differentiable) -> Differentiable:
        return self + -other

    def __mul__(self, other: Differentiable) -> Differentiable:
        return Differentiable(self.value * other.value, self.slope * other.value + self.value * other.slope)

    def __truediv__(self, other: Differentiable) -> Differentiable:
        quotient = self.value / other.value
        return Differentiable(quotient, (self.slope - quotient * other.slope) / other.value)

    def __pow__(self, other: Differentiable) -> Differentiable:
        if other.slope == 0:
            power: complex = self.value**other.value
            return Differentiable(power, self.slope and other.value * self.value ** (other.value - 1) * self.slope)
        return _applied("exp", other * _applied("log", self))


# The functions that an antiderivative may contain, under sympy's names, and their derivatives.
DERIVATIVES: dict[str, tuple[Callable[[complex], complex], Callable[[complex], complex]]] = {
    "exp": (cmath.exp, cmath.exp),
    "log": (cmath.log, lambda z: 1 / z),
    "ln": (cmath.log, lambda z: 1 / z),
    "sqrt": (cmath.sqrt, lambda z: 0.5 / cmath.sqrt(z)),
    "sin": (cmath.sin, cmath.cos),
    "cos": (cmath.cos, lambda z: -cmath.sin(z)),
    "tan": (cmath.tan, lambda z: 1 + cmath.tan(z) ** 2),
    "sec": (lambda z: 1 / cmath.cos(z), lambda z: cmath.tan(z) / cmath.cos(z)),
    "csc": (lambda z: 1 / cmath.sin(z), lambda z: -1 / (cmath.tan(z) * cmath.sin(z))),
    "cot": (lambda z: 1 / cmath.tan(z), lambda z: -1 / cmath.sin(z) ** 2),
    "asin": (cmath.asin, lambda z: 1 / cmath.sqrt(1 - z * z)),
    "acos": (cmath.acos, lambda z: -1 / cmath.sqrt(1 - z * z)),
    "atan": (cmath.atan, lambda z: 1 / (1 + z * z)),
    "sinh": (cmath.sinh, cmath.cosh),
    "cosh": (cmath.cosh, cmath.sinh),
    "tanh": (cmath.tanh, lambda z: 1 - cmath.tanh(z) ** 2),
    "asinh": (cmath.asinh, lambda z: 1 / cmath.sqrt(1 + z * z)),
    "acosh": (cmath.acosh, lambda z: 1 / (cmath.sqrt(z - 1) * cmath.sqrt(z + 1))),
    "atanh": (cmath.atanh, lambda z: 1 / (1 - z * z)),
}
CONSTANTS = {"pi": cmath.pi, "E": cmath.e}
POINTS = 6  # points at which two functions are compared
TOLERANCE = 1e-9  # largest relative difference at a point


def _applied(name: str, argument: Differentiable) -> Differentiable:
    function, derivative = DERIVATIVES[name]
    return Differentiable(function(argument.value), argument.slope and derivative(argument.value) * argument.slope)


def is_antiderivative(formula: str, integrand: str, variable: str) -> bool:
    """Whether the derivative of `formula` with respect to `variable` is `integrand`. Other names are constants of integration.

    The two are compared at random complex points, where different functions differ almost surely (Schwartz 1980). The formula seeds
    the points, so that no formula can be written to fit them.
    """
    tree, expected = _parsed(formula), _parsed(integrand)
    rng = random.Random(formula)
    for _ in range(POINTS):
        point = cmath.rect(rng.uniform(0.3, 1.3), rng.uniform(-cmath.pi, cmath.pi))
        values = {variable: Differentiable(point, 1 + 0j)}
        slope, wanted = _at(values, rng, tree).slope, _at(values, rng, expected).value
        if not abs(slope - wanted) <= TOLERANCE * (1 + abs(wanted)):
            return False
    return True


def _at(values: dict[str, Differentiable], rng: random.Random, tree: ast.expr) -> Differentiable:
    """The value of a formula with these `values` of its names. Names without a value get a random one, added to `values`."""

    def leaf(node: ast.expr) -> Differentiable:
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and len(node.args) == 1 and not node.keywords:
            return _applied(node.func.id, _at(values, rng, node.args[0]))
        if isinstance(node, ast.Name):
            if node.id not in values:
                values[node.id] = Differentiable(CONSTANTS.get(node.id) or complex(rng.uniform(1, 2), rng.uniform(1, 2)))
            return values[node.id]
        return Differentiable(complex(_number(node)))

    return _interpreted(tree, leaf)
