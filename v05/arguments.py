"""What an argument may be: one rule for each kind, shared by the op, the allocator and the methods.

A rule returns the argument as the Python or NumPy value that it stands for, or raises a ValueError that names the argument, the
value seen and the remedy. NumPy's scalars and arrays without a dimension are the Python values that they hold.
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
    """A value in a message, on one line; a long one is cut."""
    try:
        text = " ".join(repr(value).split())
    except ValueError:  # an integer of more digits than Python prints
        text = f"a {type(value).__name__} of very many digits"
    return text if len(text) <= 80 else f"{text[:77]}..."


def integer(name: str, value: Any, least: int = int(INT64.min), most: int = int(INT64.max)) -> int:
    """An integer from `least` to `most`; True and False are none."""
    given = _plain(value)
    if isinstance(given, int) and not isinstance(given, bool) and least <= given <= most:
        return given
    raise _refusal(name, value, f"an integer from {least} to {most}")


def real(name: str, value: Any) -> float:
    """Any real number, infinite ones and NaN too; True and False are none."""
    number = _float(value)
    if number is None:
        raise _refusal(name, value, "a number")
    return number


def nonnegative(name: str, value: Any, otherwise: str = "") -> float:
    """A finite number of at least 0. `otherwise` ends the message: what else may be given."""
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
    raise ValueError(f"{name}={shown(value)} is unknown; choose one of {', '.join(choices)}")


def finite_range(name: str, value: Any) -> tuple[float, float]:
    """(lowest, highest), both finite."""
    try:
        low, high = value
    except (TypeError, ValueError):
        raise _refusal(name, value, "(lo, hi)") from None
    low, high = real(name, low), real(name, high)
    if not low < high or high - low == math.inf:
        raise ValueError(f"{name}=({low:.15g}, {high:.15g}) is not a finite range; give (lo, hi) with lo < hi")
    return low, high


def array(name: str, values: Any, wanted: str = "numbers", none_is_nan: bool = False) -> NDArray[Any]:
    """An array of numbers, in a dtype of NumPy's that holds them; objects are the numbers that they stand for.

    Args:
        wanted: what the message says to give.
        none_is_nan: whether None stands for a number that is missing.
    """
    given = any_array(name, values)
    if given.dtype.kind == "O":
        given = _numbers(name, given, wanted, none_is_nan)
    if given.dtype.kind not in "biufc":
        raise ValueError(f"{name}: dtype {given.dtype}; give {wanted}")
    return given


def any_array(name: str, values: Any) -> NDArray[Any]:
    """An array of any dtype; one whose mask would be ignored is refused."""
    if isinstance(values, _MASKED):
        raise ValueError(f"{name}: a masked array, whose mask would be ignored; give a plain one, as its filled() makes")
    try:
        return np.asarray(values)
    except (TypeError, ValueError, RuntimeError) as error:  # ragged, or made of what NumPy cannot read
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
        return ValueError(f"{name}: a tensor, which would have to be waited for at every call; give a Python number")
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
    if type(value) is int:  # the most common, and asked for at every call of the op
        return value
    return value.item() if isinstance(value, _NUMPY) and value.ndim == 0 else value
