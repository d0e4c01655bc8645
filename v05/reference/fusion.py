"""Baselines from the moments of a group, the other groups of its batch, and a prior."""

from __future__ import annotations

import math
from dataclasses import dataclass

from v05.methods import Calibration


@dataclass(frozen=True)
class Shrinkage:
    """The result of `shrinkage`, in centred units: the fusion of a group mean with a prior (arXiv 2603.10848)."""

    baseline: float
    weight: float
    statistic: float
    p_value: float
    squared_bias: float
    mse: float


def shrinkage(count: int, mean: float, prior: float) -> Shrinkage:
    """Fuse the mean of `count` rollouts with the prior, both in centred units.

    The variance of the mean is taken as 1/count, because a variable in [-1, 1] has a variance of at most 1. Without a prior (NaN)
    the squared bias is infinite and the baseline is the mean. Without a rollout the baseline is the prior.

    Source: empirical shrinkage, arXiv 2603.10848.
    """
    if math.isnan(prior):
        noise = 1 / count if count else math.nan
        return Shrinkage(mean, 1.0, math.nan, math.nan, math.inf, noise)
    if count == 0:
        return Shrinkage(prior, 0.0, math.nan, math.nan, 0.0, math.nan)
    difference = mean - prior
    statistic = count * difference**2
    squared_bias = max(0.0, difference**2 - 1 / count)
    weight = max(0.0, 1 - 1 / statistic) if statistic > 1 else 0.0
    return Shrinkage(
        baseline=prior + weight * difference,
        weight=weight,
        statistic=statistic,
        p_value=math.erfc(math.sqrt(statistic / 2)),
        squared_bias=squared_bias,
        mse=weight / count,
    )


@dataclass(frozen=True)
class Calibrated:
    """What is believed of a group's success rate. baseline, variance: its mean and variance, rewards scaled to [0, 1].

    hallucination: probability that the prior says nothing here.
    """

    baseline: float
    variance: float
    hallucination: float


def calibrated(count: int, successes: float, prior: float, calibration: Calibration) -> Calibrated:
    """Fuse the rewards of a group with its prior v, read as a mixture of a Beta around v and a vague Beta.

        p | v ~ (1 - eps) Beta(kappa q, kappa (1 - q)) + eps Beta(1/2, 1/2),    q = sigmoid(alpha + beta logit v)

    `successes` is the sum of the `count` rewards, scaled to [0, 1] like the prior. v is clipped to [0.005, 0.995]. Without a prior
    (NaN) only the vague component is used.

    Source: robust mixture priors, Schmidli et al. 2014.
    """

    def component(a: float, b: float) -> tuple[float, float, float]:
        evidence = betaln(successes + a, count - successes + b) - betaln(a, b)
        a, b = successes + a, count - successes + b
        return evidence, a / (a + b), a * b / ((a + b) ** 2 * (a + b + 1))

    log_m0, vague, vague_variance = component(0.5, 0.5)
    if math.isnan(prior):
        return Calibrated(vague, vague_variance, 1.0)
    v = min(max(prior, 0.005), 0.995)
    q = 1 / (1 + math.exp(-calibration.alpha - calibration.beta * math.log(v / (1 - v))))
    log_m1, informed, informed_variance = component(calibration.kappa * q, calibration.kappa * (1 - q))
    odds = (1 - calibration.eps) / calibration.eps * math.exp(log_m1 - log_m0)
    w0 = 1 / (1 + odds)
    mean = (1 - w0) * informed + w0 * vague
    variance = (1 - w0) * (informed_variance + (informed - mean) ** 2) + w0 * (vague_variance + (vague - mean) ** 2)
    return Calibrated(mean, variance, w0)


def james_stein(mean: float, others: float, noise: float, spread: float) -> float:
    """Shrink the mean of a group towards the mean of the other groups' means: (1 - l) mean + l others with l = v / (v + s).

    Args:
        mean: the group's mean, usually leave-one-out. NaN if there is none (a group of one rollout); the baseline is then `others`.
        others: the mean of the other groups' means. NaN if there is none; the baseline is then `mean`.
        noise: v, the variance of such a mean by chance, averaged over the groups of k >= 2 rollouts: var / (k - 1) for a
            leave-one-out mean, var / k for the statistic, whose mean leaves none out. If v is 0 the baseline is `mean`.
        spread: s = max(0, variance of the groups' means - average of var / k), over all groups with a rollout.

    Source: James-Stein, arXiv 2511.03710.
    """
    if math.isnan(mean) or math.isnan(others):
        return others if math.isnan(mean) else mean
    weight = noise / (noise + spread) if noise > 0 else 0.0
    return (1 - weight) * mean + weight * others


def least_variance(success: float, calibration: Calibration) -> float:
    """The baseline b that minimises E[(r - b)^2 E], with rewards r scaled to [0, 1] and E the energy of a rollout.

        b = E[r E] / E[E] = p w1 / (p w1 + (1 - p) w0),    log(w1 / w0) = delta0 + delta1 log(1 - p), clipped to [-8, 8]

    p = `success` is the estimated success rate; w1 and w0 are the mean energies of successes and of failures.

    Source: Weaver & Tao 2001; Greensmith, Bartlett & Baxter 2004.
    """
    ratio = energy_ratio(success, calibration)
    return success * ratio / (success * ratio + 1 - success)


def energy_ratio(success: float, calibration: Calibration) -> float:
    """w1 / w0, the mean energy of successes over that of failures, at this success rate."""
    shift = calibration.delta0 + calibration.delta1 * math.log(1 - success)
    return math.exp(min(max(shift, -8.0), 8.0))


def conjugate(count: int, mean: float, prior: float, kappa: float) -> float:
    """Fuse the mean of `count` rollouts with a prior that is worth `kappa` rollouts: (1 - S) mean + S prior, S = kappa / (count +
    kappa).

    EBPO (arXiv 2602.05165) has S = (s2 / k) / (s2 / k + tau2), where s2 is the variance of rewards within a prompt and tau2 that of
    success rates among prompts. This is the same with kappa = s2 / tau2. Without a rollout the baseline is the prior, without a
    prior (NaN) it is the mean.
    """
    if count == 0 or math.isnan(prior):
        return mean if math.isnan(prior) else prior
    share = kappa / (count + kappa)
    return (1 - share) * mean + share * prior


def betaln(a: float, b: float) -> float:
    return math.lgamma(a) + math.lgamma(b) - math.lgamma(a + b)
