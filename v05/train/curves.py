"""Statistics of learning curves over several seeds: the mean, where it reaches a target, and 95 % bootstrap intervals."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

BOOTSTRAP_DRAWS = 2000
INTERVAL = (2.5, 97.5)  # percentiles
ROUNDING = 1e-12  # difference of mean accuracies that the order of summation can explain

Array = NDArray[np.float64]
Curve = tuple[Array, Array]  # of one seed: (E,) rollouts, tokens or seconds spent at each evaluation, increasing, and (E,) values


@dataclass(frozen=True)
class Reached:
    """The point from which a mean curve stays at or above a target, and its 95 % interval over seeds. None means never."""

    at: float | None
    low: float | None
    high: float | None


def bootstrap_interval(by_seed: Sequence[Array]) -> tuple[float, float]:
    """95 % bootstrap interval of the mean over seeds and held-out prompts, resampling both.

    `by_seed` holds one (P,) vector per seed, over the same P prompts. With few seeds the interval is rough and too narrow.
    """
    return bootstrap_interval_over_mixes([by_seed])


def bootstrap_interval_over_mixes(by_mix: Sequence[Sequence[Array]]) -> tuple[float, float]:
    """95 % bootstrap interval of the mean over mixes of their means over seeds and prompts.

    The seeds and prompts of each mix are resampled independently, so mixes may differ in the number of seeds.
    """
    means = []
    for stream, by_seed in enumerate(by_mix):
        values = np.stack(by_seed)
        seeds, prompts = _draws(*values.shape, stream)
        means.append(((seeds @ values) * prompts).sum(axis=1) / values.size)
    low, high = np.percentile(np.mean(means, axis=0), INTERVAL)
    return float(low), float(high)


@lru_cache(maxsize=8)
def _draws(seeds: int, prompts: int, stream: int) -> tuple[Array, Array]:
    """(draws, seeds) and (draws, prompts): how often each bootstrap draw contains each seed and each prompt. Deterministic."""
    rng = np.random.default_rng(stream)
    counts = np.zeros((BOOTSTRAP_DRAWS, seeds)), np.zeros((BOOTSTRAP_DRAWS, prompts))
    for draw in range(BOOTSTRAP_DRAWS):
        for counted in counts:
            width = counted.shape[1]
            counted[draw] = np.bincount(rng.integers(width, size=width), minlength=width)
    return counts


def mean_curve(curves: Sequence[Curve]) -> tuple[Array, Array, Array]:
    """(points, mean, standard deviation) over seeds, at every point where a seed was evaluated, up to the end of the shortest
    curve.

    Curves are interpolated linearly between evaluations. The standard deviation of a single seed is zero.
    """
    end = min(xs[-1] for xs, _ in curves)
    points = np.unique(np.concatenate([xs[xs <= end] for xs, _ in curves]))
    values = np.stack([np.interp(points, xs, ys) for xs, ys in curves])
    return points, values.mean(axis=0), values.std(axis=0, ddof=1) if len(curves) > 1 else np.zeros_like(points)


def reaching(curves: Sequence[Curve], targets: Sequence[float]) -> Reached:
    """The point from which the mean of `curves` stays at or above the mean of `targets`. (The first crossing may be luck.)

    Both arguments list the same seeds, which are resampled in pairs.
    """
    draws = np.sort(np.random.default_rng(0).integers(len(curves), size=(BOOTSTRAP_DRAWS // 4, len(curves))), axis=1)
    resamples, resample_of = np.unique(draws, axis=0, return_inverse=True)  # few seeds have few different resamples
    crossings = np.array([crossing([curves[i] for i in seeds], float(np.mean([targets[i] for i in seeds]))) for seeds in resamples])
    at = crossing(curves, float(np.mean(targets)))
    low, high = np.percentile(crossings[resample_of.ravel()], INTERVAL, method="nearest")
    return Reached(*(float(x) if np.isfinite(x) else None for x in (at, low, high)))


def crossing(curves: Sequence[Curve], target: float) -> float:
    """The point from which the mean curve stays at or above `target`; infinity if it ends below."""
    points, mean, _ = mean_curve(curves)
    below = np.flatnonzero(mean < target - ROUNDING)
    if not len(below):
        return float(points[0])
    last = below[-1]
    if last == len(mean) - 1:
        return float("inf")
    return float(np.interp(target, mean[last : last + 2], points[last : last + 2]))
