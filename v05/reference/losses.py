"""The policy loss, computed token by token in Python floats: the specification against which `v05.ops.policy_loss` is tested."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from v05.ops.policy_loss.losses import Importance, Loss, Surrogate

Row = Sequence[float]


def policy_loss(
    logprobs: Sequence[Row],
    old: Sequence[Row],
    advantages: Row,
    weights: Row,
    row: Loss,
    *,
    samplers: Sequence[Row] | None = None,
    importance: Importance | None = None,
    references: Sequence[Row] | None = None,
    kl_coefficient: float = 0.0,
    kl_estimator: str = "k3",
) -> tuple[float, list[NDArray[np.float64]], dict[str, float]]:
    """Return the loss, its gradient in every log-probability, and the figures by name, of N rollouts.

    Args:
        logprobs, old: for each rollout the log-probabilities of its tokens under the new and the old policy, nats.
        advantages: (N,).
        weights: (N,), the weight of each token of a rollout, as from `v05.ops.loss_weights`.
        row: a row of `LOSSES`, or a copy of one with other bounds.
        samplers, references: the same under the sampler and the reference policy; None if there is none.
        importance: required with `samplers`.
        kl_coefficient, kl_estimator: as in `v05.ops.policy_loss`.
    """
    loss, kl, gradients = 0.0, 0.0, []
    seen: dict[str, list[float]] = {name: [] for name in _MEANS}
    for i, (new_row, old_row) in enumerate(zip(logprobs, old, strict=True)):
        moved = [new - before for new, before in zip(new_row, old_row, strict=True)]
        gaps = None if samplers is None else [before - sampled for before, sampled in zip(old_row, samplers[i], strict=True)]
        gradient = np.zeros(len(moved))
        for t, step in enumerate(moved):
            log_ratio = step if row.ratio == "token" else sum(moved) / len(moved)
            ratio = math.exp(log_ratio)
            value, slope, clipped, dual = _surrogate(row, new_row[t], ratio, advantages[i])
            if gaps is not None:
                assert importance is not None
                by = math.exp(gaps[t] if importance.level == "token" else sum(gaps))
                weight, beyond = _bounded(importance, by)
                value, slope = value * weight, slope * weight
                for name, figure in (("importance", weight), ("beyond_fraction", beyond), ("mismatch", abs(gaps[t]))):
                    seen[name].append(figure)
            if references is not None:
                estimate, bend = _kl(references[i][t] - new_row[t], kl_estimator)
                value, slope = value + kl_coefficient * estimate, slope + kl_coefficient * bend
                kl += weights[i] * estimate
            loss += weights[i] * value
            gradient[t] = weights[i] * slope
            for name, figure in (("clip_fraction", clipped), ("dual_clip_fraction", dual), ("ratio", ratio), ("approx_kl", -step)):
                seen[name].append(figure)
        gradients.append(gradient)
    figures = {name: float(np.mean(values)) if values else math.nan for name, values in seen.items()}
    count = float(sum(len(values) for values in logprobs))
    return loss, gradients, {"tokens": count, "kl": math.nan if references is None else kl, **figures}


_MEANS = ("clip_fraction", "dual_clip_fraction", "ratio", "approx_kl", "importance", "beyond_fraction", "mismatch")


def _surrogate(row: Loss, logprob: float, ratio: float, advantage: float) -> tuple[float, float, bool, bool]:
    """(loss, its slope in the log-probability, whether clipped, whether dual-clipped) of a token."""
    low, high = 1 - row.clip_low, 1 + row.clip_high
    held = min(max(ratio, low), high)
    if row.surrogate == Surrogate.WEIGHTED:
        return -advantage * held * logprob, -advantage * held, held != ratio, False
    clipped = held * advantage < ratio * advantage
    value = -min(ratio * advantage, held * advantage)
    dual = advantage < 0 and value > -advantage * row.clip_dual
    if dual:
        value = -advantage * row.clip_dual
    return value, 0.0 if clipped or dual else -advantage * ratio, clipped, dual


def _bounded(importance: Importance, ratio: float) -> tuple[float, bool]:
    """(importance weight, whether the ratio is out of bounds)."""
    beyond = not importance.floor <= ratio <= importance.cap
    if not beyond:
        return ratio, False
    return 0.0 if importance.beyond == "mask" else min(max(ratio, importance.floor), importance.cap), True


def _kl(difference: float, estimator: str) -> tuple[float, float]:
    """(estimated divergence, its slope in the policy's log-probability) from the reference's log-probability minus the policy's."""
    if estimator == "k1":
        return -difference, 1.0
    if estimator == "k2":
        return difference**2 / 2, -difference
    return math.exp(difference) - difference - 1, 1 - math.exp(difference)
