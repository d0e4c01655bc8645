"""Moments of a group's rewards on the GPU."""

import triton
import triton.language as tl


@triton.jit
def load_rewards(p_rewards, p_order, p_valid, position, inside, low, high):
    """(row, reward, usable, nonfinite, clipped) of the rollouts at `position`; rewards are clipped to [low, high]."""
    b_row = tl.load(p_order + position, mask=inside, other=0) if p_order is not None else position
    b_valid = inside
    if p_valid is not None:
        b_valid = inside & (tl.load(p_valid + b_row, mask=inside, other=0) != 0)
    b_reward = tl.load(p_rewards + b_row, mask=b_valid, other=0.0).to(tl.float64)
    b_usable = b_valid & (tl.abs(b_reward) < float("inf"))
    b_clipped = b_usable & ((b_reward < low) | (b_reward > high))
    b_reward = tl.where(b_reward < low, low, tl.where(b_reward > high, high, b_reward))
    return b_row, b_reward, b_usable, b_valid & ~b_usable, b_clipped


@triton.jit
def load_statistics_rewards(p_rewards, p_order, p_valid, p_counted, position, inside, low, high):
    """(reward, counted, nonfinite, clipped, between) of the rollouts at `position`.

    `counted` marks usable rollouts that count in the statistics, `between` usable rollouts whose reward is neither low nor high.
    """
    b_row, b_reward, b_usable, b_nonfinite, b_clipped = load_rewards(p_rewards, p_order, p_valid, position, inside, low, high)
    b_counted = b_usable
    if p_counted is not None:
        b_counted = b_usable & (tl.load(p_counted + b_row, mask=inside, other=0) != 0)
    return b_reward, b_counted, b_nonfinite, b_clipped, b_usable & (b_reward != low) & (b_reward != high)


@triton.jit
def moments(p_rewards, p_order, p_valid, p_counted, first, size, low, high, BLOCK_ROWS: tl.constexpr):
    """(count, mean, m2, all_equal, nonfinite, clipped, all_ends) of the rollouts at positions first .. first + size - 1.

    m2 is the sum of squared deviations from the mean. all_ends means that every usable reward is low or high.

    There are two passes, so that rewards near 1e4 with a spread of 1e-3 keep their digits. The mean of equal rewards is exactly
    that reward. The first block of rewards, which holds all of most groups, stays in registers for the second pass.
    """
    b_member = tl.arange(0, BLOCK_ROWS)
    b_first, b_first_counted, b_nonfinite, b_clipped, b_between = load_statistics_rewards(
        p_rewards, p_order, p_valid, p_counted, first + b_member, b_member < size, low, high
    )
    b_count = b_first_counted.to(tl.int32)
    b_nonfinite, b_clipped, b_between = b_nonfinite.to(tl.int32), b_clipped.to(tl.int32), b_between.to(tl.int32)
    b_sum = tl.where(b_first_counted, b_first, 0.0)
    b_smallest = tl.where(b_first_counted, b_first, float("inf"))
    b_largest = tl.where(b_first_counted, b_first, float("-inf"))
    for start in range(BLOCK_ROWS, size, BLOCK_ROWS):
        member = start + tl.arange(0, BLOCK_ROWS)
        b_reward, b_counted, nonfinite, clipped, between = load_statistics_rewards(
            p_rewards, p_order, p_valid, p_counted, first + member, member < size, low, high
        )
        b_count += b_counted.to(tl.int32)
        b_nonfinite += nonfinite.to(tl.int32)
        b_clipped += clipped.to(tl.int32)
        b_between += between.to(tl.int32)
        b_sum += tl.where(b_counted, b_reward, 0.0)
        b_smallest = tl.where(b_counted & (b_reward < b_smallest), b_reward, b_smallest)
        b_largest = tl.where(b_counted & (b_reward > b_largest), b_reward, b_largest)
    count = tl.sum(b_count).to(tl.int64)
    smallest = tl.min(b_smallest)
    all_equal = smallest >= tl.max(b_largest)
    mean = tl.where(all_equal, smallest, tl.sum(b_sum) / tl.maximum(count, 1).to(tl.float64))
    mean = tl.where(count == 0, float("nan"), mean)

    b_deviation = tl.where(b_first_counted, b_first - mean, 0.0)
    b_m2 = b_deviation * b_deviation
    for start in range(BLOCK_ROWS, size, BLOCK_ROWS):
        member = start + tl.arange(0, BLOCK_ROWS)
        b_reward, b_counted, _, _, _ = load_statistics_rewards(
            p_rewards, p_order, p_valid, p_counted, first + member, member < size, low, high
        )
        b_deviation = tl.where(b_counted, b_reward - mean, 0.0)
        b_m2 += b_deviation * b_deviation
    nonfinite, clipped = tl.sum(b_nonfinite).to(tl.int64), tl.sum(b_clipped).to(tl.int64)
    return count, mean, tl.sum(b_m2), all_equal, nonfinite, clipped, tl.sum(b_between) == 0


@triton.jit
def weighted_sums(p_rewards, p_order, p_valid, p_counted, p_energy, first, size, mean, low, high, BLOCK_ROWS: tl.constexpr):
    """(sum of energies, sum of energy * (reward - mean)) of the rollouts that count.

    Energies that are not positive and finite count as 0.
    """
    b_weight = tl.zeros((BLOCK_ROWS,), tl.float64)
    b_weighted = tl.zeros((BLOCK_ROWS,), tl.float64)
    for start in range(0, size, BLOCK_ROWS):
        member = start + tl.arange(0, BLOCK_ROWS)
        inside = member < size
        b_reward, b_counted, _, _, _ = load_statistics_rewards(
            p_rewards, p_order, p_valid, p_counted, first + member, inside, low, high
        )
        b_row = tl.load(p_order + first + member, mask=inside, other=0) if p_order is not None else first + member
        b_energy = tl.where(b_counted, load_energy(p_energy, b_row, inside), 0.0)
        b_weight += b_energy
        b_weighted += tl.where(b_counted, b_energy * (b_reward - mean), 0.0)
    return tl.sum(b_weight), tl.sum(b_weighted)


@triton.jit
def load_energy(p_energy, row, inside):
    b_energy = tl.load(p_energy + row, mask=inside, other=0.0)
    return tl.where((b_energy > 0.0) & (b_energy < float("inf")), b_energy, 0.0)


@triton.jit
def group_moments_kernel(
    p_rewards,  # (N,)
    p_offsets,  # (G + 1,) int64
    p_order,  # (N,) int64, or None if rows are contiguous
    p_valid,  # (N,) bool, or None if all rows are valid
    p_counted,  # (N,) bool, or None if all valid rows count
    p_moments,  # (3, G) float64: count, mean and variance (ddof = 1)
    low: tl.float64,
    high: tl.float64,
    BLOCK_ROWS: tl.constexpr,
):
    """The moments of every group, for baselines that read the moments of other groups. Grid (G,)."""
    group = tl.program_id(0).to(tl.int64)
    groups = tl.num_programs(0).to(tl.int64)
    first = tl.load(p_offsets + group)
    size = (tl.load(p_offsets + group + 1) - first).to(tl.int32)
    count, mean, m2, _, _, _, _ = moments(p_rewards, p_order, p_valid, p_counted, first, size, low, high, BLOCK_ROWS)
    tl.store(p_moments + group, count.to(tl.float64))
    tl.store(p_moments + groups + group, mean)
    tl.store(p_moments + 2 * groups + group, m2 / tl.maximum(count - 1, 1).to(tl.float64))
