"""Checks of arguments: one function for each kind of argument, shared by the ops, the allocator and the methods.

Each function returns the argument as a plain Python or NumPy value, or raises a ValueError that names the argument, the value seen
and the remedy. NumPy scalars and zero-dimensional arrays are accepted in place of Python values.
"""

from __future__ import annotations

import math
from collections.abc import Collection
from decimal import Decimal
from numbers import Real
from typing import Any

import numpy as np
from numpy.typing import NDArray

INT64 = np.iinfo(np.int64)
_NUMPY = (np.generic, np.ndarray)
_MASKED = np.ma.MaskedArray


def shown(value: object) -> str:
    """The value for use in a message: its repr on one line, cut to 80 characters."""
    try:
        text = " ".join(repr(value).split())
    except ValueError:  # Python refuses to print an integer of very many digits
        text = f"a {type(value).__name__} of very many digits"
    return text if len(text) <= 80 else f"{text[:77]}..."


def integer(name: str, value: Any, least: int = int(INT64.min), most: int = int(INT64.max)) -> int:
    """Accept an integer from `least` to `most`; refuse True and False."""
    given = _plain(value)
    if isinstance(given, int) and not isinstance(given, bool) and least <= given <= most:
        return given
    raise _refusal(name, value, f"an integer from {least} to {most}")


def real(name: str, value: Any) -> float:
    """Accept any real number, infinities and NaN included; refuse True and False."""
    number = _float(value)
    if number is None:
        raise _refusal(name, value, "a number")
    return number


def nonnegative(name: str, value: Any, otherwise: str = "") -> float:
    """Accept a finite number of at least 0. `otherwise` ends the message with the alternatives to a number."""
    number = _float(value)
    if number is None or not 0 <= number < math.inf:
        raise _refusal(name, value, f"0 or more{otherwise}")
    return number


def flag(name: str, value: Any) -> bool:
    given = _plain(value)
    if isinstance(given, bool):
        return given
    raise _refusal(name, value, "True or False")


def choice(name: str, value: Any, choices: Collection[str]) -> str:
    if isinstance(value, str) and value in choices:
        return str(value)
    raise ValueError(unknown(f"{name}={shown(value)}", value, choices))


def unknown(given: str, value: object, choices: Collection[str]) -> str:
    """The message for a value that is none of the choices. `given` names it; the closest choice is suggested."""
    from difflib import get_close_matches

    close = get_close_matches(str(value).lower().replace("-", "_"), choices, 1, 0.75)
    suggestion = f" (did you mean {close[0]}?)" if close else ""
    return f"{given} is unknown; choose one of {', '.join(choices)}{suggestion}"


def finite_range(name: str, value: Any) -> tuple[float, float]:
    """Accept a pair (lo, hi) of finite numbers with lo < hi."""
    try:
        low, high = value
    except (TypeError, ValueError):
        raise _refusal(name, value, "(lo, hi)") from None
    low, high = real(name, low), real(name, high)
    if not low < high or high - low == math.inf:
        raise ValueError(f"{name}=({low:.15g}, {high:.15g}) is not a finite range; give (lo, hi) with lo < hi")
    return low, high


def array(name: str, values: Any, wanted: str = "numbers", none_is_nan: bool = False) -> NDArray[Any]:
    """Accept anything that NumPy can read as an array of numbers. Arrays of objects become bool, int64 or float64.

    Args:
        wanted: what the message tells the caller to give.
        none_is_nan: whether None counts as NaN, a missing number.
    """
    given = any_array(name, values)
    if given.dtype.kind == "O":
        given = _numbers(name, given, wanted, none_is_nan)
    if given.dtype.kind not in "biufc":
        raise ValueError(f"{name}: dtype {given.dtype}; give {wanted}")
    return given


def any_array(name: str, values: Any) -> NDArray[Any]:
    """Accept an array of any dtype; refuse masked arrays, because their masks would be ignored."""
    if isinstance(values, _MASKED):
        raise ValueError(f"{name}: a masked array, whose mask would be ignored; give a plain array, such as its filled() returns")
    try:
        return np.asarray(values)
    except (TypeError, ValueError, RuntimeError) as error:  # ragged, or holds objects that NumPy cannot read
        raise ValueError(f"{name}: {error}; give a tensor or a rectangular array of numbers") from None


def _numbers(name: str, objects: NDArray[Any], wanted: str, none_is_nan: bool) -> NDArray[Any]:
    given = [math.nan if none_is_nan and item is None else _plain(item) for item in objects.flat]
    for position, item in enumerate(given):
        if not isinstance(item, Real | Decimal):
            raise ValueError(f"{name}: dtype object; give {wanted} (a {type(item).__name__} is at position {position})")
    kinds = {bool if isinstance(item, bool) else int if isinstance(item, int) else float for item in given}
    dtype = np.bool_ if kinds == {bool} else np.float64 if float in kinds else np.int64
    try:
        return np.array(given, dtype=dtype).reshape(objects.shape)
    except OverflowError:
        raise ValueError(f"{name}: dtype object; give {wanted} that fit {np.dtype(dtype)}") from None


def _refusal(name: str, value: Any, wanted: str) -> ValueError:
    if hasattr(value, "is_cuda"):
        return ValueError(f"{name}: a tensor, whose value every call would have to wait for; give a Python number")
    return ValueError(f"{name}={shown(value)}; give {wanted}")


def _float(value: Any) -> float | None:
    given = _plain(value)
    if isinstance(given, bool) or not isinstance(given, Real):
        return None
    try:
        return float(given)
    except OverflowError:
        return None


def _plain(value: Any) -> Any:
    if type(value) is int:  # a shortcut for the most common type
        return value
    return value.item() if isinstance(value, _NUMPY) and value.ndim == 0 else value
