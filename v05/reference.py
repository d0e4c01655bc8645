"""The method as float64 NumPy: the executable specification that every fast path is tested against.

Read it top to bottom beside the papers. It favours the printed formula over speed and loops over groups in Python. What computes
never imports it; `v05 doctor` does, to check what computes. Statistics are in reward units; the formulas of V_0.5
(arXiv 2603.10848) are in centred units u = (2r - lo - hi) / (hi - lo), where a binary reward is +-1.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from v05.methods import Baseline, Calibration, Scale, find_method


@dataclass(frozen=True)
class GroupStatistics:
    """What is known of one group. A statistic that the method does not define is None.

    count: valid rollouts. mean, prior, baseline: reward units. var (ddof = 1), mse: reward units squared.
    weight, statistic, p_value, hallucination: dimensionless. take_more: the budget rule wants another rollout.
    """

    count: int
    mean: float
    var: float
    prior: float | None
    baseline: float
    weight: float | None = None
    statistic: float | None = None
    p_value: float | None = None
    hallucination: float | None = None
    mse: float | None = None
    take_more: bool | None = None


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


def osla_gain(count: int, squared_bias: float) -> float:
    """Fall of the estimated error D2/(k D2 + 1) if one more rollout is taken (arXiv 2603.10848, one-step look-ahead)."""
    if math.isinf(squared_bias):
        return 1 / (count * (count + 1)) if count else math.inf
    return squared_bias / (count * squared_bias + 1) - squared_bias / ((count + 1) * squared_bias + 1)


def osla_take_more(count: int, squared_bias: float, max_rollouts: int = 16, cost: float | None = None) -> bool:
    """Whether the budget rule takes one more rollout. `cost` None is 1 / max_rollouts^2."""
    cost = 1 / max_rollouts**2 if cost is None else cost
    return count < max_rollouts and osla_gain(count, squared_bias) > cost


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


def advantages(
    rewards: ArrayLike,
    group_ids: ArrayLike,
    prior: ArrayLike | None = None,
    *,
    valid: ArrayLike | None = None,
    trajectory_ids: ArrayLike | None = None,
    energy: ArrayLike | None = None,
    num_groups: int | None = None,
    method: str = "v05",
    scale: Scale | None = None,
    leave_one_out: bool = False,
    reward_range: tuple[float, float] = (0.0, 1.0),
    eps: float = 1e-6,
    singleton: str = "zero",
    max_rollouts: int = 16,
    cost: float | None = None,
    calibration: Calibration | None = None,
) -> tuple[NDArray[np.float64], list[GroupStatistics]]:
    """Advantages (N,) in reward units and the statistics of each group.

    Args:
        rewards: (N,) outcome rewards.
        group_ids: (N,) integers 0 .. G-1; `prior` and the returned statistics are indexed by them.
        prior: (G,) value prior in reward units, NaN where there is none.
        valid: (N,) bool; False rows are left out of the statistics and get advantage 0.
        trajectory_ids: (N,) rows of a group that share an id count once in the statistics.
        energy: (N,) weights of at least 0, for the methods that weigh rollouts.
        num_groups: G; None is the largest id + 1.
        others: as in `v05.ops.fused_advantage`.
    """
    rule = find_method(method)
    calibration = Calibration() if calibration is None else calibration
    scale = rule.scale if scale is None else scale
    leave_one_out = leave_one_out or rule.leave_one_out
    r = np.asarray(rewards, dtype=np.float64)
    ids = np.asarray(group_ids, dtype=np.int64)
    rows = np.arange(len(r))
    is_valid = np.ones(len(r), dtype=bool) if valid is None else np.asarray(valid, dtype=bool)
    trajectories = rows if trajectory_ids is None else np.asarray(trajectory_ids)
    groups = (int(ids.max()) + 1 if len(ids) else 0) if num_groups is None else num_groups
    v = np.full(groups, np.nan) if prior is None else np.asarray(prior, dtype=np.float64)
    lo, hi = reward_range
    half = (hi - lo) / 2

    def centred(x: float) -> float:
        return (2 * x - lo - hi) / (hi - lo)

    def uncentred(u: float) -> float:
        return (u + 1) * half + lo

    def scaled(x: float) -> float:
        return (x - lo) / (hi - lo)

    weights = np.zeros(len(r)) if energy is None else np.asarray(energy, dtype=np.float64)

    def weighted_mean(rows: list[int], without: int | None = None) -> float:
        """By energy, a row taken out; NaN where nothing is left."""
        terms = [(weights[i], weights[i] * r[i]) for i in rows]
        if without is not None:  # one exact sum: what is taken out cancels to the last digit
            terms.append((-weights[without], -weights[without] * r[without]))
        total = math.fsum(weight for weight, _ in terms)
        return math.fsum(weighted for _, weighted in terms) / total if total > 0 else math.nan

    def baseline_of(count: int, mean: float, successes: float, value: float) -> float:
        if rule.baseline is Baseline.CALIBRATED:
            return lo + (hi - lo) * calibrated(count, successes, scaled(value), calibration).baseline
        if rule.baseline is Baseline.LEAST_VARIANCE:
            success = calibrated(count, successes, scaled(value), calibration).baseline
            return lo + (hi - lo) * least_variance(success, calibration)
        if rule.baseline in (Baseline.GROUP_MEAN, Baseline.ENERGY_MEAN):
            return mean
        if rule.baseline in (Baseline.ZERO, Baseline.BATCH_MEAN, Baseline.BATCH_ENERGY_MEAN):
            return 0.0  # known before any group is looked at
        if rule.baseline is Baseline.CONJUGATE:
            return conjugate(count, mean, value, calibration.kappa)
        if rule.baseline is Baseline.PRIOR:
            return mean if math.isnan(value) else value
        return uncentred(shrinkage(count, centred(mean), centred(value)).baseline)

    # The rows that count in the statistics: the first valid row of each trajectory of a group.
    counted: list[list[int]] = []
    for g in range(groups):
        first: dict[object, int] = {}
        for i in rows[(ids == g) & is_valid]:
            first.setdefault(trajectories[i], int(i))
        counted.append(list(first.values()))

    everyone = [i for c in counted for i in c]
    everything = r[everyone] if counted else r
    batch_mean = float(np.mean(everything)) if len(everything) else math.nan
    means = {g: float(np.mean(r[c])) for g, c in enumerate(counted) if c}
    several = [r[c] for c in counted if len(c) > 1]
    noise = float(np.mean([np.var(x, ddof=1) / len(x) for x in several])) if several else math.nan
    noise_of_others = float(np.mean([np.var(x, ddof=1) / (len(x) - 1) for x in several])) if several else math.nan
    spread = max(0.0, float(np.var(list(means.values()), ddof=1)) - noise) if len(means) > 1 else 0.0
    advantages = np.zeros(len(r))
    statistics = []
    for g in range(groups):
        x = r[counted[g]]
        k = len(x)
        mean = float(np.mean(x)) if k else math.nan
        var = float(np.var(x, ddof=1)) if k > 1 else 0.0
        successes = math.fsum(map(scaled, x))
        others = [m for other, m in means.items() if other != g]
        other_groups = float(np.mean(others)) if others else math.nan
        baseline = baseline_of(k, mean, successes, v[g])
        if rule.baseline is Baseline.ENERGY_MEAN and not math.isnan(weighted := weighted_mean(counted[g])):
            baseline = weighted
        elif k == 0 and rule.baseline in (Baseline.GROUP_MEAN, Baseline.ENERGY_MEAN):
            baseline = v[g]
        elif rule.baseline is Baseline.BATCH_MEAN:
            baseline = batch_mean
        elif rule.baseline is Baseline.BATCH_ENERGY_MEAN:
            weighted = weighted_mean(everyone)
            baseline = batch_mean if math.isnan(weighted) else weighted
        elif rule.baseline is Baseline.ZERO:
            baseline = 0.0
        elif rule.baseline is Baseline.JAMES_STEIN:
            baseline = james_stein(mean if k > 1 else math.nan, other_groups, noise, spread)
            if not others:  # as of a group's mean
                baseline = mean if k else v[g]
        extra: dict[str, float | bool] = {}
        if rule.baseline is Baseline.SHRINKAGE:
            fused = shrinkage(k, centred(mean), centred(v[g]))
            extra = {
                "weight": fused.weight,
                "statistic": fused.statistic,
                "p_value": fused.p_value,
                "mse": fused.mse * half**2,
                "take_more": osla_take_more(k, fused.squared_bias, max_rollouts, cost),
            }
        if rule.is_calibrated:
            belief = calibrated(k, successes, scaled(v[g]), calibration)
            take_more = variance_take_more if rule.budget_rule == "variance" else calibrated_take_more
            extra = {
                "hallucination": belief.hallucination,
                "mse": belief.variance * (hi - lo) ** 2,
                "take_more": take_more(k, successes, scaled(v[g]), calibration, max_rollouts, cost),
            }
        statistics.append(GroupStatistics(k, mean, var, None if prior is None else v[g], baseline, **extra))  # type: ignore[arg-type]

        population = x if scale == "group" else everything
        divisor = 1.0
        if scale == "mean":
            divisor = mean if mean > 0 else 1.0
        elif scale != "none" and len(population) > 1 and np.any(population != population[0]):
            divisor = float(np.std(population, ddof=1)) + eps
        for i in rows[(ids == g) & is_valid]:
            if leave_one_out and k > 1:
                mean_of_others = mean + (mean - r[i]) / (k - 1)
                b = baseline_of(k - 1, mean_of_others, successes - scaled(r[i]), v[g])
            elif leave_one_out:
                b = baseline_of(0, math.nan, 0.0, v[g])
            else:
                b = baseline
            alone = k == 1 and (not rule.needs_prior or (math.isnan(v[g]) and not rule.is_calibrated))
            if leave_one_out and rule.baseline is Baseline.ENERGY_MEAN:
                if not math.isnan(weighted := weighted_mean(counted[g], without=int(i))):
                    b = weighted
            elif rule.baseline in (Baseline.BATCH_MEAN, Baseline.BATCH_ENERGY_MEAN):
                n = len(everything)
                alone = n == 1
                b = batch_mean + (batch_mean - r[i]) / (n - 1) if leave_one_out and n > 1 else batch_mean
                if rule.baseline is Baseline.BATCH_ENERGY_MEAN:
                    weighted = weighted_mean(everyone, without=int(i) if leave_one_out else None)
                    b = b if math.isnan(weighted) else weighted
            elif rule.baseline is Baseline.ZERO:
                alone, b = False, 0.0
            elif rule.baseline is Baseline.JAMES_STEIN:
                alone = k == 1 and not others
                b = james_stein(mean + (mean - r[i]) / (k - 1) if k > 1 else math.nan, other_groups, noise_of_others, spread)
            if alone:  # nothing to be compared with
                advantages[i] = r[i] if singleton == "raw" else 0.0
            else:
                advantages[i] = (r[i] - b) / divisor
    return advantages, statistics
