"""Baselines from a group's moments, what its batch says, and a prior."""

from __future__ import annotations

import math
from dataclasses import dataclass

from v05.methods import Calibration


@dataclass(frozen=True)
class Shrinkage:
    """V_0.5's fusion of a group mean with a prior, in the units of its arguments (arXiv 2603.10848, empirical shrinkage)."""

    baseline: float
    weight: float
    statistic: float
    p_value: float
    squared_bias: float
    mse: float


def shrinkage(count: int, mean: float, prior: float) -> Shrinkage:
    """Fuse the mean of `count` rollouts with the prior, both in centred units.

    The noise of the mean is taken as 1/count, the largest variance that a variable in [-1, 1] can have. A NaN prior is no prior:
    its squared bias is infinite and the mean stands. Without a rollout the prior stands.
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
    """Fuse `count` rewards scaled to [0, 1], `successes` their sum, with the prior: a Beta around it, mixed with a vague Beta.

        p | v ~ (1 - eps) Beta(kappa q, kappa (1 - q)) + eps Beta(1/2, 1/2),    q = sigmoid(alpha + beta logit v)

    v is kept within [0.005, 0.995]. A NaN prior is no prior: the vague component stands alone.
    (Robust mixture priors: Schmidli et al. 2014.)
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
    """Shrink the mean of a group's rollouts towards the mean of the other groups' means: (1 - l) mean + l others with
    l = v / (v + s) (James-Stein, arXiv 2511.03710).

    noise: v, how far chance alone moves such a mean: the mean over the groups of k >= 2 rollouts of var / (k - 1), or of var / k
    for the statistic, which leaves none out. spread: s = max(0, variance of the groups' means - mean of var / k); every group
    with a rollout has a part in that variance.

    A NaN mean is none, of a group of one rollout (or of none): the others stand, l = 1. NaN others are none: the mean stands.
    Without noise the mean stands, also where there is no spread either.
    """
    if math.isnan(mean) or math.isnan(others):
        return others if math.isnan(mean) else mean
    weight = noise / (noise + spread) if noise > 0 else 0.0
    return (1 - weight) * mean + weight * others


def least_variance(success: float, calibration: Calibration) -> float:
    """The baseline b for which E[(r - b)^2 E] is least, rewards scaled to [0, 1] and E a rollout's energy.

        b = E[r E] / E[E] = p w1 / (p w1 + (1 - p) w0),    log(w1 / w0) = delta0 + delta1 log(1 - p), within [-8, 8]

    p = `success` is what is believed of the success rate; w1, w0 are the mean energies of successes and of failures (Weaver & Tao
    2001; Greensmith, Bartlett & Baxter 2004).
    """
    ratio = energy_ratio(success, calibration)
    return success * ratio / (success * ratio + 1 - success)


def energy_ratio(success: float, calibration: Calibration) -> float:
    """w1 / w0 at this success rate."""
    shift = calibration.delta0 + calibration.delta1 * math.log(1 - success)
    return math.exp(min(max(shift, -8.0), 8.0))


def conjugate(count: int, mean: float, prior: float, kappa: float) -> float:
    """The mean of `count` rollouts fused with a prior that is worth `kappa` of them: (1 - S) mean + S prior, S = kappa / (count +
    kappa).

    EBPO (arXiv 2602.05165) has S = (s2 / k) / (s2 / k + tau2), which this is with kappa = s2 / tau2: the variance of rewards
    within a prompt over that of success rates among prompts. Without a rollout the prior stands, without a prior (NaN) the mean.
    """
    if count == 0 or math.isnan(prior):
        return mean if math.isnan(prior) else prior
    share = kappa / (count + kappa)
    return (1 - share) * mean + share * prior


def betaln(a: float, b: float) -> float:
    return math.lgamma(a) + math.lgamma(b) - math.lgamma(a + b)
