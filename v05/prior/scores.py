"""Scores of predicted success rates against the observed ones."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

LEAST_CONFIDENT = 1e-3  # cross_entropy clips predictions this far from 0 and 1, so that one confident error does not decide it
RESAMPLES = 1000
INTERVAL = (2.5, 97.5)  # percentiles


def auc(predicted: NDArray[np.float64], rates: NDArray[np.float64], groups: NDArray[np.int64] | None = None) -> float:
    """How often a prompt with a success rate above 1/2 is predicted above one with a rate of at most 1/2. Ties count half.

    NaN if there is no such pair.

    Args:
        predicted, rates: (G,) predicted and observed success rates.
        groups: (G,) policy of each prompt. Only pairs of the same policy count. None means one policy.
    """
    groups = np.zeros(len(rates), dtype=np.int64) if groups is None else groups
    right = pairs = 0.0
    for group in np.unique(groups):
        values, positive = predicted[groups == group], rates[groups == group] > 0.5
        below = np.sort(values[~positive])
        ranks = np.searchsorted(below, values[positive], "left") + np.searchsorted(below, values[positive], "right")
        right += ranks.sum() / 2
        pairs += positive.sum() * (~positive).sum()
    return float(right / pairs) if pairs else float("nan")


def brier(predicted: NDArray[np.float64], rates: NDArray[np.float64]) -> float:
    """Mean squared error of (G,) predictions against (G,) success rates, in reward units squared. NaN without prompts."""
    return float(np.mean((predicted - rates) ** 2)) if len(rates) else float("nan")


def cross_entropy(predicted: NDArray[np.float64], rates: NDArray[np.float64]) -> float:
    """Mean cross-entropy of (G,) predictions against (G,) success rates, in nats. NaN without prompts."""
    p = np.clip(predicted, LEAST_CONFIDENT, 1 - LEAST_CONFIDENT)
    return float(-np.mean(rates * np.log(p) + (1 - rates) * np.log1p(-p))) if len(rates) else float("nan")


def auc_interval(
    predicted: NDArray[np.float64], rates: NDArray[np.float64], groups: NDArray[np.int64], seed: int = 0
) -> tuple[float, float]:
    """95 % bootstrap interval of the AUC, with prompts resampled within each policy. NaN if most resamples have no pair."""
    rng = np.random.default_rng(seed)
    members = [np.flatnonzero(groups == group) for group in np.unique(groups)]
    resampled = []
    for _ in range(RESAMPLES):
        rows = np.concatenate([rng.choice(m, len(m)) for m in members]) if members else np.zeros(0, dtype=np.int64)
        resampled.append(auc(predicted[rows], rates[rows], groups[rows]))
    found = np.array(resampled)[~np.isnan(resampled)]
    if len(found) < RESAMPLES / 2:
        return float("nan"), float("nan")
    low, high = np.percentile(found, INTERVAL)
    return float(low), float(high)


def calibration_curve(predicted: NDArray[np.float64], rates: NDArray[np.float64], bins: int = 5) -> list[tuple[float, float, int]]:
    """(mean prediction, mean success rate, number of prompts) of bins with equally many prompts, lowest predictions first."""
    order = np.argsort(predicted, kind="stable")
    parts = [part for part in np.array_split(order, bins) if len(part)]
    return [(float(predicted[part].mean()), float(rates[part].mean()), len(part)) for part in parts]
