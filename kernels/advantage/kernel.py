"""Fused advantages on the GPU: one launch computes advantages in any layout and group statistics from rewards.

Several programs share a group. Each computes the group's statistics, which takes a few loads that hit the cache and saves a second
launch. Then it writes the advantages of its share of the group's rows. Token rewards need a launch before this one,
`sum_token_rewards_kernel`, because otherwise every program of a group would sum all its tokens again. Nothing synchronises with the
host or has a data-dependent shape, so a call can be captured in a CUDA graph.
"""

from __future__ import annotations

import triton
import triton.language as tl

from v05.kernels.advantage.fusion import (
    BATCH_COUNT,
    BATCH_DIVISOR,
    BATCH_REWARD,
    BATCH_WEIGHT,
    BATCH_WEIGHTED,
    CALIBRATED,
    GROUPS_COUNT,
    GROUPS_MEAN,
    LEAST_VARIANCE,
    SHRINKAGE,
    baseline_of,
    believe,
    calibrated,
    calibrated_take_more,
    is_alone,
    least_variance,
    mean_without,
    osla_take_more,
    shrinkage,
    successes_of,
    variance_take_more,
)
from v05.kernels.advantage.moments import load_energy, load_rewards, moments, weighted_sums
from v05.kernels.advantage.tokens import fill_tokens, tokens_of

# v05.ops.advantage.options.SCALES and advantage.hpp have the same numbers.
UNSCALED = tl.constexpr(0)
GROUP_SCALE = tl.constexpr(1)
BATCH_SCALE = tl.constexpr(2)
MEAN_SCALE = tl.constexpr(3)

# The columns of the table. v05.ops.advantage.stats.STATISTICS and advantage.hpp have the same order.
COUNT = tl.constexpr(0)
NONFINITE = tl.constexpr(1)
CLIPPED = tl.constexpr(2)
MEAN = tl.constexpr(3)
VAR = tl.constexpr(4)
BASELINE_COLUMN = tl.constexpr(5)
MSE = tl.constexpr(6)
WEIGHT = tl.constexpr(7)
STATISTIC = tl.constexpr(8)
HALLUCINATION = tl.constexpr(9)
TAKE_MORE = tl.constexpr(10)


@triton.jit
def advantage_of(
    b_reward,
    b_usable,
    b_energy,
    count,
    mean,
    weight,
    weighted,
    prior,
    kappa,
    batch_count,
    batch_mean,
    other_groups,
    p_batch,
    p_groups,
    successes,
    all_ends,
    believed_a,
    believed_b,
    log_odds,
    delta0,
    delta1,
    divisor,
    low,
    high,
    BASELINE: tl.constexpr,
    LEAVE_ONE_OUT: tl.constexpr,
    RAW_SINGLETON: tl.constexpr,
):
    """Advantages of rollouts of a group, scalars or blocks; 0 for rollouts that are not usable."""
    IS_CALIBRATED: tl.constexpr = (BASELINE == CALIBRATED) | (BASELINE == LEAST_VARIANCE)
    if IS_CALIBRATED:
        if LEAVE_ONE_OUT:
            count = tl.maximum(count - 1, 0)
            b_scaled = (b_reward - low) / (high - low)
            successes = tl.minimum(tl.maximum(successes - b_scaled, 0.0), count.to(tl.float64))
        b_rate, b_complement, _, _ = calibrated(count, successes, all_ends, believed_a, believed_b, log_odds)
        if BASELINE == LEAST_VARIANCE:
            b_rate = least_variance(b_rate, b_complement, delta0, delta1)
        b_baseline = low + (high - low) * b_rate
    elif LEAVE_ONE_OUT:
        b_others = mean + (mean - b_reward) / tl.maximum(count - 1, 1).to(tl.float64)
        b_moved = weighted - b_energy * (b_reward - mean)
        b_energy_mean = energy_mean_of(mean, weight - b_energy, b_moved)
        b_batch_mean, b_batch_energy_mean = batch_mean, batch_mean
        if p_batch is not None:
            b_batch_mean = mean_without(b_reward, batch_count, batch_mean)
            b_moved = tl.load(p_batch + BATCH_WEIGHTED) - b_energy * (b_reward - batch_mean)
            b_batch_energy_mean = energy_mean_of(batch_mean, tl.load(p_batch + BATCH_WEIGHT) - b_energy, b_moved)
        b_baseline = baseline_of(
            BASELINE,
            True,
            count - 1,
            b_others,
            b_energy_mean,
            prior,
            kappa,
            b_batch_mean,
            b_batch_energy_mean,
            other_groups,
            p_groups,
            (high - low) / 2,
        )
    else:
        b_baseline = group_baseline(
            BASELINE, count, mean, weight, weighted, prior, kappa, batch_mean, other_groups, p_batch, p_groups, low, high
        )
    b_advantage = (b_reward - b_baseline) / divisor
    if not IS_CALIBRATED:
        alone = is_alone(BASELINE, count, prior, batch_count, other_groups)
        b_advantage = tl.where(alone, b_reward if RAW_SINGLETON else 0.0, b_advantage)
    return tl.where(b_usable, b_advantage, 0.0)


