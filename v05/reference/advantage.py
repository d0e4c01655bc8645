"""Advantages of rollouts and statistics of groups, group by group."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from v05.methods import Baseline, Calibration, Scale, find_method
from v05.reference.fusion import calibrated, conjugate, james_stein, least_variance, shrinkage
from v05.reference.stopping import calibrated_take_more, osla_take_more, variance_take_more


@dataclass(frozen=True)
class GroupStatistics:
    """The statistics of one group, as in `v05.ops.AdvantageStats`. A statistic that the method does not define is None.

    Attributes:
        count: the number of valid rollouts.
        mean, prior, baseline: reward units.
        var, mse: reward units squared; var has ddof = 1.
        weight, statistic, p_value, hallucination: dimensionless.
        take_more: whether the budget rule asks for another rollout.
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
        prior: (G,) value prior in reward units, NaN for a group without one.
        valid: (N,) bool; False rows do not count in the statistics and get advantage 0.
        trajectory_ids: (N,) ids; rows of a group with equal ids count once in the statistics.
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
        """The energy-weighted mean reward of the rows except `without`; NaN if their weights sum to 0."""
        terms = [(weights[i], weights[i] * r[i]) for i in rows]
        if without is not None:  # fsum is exact, so the row cancels to the last digit
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
            return 0.0  # known without the group
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
            if not others:  # a single group: its mean
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
            if alone:  # there is no baseline to subtract
                advantages[i] = r[i] if singleton == "raw" else 0.0
            else:
                advantages[i] = (r[i] - b) / divisor
    return advantages, statistics
