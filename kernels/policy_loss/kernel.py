"""The policy loss on the GPU: the loss, its gradient in every token's log-probability and its figures, in one launch.

A program handles the tokens of one rollout, so the rollout's advantage and weight are scalars and are never expanded to (N, T).
Each program writes its sums to a row of scratch memory. The program that finishes last adds up the rows in order, so the result
does not depend on which program that is.
"""

from __future__ import annotations

import triton
import triton.language as tl

# v05.ops.policy_loss.losses has the same numbers.
CLIPPED = tl.constexpr(0)
WEIGHTED = tl.constexpr(1)
OF_TOKENS = tl.constexpr(1)
OF_SEQUENCES = tl.constexpr(2)
K1 = tl.constexpr(1)
K2 = tl.constexpr(2)
FARTHEST = tl.constexpr(20.0)

# The sums of a program: the loss, then v05.ops.policy_loss.compute.FIGURES in that order.
LOSS = tl.constexpr(0)
TOKENS = tl.constexpr(1)
KL = tl.constexpr(2)
CLIP = tl.constexpr(3)
DUAL_CLIP = tl.constexpr(4)
RATIO = tl.constexpr(5)
APPROX_KL = tl.constexpr(6)
IMPORTANCE = tl.constexpr(7)
BEYOND = tl.constexpr(8)
MISMATCH = tl.constexpr(9)
SUMS = tl.constexpr(10)
SUMS_BLOCK = tl.constexpr(16)  # a power of 2 of at least SUMS
ROWS_BLOCK = tl.constexpr(128)  # rows of scratch that the last program adds up at once


@triton.jit
def bounded_exp(b_x):
    """exp of log-ratios that are clipped to +-FARTHEST; NaN stays NaN."""
    b_x = tl.where(b_x > FARTHEST, FARTHEST, b_x)
    return tl.exp(tl.where(b_x < -FARTHEST, -FARTHEST, b_x))


@triton.jit
def load_tokens(p_values, t, inside):
    return tl.load(p_values + t, mask=inside, other=0.0)


@triton.jit
def is_inside(p_mask, t, readable):
    """Whether each token counts."""
    b_inside = readable
    if p_mask is not None:
        b_inside &= tl.load(p_mask + t, mask=readable, other=0) == 1
    return b_inside