@triton.jit
def group_baseline(
    BASELINE: tl.constexpr, count, mean, weight, weighted, prior, kappa, batch_mean, other_groups, p_batch, p_groups, low, high
):
    """The baseline of a whole group, for any method except those with a calibrated prior."""
    energy_mean = energy_mean_of(mean, weight, weighted)
    batch_energy_mean = batch_mean
    if p_batch is not None:
        batch_energy_mean = energy_mean_of(batch_mean, tl.load(p_batch + BATCH_WEIGHT), tl.load(p_batch + BATCH_WEIGHTED))
    return baseline_of(
        BASELINE,
        False,
        count,
        mean,
        energy_mean,
        prior,
        kappa,
        batch_mean,
        batch_energy_mean,
        other_groups,
        p_groups,
        (high - low) / 2,
    )


@triton.jit
def energy_mean_of(mean, weight, weighted):
    """The energy-weighted mean; NaN if no rollout has an energy above 0."""
    return tl.where(weight > 0.0, mean + weighted / tl.where(weight > 0.0, weight, 1.0), float("nan"))


@triton.jit
def output_of(b_advantage, p_out):
    """The advantage in the dtype of `out`. bfloat16 is rounded via float32, as the compiler does but the interpreter does not."""
    if p_out.dtype.element_ty == tl.bfloat16:
        b_advantage = b_advantage.to(tl.float32)
    return b_advantage.to(p_out.dtype.element_ty)


