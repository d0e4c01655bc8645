"""Budget rules: the gain from another rollout of a group, and whether it exceeds the cost."""

from __future__ import annotations

import math

from v05.methods import Calibration
from v05.reference.fusion import Calibrated, calibrated, energy_ratio


def osla_gain(count: int, squared_bias: float) -> float:
    """One-step look-ahead (arXiv 2603.10848): the decrease of the error D2/(k D2 + 1), centred units, with one more rollout."""
    if math.isinf(squared_bias):
        return 1 / (count * (count + 1)) if count else math.inf
    return squared_bias / (count * squared_bias + 1) - squared_bias / ((count + 1) * squared_bias + 1)


def osla_take_more(count: int, squared_bias: float, max_rollouts: int = 16, cost: float | None = None) -> bool:
    """Whether rule "osla" takes one more rollout. A `cost` of None is 1 / max_rollouts^2."""
    cost = 1 / max_rollouts**2 if cost is None else cost
    return count < max_rollouts and osla_gain(count, squared_bias) > cost


def calibrated_gain(count: int, successes: float, prior: float, calibration: Calibration, further: int = 0) -> float:
    """The expected decrease of the posterior variance s2 of the success rate, centred units, with one more binary rollout.

    With `further` > 0 it is the gain after so many other rollouts, which are assumed to leave the posterior mean m unchanged. For a
    Beta with the present mean and variance, s2 is then s2 / (1 + further s2 / (m (1 - m))).
    """
    now = calibrated(count, successes, prior, calibration)
    failure = calibrated(count + 1, successes, prior, calibration)
    success = calibrated(count + 1, successes + 1, prior, calibration)
    shrinks_by = 1 + further * now.variance / (now.baseline * (1 - now.baseline))
    return 4 * (now.variance - now.baseline * success.variance - (1 - now.baseline) * failure.variance) / shrinks_by**2


def calibrated_take_more(
    count: int, successes: float, prior: float, calibration: Calibration, max_rollouts: int = 16, cost: float | None = None
) -> bool:
    """Whether rule "calibrated" takes one more rollout. A `cost` of None is 1 / max_rollouts^2."""
    cost = 1 / max_rollouts**2 if cost is None else cost
    return count < max_rollouts and calibrated_gain(count, successes, prior, calibration) > cost


def gradient_variance(belief: Calibrated, calibration: Calibration) -> float:
    """The expected variance V of one rollout's gradient under the baseline of `least_variance`; centred units, w0 = 1.

        V(p) = p (1 - p) w1 w0 / (p w1 + (1 - p) w0)

    The expectation of p (1 - p) is exact. The other factor is evaluated at one rate only: the mean of p weighted by p (1 - p),
    which for Beta(a, b) is (a + 1) / (a + b + 2). Here Beta(a, b) has the mean and the variance of the belief about p.
    """
    mean = belief.baseline
    total = mean * (1 - mean) / belief.variance - 1  # a + b
    rate = (mean * total + 1) / (total + 2)
    ratio = energy_ratio(rate, calibration)
    return 4 * (mean * (1 - mean) - belief.variance) * ratio / (rate * ratio + 1 - rate)


def variance_gain(count: int, successes: float, prior: float, calibration: Calibration, further: int = 0) -> float:
    """The decrease of V / k, the variance of the mean of a group's k gradients, with one more rollout.

    With `further` > 0 it is the gain after so many other rollouts, which are assumed to leave V unchanged.
    """
    variance = gradient_variance(calibrated(count, successes, prior, calibration), calibration)
    k = count + further
    return variance / (k * (k + 1)) if k else math.inf


def fresh_prompt_gain(calibration: Calibration) -> float:
    """V of a prompt with the vague prior, which is the gain from its first rollout."""
    return gradient_variance(calibrated(0, 0.0, math.nan, calibration), calibration)


def variance_take_more(
    count: int, successes: float, prior: float, calibration: Calibration, max_rollouts: int = 16, cost: float | None = None
) -> bool:
    """Whether rule "variance" takes one more rollout. A `cost` of None is `fresh_prompt_gain`."""
    cost = fresh_prompt_gain(calibration) if cost is None else cost
    return count < max_rollouts and variance_gain(count, successes, prior, calibration) > cost
