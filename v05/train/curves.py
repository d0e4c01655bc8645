"""What is read off learning curves of several seeds: their mean, where it reaches a target, and 95 % bootstrap intervals."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

BOOTSTRAP_DRAWS = 2000
INTERVAL = (2.5, 97.5)  # percentiles
ROUNDING = 1e-12  # of a mean accuracy, summed in another order

Array = NDArray[np.float64]
Curve = tuple[Array, Array]  # of one seed: (E,) what was spent at each evaluation, rising, and (E,) what was found


@dataclass(frozen=True)
class Reached:
    """From where on a mean curve stays at a target or above, and the 95 % interval of that over seeds; None is never."""

    at: float | None
    low: float | None
    high: float | None


def bootstrap_interval(by_seed: Sequence[Array]) -> tuple[float, float]:
    """95 % interval of the mean over seeds and held-out prompts, resampling both.

    `by_seed` holds one (P,) vector a seed, over the same P prompts. With a handful of seeds the interval is rough and too narrow.
    """
    values = np.stack(by_seed)
    seeds, prompts = _draws(*values.shape)
    low, high = np.percentile(((seeds @ values) * prompts).sum(axis=1) / values.size, INTERVAL)
    return float(low), float(high)


@lru_cache(maxsize=4)
def _draws(seeds: int, prompts: int) -> tuple[Array, Array]:
    """(draws, seeds) and (draws, prompts), how often each draw has each of them; the same for every mean of these shapes."""
    rng = np.random.default_rng(0)
    counts = np.zeros((BOOTSTRAP_DRAWS, seeds)), np.zeros((BOOTSTRAP_DRAWS, prompts))
    for draw in range(BOOTSTRAP_DRAWS):
        for counted in counts:
            width = counted.shape[1]
            counted[draw] = np.bincount(rng.integers(width, size=width), minlength=width)
    return counts


def mean_curve(curves: Sequence[Curve]) -> tuple[Array, Array, Array]:
    """(points, mean, standard deviation) over seeds at every point where one was evaluated, up to where the shortest ends.

    Curves are straight between evaluations, and so is their mean. The deviation of one seed is zero.
    """
    end = min(xs[-1] for xs, _ in curves)
    points = np.unique(np.concatenate([xs[xs <= end] for xs, _ in curves]))
    values = np.stack([np.interp(points, xs, ys) for xs, ys in curves])
    return points, values.mean(axis=0), values.std(axis=0, ddof=1) if len(curves) > 1 else np.zeros_like(points)


def reaching(curves: Sequence[Curve], targets: Sequence[float]) -> Reached:
    """From where on the mean of `curves` stays at the mean of `targets` or above: a first crossing would count its luckiest moment.

    Both list the same seeds, which are resampled in pairs.
    """
    draws = np.sort(np.random.default_rng(0).integers(len(curves), size=(BOOTSTRAP_DRAWS // 4, len(curves))), axis=1)
    resamples, resample_of = np.unique(draws, axis=0, return_inverse=True)  # few seeds have few different resamples
    crossings = np.array([crossing([curves[i] for i in seeds], float(np.mean([targets[i] for i in seeds]))) for seeds in resamples])
    at = crossing(curves, float(np.mean(targets)))
    low, high = np.percentile(crossings[resample_of.ravel()], INTERVAL, method="nearest")
    return Reached(*(float(x) if np.isfinite(x) else None for x in (at, low, high)))


def crossing(curves: Sequence[Curve], target: float) -> float:
    """From where on the mean curve is at `target` or above; infinity if it ends below."""
    points, mean, _ = mean_curve(curves)
    below = np.flatnonzero(mean < target - ROUNDING)
    if not len(below):
        return float(points[0])
    last = below[-1]
    if last == len(mean) - 1:
        return float("inf")
    return float(np.interp(target, mean[last : last + 2], points[last : last + 2]))
