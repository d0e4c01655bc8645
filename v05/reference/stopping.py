"""Whether a group is given another rollout: what that gains, and whether it is more than its cost."""

from __future__ import annotations

import math

from v05.methods import Calibration
from v05.reference.fusion import Calibrated, calibrated, energy_ratio


def osla_gain(count: int, squared_bias: float) -> float:
    """Fall of the estimated error D2/(k D2 + 1) if one more rollout is taken (arXiv 2603.10848, one-step look-ahead)."""
    if math.isinf(squared_bias):
        return 1 / (count * (count + 1)) if count else math.inf
    return squared_bias / (count * squared_bias + 1) - squared_bias / ((count + 1) * squared_bias + 1)


def osla_take_more(count: int, squared_bias: float, max_rollouts: int = 16, cost: float | None = None) -> bool:
    """Whether the budget rule takes one more rollout. `cost` None is 1 / max_rollouts^2."""
    cost = 1 / max_rollouts**2 if cost is None else cost
    return count < max_rollouts and osla_gain(count, squared_bias) > cost


def calibrated_gain(count: int, successes: float, prior: float, calibration: Calibration, further: int = 0) -> float:
    """Expected fall of the success rate's variance s2, centred units, if one more (binary) rollout is taken.

    After `further` rollouts that leave the success rate's mean m where it is, as of a Beta with the mean and the variance of now:
    s2 is then s2 / (1 + further s2 / (m (1 - m))).
    """
    now = calibrated(count, successes, prior, calibration)
    failure = calibrated(count + 1, successes, prior, calibration)
    success = calibrated(count + 1, successes + 1, prior, calibration)
    shrinks_by = 1 + further * now.variance / (now.baseline * (1 - now.baseline))
    return 4 * (now.variance - now.baseline * success.variance - (1 - now.baseline) * failure.variance) / shrinks_by**2


def calibrated_take_more(
    count: int, successes: float, prior: float, calibration: Calibration, max_rollouts: int = 16, cost: float | None = None
) -> bool:
    """Whether the calibrated budget rule takes one more rollout. `cost` None is 1 / max_rollouts^2."""
    cost = 1 / max_rollouts**2 if cost is None else cost
    return count < max_rollouts and calibrated_gain(count, successes, prior, calibration) > cost


def gradient_variance(belief: Calibrated, calibration: Calibration) -> float:
    """Variance of one rollout's gradient under the baseline of `least_variance`, as it is expected to be; centred units, w0 = 1.

        V(p) = p (1 - p) w1 w0 / (p w1 + (1 - p) w0)

    E[p (1 - p)] is exact. Of the other factor only the value at one rate is taken: at the mean of p under the weights p (1 - p),
    which is (a + 1) / (a + b + 2) for Beta(a, b). Here a and b are those of a Beta with the mean and the variance of p.
    """
    mean = belief.baseline
    total = mean * (1 - mean) / belief.variance - 1  # a + b
    rate = (mean * total + 1) / (total + 2)
    ratio = energy_ratio(rate, calibration)
    return 4 * (mean * (1 - mean) - belief.variance) * ratio / (rate * ratio + 1 - rate)


def variance_gain(count: int, successes: float, prior: float, calibration: Calibration, further: int = 0) -> float:
    """Fall of the variance of the mean of a group's gradients, V / k, if one more rollout is taken, after `further` ones that leave
    V where it is."""
    variance = gradient_variance(calibrated(count, successes, prior, calibration), calibration)
    k = count + further
    return variance / (k * (k + 1)) if k else math.inf


def fresh_prompt_gain(calibration: Calibration) -> float:
    """V of a prompt of whose success rate nothing is known: what its first rollout brings."""
    return gradient_variance(calibrated(0, 0.0, math.nan, calibration), calibration)


def variance_take_more(
    count: int, successes: float, prior: float, calibration: Calibration, max_rollouts: int = 16, cost: float | None = None
) -> bool:
    """Whether the budget rule of the gradient's variance takes one more rollout. `cost` None is that of a fresh prompt."""
    cost = fresh_prompt_gain(calibration) if cost is None else cost
    return count < max_rollouts and variance_gain(count, successes, prior, calibration) > cost