@triton.jit(do_not_specialize=["G", "max_rollouts"])
def fused_advantage_kernel(
    p_rewards,  # (N,)
    p_offsets,  # (G + 1,) int64
    p_order,  # (N,) int64, or None if rows are contiguous
    p_prior,  # (G,) float64, or None
    p_mask,  # (N, T), or (N, words_of(T)) uint32 with one bit per token; or None
    p_cu_seqlens,  # (N + 1,) int64, or None
    p_valid,  # (N,) bool, or None if all rows are valid
    p_counted,  # (N,) bool, the rows that count in the statistics, or None if all valid rows do
    p_energy,  # (N,) float64, or None if the baseline does not read it
    p_batch,  # (5,) float64, see fusion.py; None without BATCH_SCALE and NEEDS_BATCH
    p_groups,  # (5,) float64, see fusion.py; None without NEEDS_GROUPS
    p_out,  # (N, T), (total_tokens,) or (N,)
    p_table,  # (v05.ops.advantage.stats.STATISTICS, G) float64, or None
    G,
    T,
    low: tl.float64,  # rewards and priors are clipped to [low, high]
    high: tl.float64,
    eps: tl.float64,
    max_rollouts,
    cost: tl.float64,
    alpha: tl.float64,  # alpha, beta and kappa of the calibration
    beta: tl.float64,
    kappa: tl.float64,
    log_odds: tl.float64,  # log odds that a prior is not hallucinated
    delta0: tl.float64,  # delta0 and delta1 of the calibration
    delta1: tl.float64,
    BASELINE: tl.constexpr,
    SCALE: tl.constexpr,
    LEAVE_ONE_OUT: tl.constexpr,
    RAW_SINGLETON: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_T: tl.constexpr,
):
    """Grid (G, splits of a group's rows, chunks of a row's tokens). The result is right for any number of splits and chunks."""
    group = tl.program_id(0).to(tl.int64)
    chunk = tl.program_id(2)
    first = tl.load(p_offsets + group)
    size = (tl.load(p_offsets + group + 1) - first).to(tl.int32)
    prior = tl.full((), float("nan"), tl.float64)
    if p_prior is not None:
        prior = tl.load(p_prior + group)
    rows_each = tl.cdiv(size, tl.num_programs(1))
    split = tl.program_id(1)
    begin = split * rows_each  # this program has the rollouts begin .. end - 1
    end = tl.minimum(begin + rows_each, size)
    PER_ROLLOUT: tl.constexpr = p_mask is None and p_cu_seqlens is None
    if not PER_ROLLOUT:
        row, t_start, t_stop, b_mask = tokens_of(p_order, p_mask, p_cu_seqlens, first + begin, begin < end, T, chunk, BLOCK_T)

    count, mean, m2, all_equal, nonfinite, clipped, all_ends = moments(
        p_rewards, p_order, p_valid, p_counted, first, size, low, high, BLOCK_ROWS
    )
    variance = m2 / tl.maximum(count - 1, 1).to(tl.float64)

    if p_prior is not None:
        clipped += ((prior < low) | (prior > high)).to(tl.int64)
        prior = tl.where(prior < low, low, tl.where(prior > high, high, prior))

    successes = tl.full((), 0.0, tl.float64)
    believed_a, believed_b, believed_log_odds = successes, successes, successes
    IS_CALIBRATED: tl.constexpr = (BASELINE == CALIBRATED) | (BASELINE == LEAST_VARIANCE)
    if IS_CALIBRATED:
        successes = successes_of(count, mean, low, high)
        scaled_prior = (prior - low) / (high - low)
        believed_a, believed_b, believed_log_odds = believe(scaled_prior, alpha, beta, kappa, log_odds)

    weight, weighted = tl.full((), 0.0, tl.float64), tl.full((), 0.0, tl.float64)
    if p_energy is not None:
        weight, weighted = weighted_sums(p_rewards, p_order, p_valid, p_counted, p_energy, first, size, mean, low, high, BLOCK_ROWS)
    batch_count, batch_mean = tl.full((), 0.0, tl.float64), tl.full((), float("nan"), tl.float64)
    other_groups = batch_mean
    if p_batch is not None:
        batch_count, batch_mean = tl.load(p_batch + BATCH_COUNT), tl.load(p_batch + BATCH_REWARD)
    if p_groups is not None:
        mean_of_means = tl.load(p_groups + GROUPS_MEAN)
        without_own = mean_without(mean, tl.load(p_groups + GROUPS_COUNT), mean_of_means)
        other_groups = tl.where(count > 0, without_own, mean_of_means)

    divisor = tl.full((), 1.0, tl.float64)
    if SCALE == GROUP_SCALE:
        divisor = tl.sqrt(variance) + eps
        divisor = tl.where(all_equal | (divisor == 0.0), 1.0, divisor)  # 0 if eps is 0 and squares underflow
    if SCALE == MEAN_SCALE:
        divisor = tl.where(mean > 0.0, mean, 1.0)
    if SCALE == BATCH_SCALE:
        divisor = tl.load(p_batch + BATCH_DIVISOR)

    if p_table is not None:
        # The stride of columns. Each address adds `group` last: keeping p_table + group in registers across the calibrated fusion
        # would cost 8 registers and a sixth of the resident warps.
        column = G.to(tl.int64)
        if (split == 0) & (chunk == 0):
            tl.store(p_table + COUNT * column + group, count.to(tl.float64))
            tl.store(p_table + NONFINITE * column + group, nonfinite.to(tl.float64))
            tl.store(p_table + CLIPPED * column + group, clipped.to(tl.float64))
            tl.store(p_table + MEAN * column + group, mean)
            tl.store(p_table + VAR * column + group, variance)
            if IS_CALIBRATED:
                rate, complement, rate_variance, hallucination = calibrated(
                    count, successes, all_ends, believed_a, believed_b, believed_log_odds
                )
                baseline = rate
                if BASELINE == LEAST_VARIANCE:
                    baseline = least_variance(rate, complement, delta0, delta1)
                tl.store(p_table + BASELINE_COLUMN * column + group, low + (high - low) * baseline)
                tl.store(p_table + MSE * column + group, rate_variance * (high - low) * (high - low))
                tl.store(p_table + HALLUCINATION * column + group, hallucination)
                if BASELINE == LEAST_VARIANCE:
                    k = count.to(tl.float64)
                    more = variance_take_more(k, rate, complement, rate_variance, delta0, delta1, max_rollouts, cost)
                else:
                    more = calibrated_take_more(count, rate, complement, rate_variance, max_rollouts, cost)
                tl.store(p_table + TAKE_MORE * column + group, more.to(tl.float64))
            else:
                baseline = group_baseline(
                    BASELINE, count, mean, weight, weighted, prior, kappa, batch_mean, other_groups, p_batch, p_groups, low, high
                )
                tl.store(p_table + BASELINE_COLUMN * column + group, baseline)
            if BASELINE == SHRINKAGE:
                _, shrinkage_weight, statistic, squared_bias, mse = shrinkage(count, mean, prior, (high - low) / 2)
                tl.store(p_table + MSE * column + group, mse)
                tl.store(p_table + WEIGHT * column + group, shrinkage_weight)
                tl.store(p_table + STATISTIC * column + group, statistic)
                more = osla_take_more(count, squared_bias, max_rollouts, cost)
                tl.store(p_table + TAKE_MORE * column + group, more.to(tl.float64))

    for start in range(begin, end, BLOCK_ROWS):
        b_member = start + tl.arange(0, BLOCK_ROWS)
        b_inside = b_member < end
        b_row, b_reward, b_usable, _, _ = load_rewards(p_rewards, p_order, p_valid, first + b_member, b_inside, low, high)
        b_energy = load_energy(p_energy, b_row, b_inside) if p_energy is not None else b_reward * 0.0
        b_advantage = advantage_of(
            b_reward,
            b_usable,
            b_energy,
            count,
            mean,
            weight,
            weighted,
            prior,
            kappa,
            batch_count,
            batch_mean,
            other_groups,
            p_batch,
            p_groups,
            successes,
            all_ends,
            believed_a,
            believed_b,
            believed_log_odds,
            delta0,
            delta1,
            divisor,
            low,
            high,
            BASELINE,
            LEAVE_ONE_OUT,
            RAW_SINGLETON,
        )
        b_advantage = output_of(b_advantage, p_out)
        if PER_ROLLOUT:
            tl.store(p_out + b_row, b_advantage, mask=b_inside)
        else:
            for member in range(start, tl.minimum(start + BLOCK_ROWS, end)):
                next_row, next_start, next_stop, b_next_mask = tokens_of(
                    p_order, p_mask, p_cu_seqlens, first + member + 1, member + 1 < end, T, chunk, BLOCK_T
                )
                advantage = tl.sum(tl.where(b_member == member, b_advantage, 0.0))
                fill_tokens(p_out, p_mask, row, t_start, t_stop, b_mask, T, advantage, chunk, tl.num_programs(2), BLOCK_T)
                row, t_start, t_stop, b_mask = next_row, next_start, next_stop, b_next_mask