@triton.jit
def edge_tokens(start, stop):
    """(t, whether each t is in start .. stop - 1) of the up to 15 tokens on either side of the body of a rollout.

    The body begins and ends at multiples of 16, and the compiler can see that. So it uses 128-bit accesses wherever the rollout
    starts.
    """
    lane = tl.arange(0, 32)
    body_start = (start + 15) // 16 * 16
    tail_start = tl.maximum(body_start, stop // 16 * 16)
    t = tl.where(lane < 16, start + lane, tail_start + lane - 16)
    return t, t < tl.where(lane < 16, tl.minimum(body_start, stop), stop)


@triton.jit
def fold(b_values):
    """Sums of 4 neighbouring values, which a thread loads together, so that they take one register."""
    return tl.sum(tl.reshape(b_values, (b_values.shape[0] // 4, 4)), axis=1)


@triton.jit
def moves_of(p_logprob, p_old, p_sampler, p_mask, t, b_mine):
    """Folded (number of tokens that count, new minus old, old minus sampler) of log-probabilities."""
    b_inside = is_inside(p_mask, t, b_mine)
    b_old = load_tokens(p_old, t, b_mine)
    b_moved = tl.where(b_inside, load_tokens(p_logprob, t, b_mine) - b_old, 0.0)
    b_gap = tl.zeros_like(b_moved)
    if p_sampler is not None:
        b_gap = tl.where(b_inside, b_old - load_tokens(p_sampler, t, b_mine), 0.0)
    return fold(b_inside.to(tl.float32)), fold(b_moved), fold(b_gap)


@triton.jit
def moves_of_rollout(p_logprob, p_old, p_sampler, p_mask, start, stop, EDGES: tl.constexpr, BLOCK_T: tl.constexpr):
    """(number of tokens that count, sum of new minus old, sum of old minus sampler) of a rollout."""
    b_count = tl.zeros((BLOCK_T // 4,), tl.float32)
    b_moved, b_gap = b_count, b_count
    for block in range((start + 15) // 16 * 16, stop // 16 * 16, BLOCK_T):
        t = block + tl.arange(0, BLOCK_T)
        b_more, b_farther, b_wider = moves_of(p_logprob, p_old, p_sampler, p_mask, t, t < stop // 16 * 16)
        b_count += b_more
        b_moved += b_farther
        b_gap += b_wider
    count, moved, gap = tl.sum(b_count), tl.sum(b_moved), tl.sum(b_gap)
    if EDGES:
        t, b_mine = edge_tokens(start, stop)
        b_more, b_farther, b_wider = moves_of(p_logprob, p_old, p_sampler, p_mask, t, b_mine)
        count += tl.sum(b_more)
        moved += tl.sum(b_farther)
        gap += tl.sum(b_wider)
    return count, moved, gap


@triton.jit
def surrogate(b_logprob, b_log_ratio, advantage, low, high, dual, SURROGATE: tl.constexpr):
    """For each token: (loss, its slope in the log-probability, whether clipped, whether dual-clipped, ratio)."""
    b_ratio = bounded_exp(b_log_ratio)
    b_below, b_above = b_ratio < low, b_ratio > high
    if SURROGATE == WEIGHTED:
        b_factor = tl.where(b_above, high, tl.where(b_below, low, b_ratio))
        b_slope = -advantage * b_factor
        return b_slope * b_logprob, b_slope, b_below | b_above, b_below & b_above, b_ratio
    rises = advantage >= 0
    b_stopped = tl.where(rises, b_above, b_below)
    b_factor = tl.where(b_stopped, tl.where(rises, high, low), b_ratio)
    b_dual = b_factor > tl.where(rises, float("inf"), dual)
    b_factor = tl.where(b_dual, dual, b_factor)
    b_free = -advantage * b_ratio
    b_slope = tl.where(b_stopped | b_dual | (tl.abs(b_log_ratio) > FARTHEST), 0.0, b_free)
    return -advantage * b_factor, b_slope, b_stopped & (b_free != 0), b_dual, b_ratio


@triton.jit
def importance_of(b_log_ratio, cap, floor, MASKS_BEYOND: tl.constexpr):
    """(weights, whether out of bounds) from the log-ratio of the old policy to the sampler."""
    b_ratio = bounded_exp(b_log_ratio)
    b_beyond = (b_ratio > cap) | (b_ratio < floor)
    if MASKS_BEYOND:
        return tl.where(b_beyond, 0.0, b_ratio), b_beyond
    return tl.where(b_ratio > cap, cap, tl.where(b_ratio < floor, floor, b_ratio)), b_beyond


@triton.jit
def kl_of(b_difference, ESTIMATOR: tl.constexpr):
    """(estimated divergence, its slope in the policy's log-probability) from the reference's log-probability minus the policy's."""
    if ESTIMATOR == K1:
        return -b_difference, b_difference * 0.0 + 1.0
    if ESTIMATOR == K2:
        return b_difference * b_difference / 2, -b_difference
    b_ratio = bounded_exp(b_difference)
    b_far = tl.abs(b_difference) > FARTHEST
    b_bounded = tl.where(b_far, tl.where(b_difference > 0, FARTHEST, -FARTHEST), b_difference)
    return b_ratio - b_bounded - 1, tl.where(b_far, 0.0, 1 - b_ratio)


@triton.jit
def add_up(p_sums, p_loss, p_figures, N):
    """Add up the rows of all rollouts and write the loss and the figures."""
    column = tl.arange(0, SUMS_BLOCK)
    b_total = tl.zeros((SUMS_BLOCK,), tl.float64)
    for first in range(0, N, ROWS_BLOCK):
        row = first + tl.arange(0, ROWS_BLOCK)
        known = (row < N)[:, None] & (column < SUMS)[None, :]
        # .cg bypasses this program's L1 cache, which may lack the writes of other programs.
        b_rows = tl.load(p_sums + row[:, None] * SUMS + column[None, :], mask=known, other=0.0, cache_modifier=".cg")
        b_total += tl.sum(b_rows.to(tl.float64), axis=0)
    tl.store(p_loss + column, b_total.to(tl.float32), mask=column == LOSS)
    tokens = tl.sum(tl.where(column == TOKENS, b_total, 0.0))
    b_mean = tl.where(tokens > 0, b_total / tl.maximum(tokens, 1.0), float("nan"))
    b_total = tl.where(column > KL, b_mean, b_total)
    tl.store(p_figures + column - 1, b_total, mask=(column >= TOKENS) & (column < SUMS))


@triton.jit
def terms_of(
    p_logprob,
    p_old,
    p_sampler,
    p_reference,
    p_mask,
    p_gradient,
    t,
    b_mine,
    advantage,
    weight,
    mean_moved,
    sum_gap,
    low,
    high,
    dual,
    cap,
    floor,
    kl_coefficient,
    SURROGATE: tl.constexpr,
    OF_SEQUENCE: tl.constexpr,
    IMPORTANCE_LEVEL: tl.constexpr,
    MASKS_BEYOND: tl.constexpr,
    KL_ESTIMATOR: tl.constexpr,
):
    """Write the gradient of tokens and return their folded contributions to each of the sums."""
    b_inside = is_inside(p_mask, t, b_mine)
    # Padding is loaded too, so that loads are wide. It may hold anything, and is discarded below.
    b_logprob, b_old = load_tokens(p_logprob, t, b_mine), load_tokens(p_old, t, b_mine)
    b_moved = tl.where(b_inside, b_logprob - b_old, 0.0)
    b_log_ratio = b_moved
    if OF_SEQUENCE:
        b_log_ratio = tl.where(b_inside, mean_moved, 0.0)
    b_loss, b_slope, b_clipped, b_dual, b_ratio = surrogate(b_logprob, b_log_ratio, advantage, low, high, dual, SURROGATE)
    b_importance = tl.zeros_like(b_moved)
    b_beyond, b_gap, b_kl = b_importance, b_importance, b_importance
    if p_sampler is not None:
        b_gap = tl.where(b_inside, b_old - load_tokens(p_sampler, t, b_mine), 0.0)
        b_by = b_gap
        if IMPORTANCE_LEVEL == OF_SEQUENCES:
            b_by = tl.where(b_inside, sum_gap, 0.0)
        b_importance, b_is_beyond = importance_of(b_by, cap, floor, MASKS_BEYOND)
        b_loss *= b_importance
        b_slope *= b_importance
        b_beyond = b_is_beyond.to(tl.float32)
    if p_reference is not None:
        b_kl, b_kl_slope = kl_of(load_tokens(p_reference, t, b_mine) - b_logprob, KL_ESTIMATOR)
        b_loss += kl_coefficient * b_kl
        b_slope += kl_coefficient * b_kl_slope
    tl.store(p_gradient + t, tl.where(b_inside, weight * b_slope, 0.0), mask=b_mine)
    return (
        fold(tl.where(b_inside, b_loss, 0.0)),
        fold(b_inside.to(tl.float32)),
        fold(tl.where(b_inside, b_kl, 0.0)),
        fold((b_clipped & b_inside).to(tl.float32)),
        fold((b_dual & b_inside).to(tl.float32)),
        fold(tl.where(b_inside, b_ratio, 0.0)),
        fold(b_moved),
        fold(tl.where(b_inside, b_importance, 0.0)),
        fold(tl.where(b_inside, b_beyond, 0.0)),
        fold(tl.abs(b_gap)),
    )


@triton.jit
def policy_loss_kernel(
    p_logprob,  # float32, (N, T) or packed (tokens,); the next three have the same shape
    p_old,
    p_sampler,
    p_reference,
    p_mask,  # (N, T)
    p_cu_seqlens,  # (N + 1,)
    p_advantages,  # (N,) float32
    p_weights,  # (N,) float32
    p_gradient,  # like p_logprob, written
    p_sums,  # (N, SUMS) float32 scratch
    p_arrived,  # (1,) int32, how many programs are done; 0 at the start
    p_loss,  # () float32, written
    p_figures,  # (SUMS - 1,) float64, written
    N,
    T,
    low: tl.float32,
    high: tl.float32,
    dual: tl.float32,
    cap: tl.float32,
    floor: tl.float32,
    kl_coefficient: tl.float32,
    SURROGATE: tl.constexpr,
    OF_SEQUENCE: tl.constexpr,
    IMPORTANCE_LEVEL: tl.constexpr,
    MASKS_BEYOND: tl.constexpr,
    KL_ESTIMATOR: tl.constexpr,
    EDGES: tl.constexpr,  # whether a rollout may start or stop between multiples of 16
    BLOCK_T: tl.constexpr,
):
    """Compute the loss, its gradient and its figures. Grid (N,)."""
    rollout = tl.program_id(0).to(tl.int64)
    if p_cu_seqlens is not None:
        start, stop = tl.load(p_cu_seqlens + rollout), tl.load(p_cu_seqlens + rollout + 1)
    else:
        start = rollout * T
        stop = start + T
    advantage, weight = tl.load(p_advantages + rollout), tl.load(p_weights + rollout)
    mean_moved, sum_gap = 0.0, 0.0
    if OF_SEQUENCE or IMPORTANCE_LEVEL == OF_SEQUENCES:
        tokens, sum_moved, sum_gap = moves_of_rollout(p_logprob, p_old, p_sampler, p_mask, start, stop, EDGES, BLOCK_T)
        mean_moved = sum_moved / tl.maximum(tokens, 1.0)

    b_loss = tl.zeros((BLOCK_T // 4,), tl.float32)
    b_count, b_kl, b_clip, b_dual_clip, b_ratio = b_loss, b_loss, b_loss, b_loss, b_loss
    b_moved, b_importance, b_beyond, b_gap = b_loss, b_loss, b_loss, b_loss
    body_stop = stop // 16 * 16
    for block in range((start + 15) // 16 * 16, body_stop, BLOCK_T):
        t = block + tl.arange(0, BLOCK_T)
        more = terms_of(
            p_logprob, p_old, p_sampler, p_reference, p_mask, p_gradient, t, t < body_stop, advantage, weight, mean_moved, sum_gap,
            low, high, dual, cap, floor, kl_coefficient, SURROGATE, OF_SEQUENCE, IMPORTANCE_LEVEL, MASKS_BEYOND, KL_ESTIMATOR,
        )  # fmt: skip
        b_loss += more[0]
        b_count += more[1]
        b_kl += more[2]
        b_clip += more[3]
        b_dual_clip += more[4]
        b_ratio += more[5]
        b_moved += more[6]
        b_importance += more[7]
        b_beyond += more[8]
        b_gap += more[9]
    loss, count, kl, clip, dual_clip = tl.sum(b_loss), tl.sum(b_count), tl.sum(b_kl), tl.sum(b_clip), tl.sum(b_dual_clip)
    ratio, moved, importance, beyond, gap = tl.sum(b_ratio), tl.sum(b_moved), tl.sum(b_importance), tl.sum(b_beyond), tl.sum(b_gap)
    if EDGES:
        t, b_mine = edge_tokens(start, stop)
        more = terms_of(
            p_logprob, p_old, p_sampler, p_reference, p_mask, p_gradient, t, b_mine, advantage, weight, mean_moved, sum_gap,
            low, high, dual, cap, floor, kl_coefficient, SURROGATE, OF_SEQUENCE, IMPORTANCE_LEVEL, MASKS_BEYOND, KL_ESTIMATOR,
        )  # fmt: skip
        loss += tl.sum(more[0])
        count += tl.sum(more[1])
        kl += tl.sum(more[2])
        clip += tl.sum(more[3])
        dual_clip += tl.sum(more[4])
        ratio += tl.sum(more[5])
        moved += tl.sum(more[6])
        importance += tl.sum(more[7])
        beyond += tl.sum(more[8])
        gap += tl.sum(more[9])
    p_row = p_sums + rollout * SUMS
    tl.store(p_row + LOSS, weight * loss)
    tl.store(p_row + TOKENS, count)
    tl.store(p_row + KL, weight * kl if p_reference is not None else float("nan"))
    tl.store(p_row + CLIP, clip)
    tl.store(p_row + DUAL_CLIP, dual_clip)
    tl.store(p_row + RATIO, ratio)
    tl.store(p_row + APPROX_KL, -moved)
    tl.store(p_row + IMPORTANCE, importance if p_sampler is not None else float("nan"))
    tl.store(p_row + BEYOND, beyond if p_sampler is not None else float("nan"))
    tl.store(p_row + MISMATCH, gap if p_sampler is not None else float("nan"))
    tl.debug_barrier()  # the row must be complete before this program counts as done
    done = tl.atomic_add(p_arrived, 1, sem="acq_rel") + 1
    if done == N:
        add_up(p_sums, p_loss, p_figures, N)
