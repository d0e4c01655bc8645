"""The op's performance targets on an H200, and verdicts on whether a run reached them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from on_gpu.batch import SHAPES, Shape
from on_gpu.cases import CALIBRATED, HALF, IDS, LONG_MASK, ON_VERLS, PACKED, PADDED, VERL_VECTORIZED
from on_gpu.results import Row

MIDDLE, LONG, MANY = Shape(4096, 2048, 16), Shape(1024, 32768, 16), Shape(16384, 4096, 8)


class Figures:
    """The rows of a run by case and shape. A figure that was not measured is None."""

    def __init__(self, rows: Iterable[Row]) -> None:
        self._rows = {(row.case, row.shape): row for row in rows}

    def get(self, case: str, shape: Shape, name: str) -> float | None:
        row = self._rows.get((case, shape))
        value = None if row is None else getattr(row, name)
        return None if value is None else float(value)

    def worst(self, case: str, name: str) -> float | None:
        """The largest value over all shapes, or None unless every shape has one."""
        return _largest(self.get(case, shape, name) for shape in SHAPES)

    def ratio(self, case: str, over: str, shape: Shape, name: str) -> float | None:
        above, below = self.get(case, shape, name), self.get(over, shape, name)
        return None if above is None or below is None else above / below


def _largest(values: Iterable[float | None]) -> float | None:
    kept = list(values)
    return None if None in kept else max(value for value in kept if value is not None)


@dataclass(frozen=True)
class Target:
    what: str
    figure: Callable[[Figures], float | None]
    bound: float
    at_most: bool = True
    form: str = "{:.1f}"

    def verdict(self, figures: Figures) -> tuple[bool | None, str]:
        """Whether the target is met (None if its figure is missing), and a line for users."""
        value = self.figure(figures)
        bound = f"{'<=' if self.at_most else '>='} {self.form.format(self.bound)}"
        if value is None:
            return None, f"not measured  {self.what}: {bound} wanted"
        met = value <= self.bound if self.at_most else value >= self.bound
        return met, f"{'met' if met else 'NOT met':<12}  {self.what}: {self.form.format(value)}, {bound} wanted"


def _share(case: str, shape: Shape, bound: float) -> Target:
    what = f"{case}, {shape}, share of the copy's bandwidth"
    return Target(what, lambda f: f.get(case, shape, "of_copy"), bound, at_most=False, form="{:.1%}")


TARGETS = (
    Target(f"{PADDED}, host's microseconds, worst shape", lambda f: f.worst(PADDED, "host_us"), 30),
    Target(f"{IDS}, host's microseconds, worst shape", lambda f: f.worst(IDS, "host_us"), 60),
    _share(PADDED, MIDDLE, 0.88),
    _share(PADDED, LONG, 0.93),
    _share(PADDED, MANY, 0.93),
    _share(HALF, MIDDLE, 0.75),
    _share(PACKED, MIDDLE, 0.75),
    Target(f"{IDS}, {MIDDLE}, times offsets", lambda f: f.ratio(IDS, PADDED, MIDDLE, "device_us"), 1.5, form="{:.2f}"),
    Target(
        f"{CALIBRATED}, times v05, worst shape",
        lambda f: _largest(f.ratio(CALIBRATED, PADDED, shape, "device_us") for shape in SHAPES),
        1.2,
        form="{:.2f}",
    ),
    Target(f"{LONG_MASK}, {MIDDLE}, microseconds", lambda f: f.get(LONG_MASK, MIDDLE, "device_us"), 42),
    Target(
        "whole call on verl's tensors, times faster than verl's vectorised function",
        lambda f: f.ratio(VERL_VECTORIZED, ON_VERLS, MIDDLE, "whole_us"),
        8,
        at_most=False,
    ),
)


def verdicts(rows: Sequence[Row]) -> list[tuple[bool | None, str]]:
    figures = Figures(rows)
    return [target.verdict(figures) for target in TARGETS]
