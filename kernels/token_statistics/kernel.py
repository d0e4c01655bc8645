"""Kernels that read logits: the sums that `v05/ops/token_statistics/sums.py` defines, and the gradient of the logits."""

import triton
import triton.language as tl

from v05.kernels.token_statistics.rows import body_of, edges, exponential, row_of, tile

IGNORED = tl.constexpr(-100)
LN2 = tl.constexpr(0.6931471805599453)
LEAST = tl.constexpr(-200.0)  # bits; 2^-200 is 0 in float32. -inf would not do, because 0 times -inf is NaN
MAXIMUM, OTHERS, SLOPES, SQUARES, TARGET = (tl.constexpr(row) for row in range(5))
STATE_MAXIMUM, STATE_INVERSE, STATE_MEAN, STATE_REST = (tl.constexpr(row) for row in range(4))


@triton.jit
def fold(m, s, a, q, b_x, column, target, has_target, bits, step_high, step_low, EXACT: tl.constexpr):
    """Add a tile, without the target's column, to the sums of each lane, which are relative to the lane's largest logit."""
    largest = tl.maximum(m, tl.max(b_x, axis=1))
    base = tl.where(largest == float("-inf"), 0.0, largest)
    b_scale, b_shift = exponential(m, base, bits, step_high, step_low, EXACT)
    b_e, b_bits = exponential(b_x, base[:, None], bits, step_high, step_low, EXACT)
    if has_target:
        b_e = tl.where(column == target, 0.0, b_e)
    a = b_scale * (a + s * tl.maximum(b_shift, LEAST)) + tl.sum(b_e * tl.maximum(b_bits, LEAST), axis=1)
    s = b_scale * s + tl.sum(b_e, axis=1)
    q = b_scale * b_scale * q + tl.sum(b_e * b_e, axis=1)
    return largest, s, a, q


@triton.jit(do_not_specialize=["tokens", "origin", "length", "stride_sequence", "stride_token", "V", "first"])
def add_up_kernel(
    p_logits,  # aligned to 16 bytes; the first row starts at element `origin`
    p_ids,  # (tokens,) int64
    p_sums,  # (5, tokens) float32, written
    tokens,
    origin,
    length,  # tokens of a sequence
    stride_sequence,
    stride_token,
    V,
    first,  # the id of the first column
    bits: tl.float32,  # this and the next two are from launch._scale
    step_high: tl.float32,
    step_low: tl.float32,
    LANES: tl.constexpr,
    E: tl.constexpr,
):
    """Write the sums of each token. Grid (tokens,). The logits and sums of ignored tokens are neither read nor written."""
    token = tl.program_id(0)
    identity = tl.load(p_ids + token)
    if identity != IGNORED:
        EXACT: tl.constexpr = p_logits.dtype.element_ty == tl.float32
        start = row_of(token, origin, length, stride_sequence, stride_token)
        body, size = body_of(start, V)
        before = (body - start).to(tl.int32)
        own = (identity >= first) & (identity < first + V)
        target = tl.where(own, identity - first, -1).to(tl.int32)
        at_target = tl.load(p_logits + start + target, mask=own, other=float("-inf")).to(tl.float32)

        at = tile(LANES, E)
        p_body = p_logits + body
        b_next = tl.load(p_body + at, mask=at < size, other=float("-inf"))
        zeros = tl.zeros((LANES,), tl.float32)
        m, s, a, q = zeros + float("-inf"), zeros, zeros, zeros
        for block in range(0, size, LANES * E):
            b_x = b_next.to(tl.float32)
            following = block + LANES * E
            b_next = tl.load(p_body + following + at, mask=following + at < size, other=float("-inf"))
            place = target - before - block
            has_target = (place >= 0) & (place < LANES * E)
            m, s, a, q = fold(m, s, a, q, b_x, at, place, has_target, bits, step_high, step_low, EXACT)
        if (before > 0) | (before + size < V):
            column, inside = edges(start, body, size, V, LANES, E)
            b_x = tl.load(p_logits + start + column, mask=inside, other=float("-inf")).to(tl.float32)
            m, s, a, q = fold(m, s, a, q, b_x, column, target, own, bits, step_high, step_low, EXACT)

        largest = tl.max(m, axis=0)
        base = tl.where(largest == float("-inf"), 0.0, largest)
        b_scale, b_shift = exponential(m, base, bits, step_high, step_low, EXACT)
        p_of_token = p_sums + token
        rows = tokens.to(tl.int64)
        tl.store(p_of_token + rows * MAXIMUM, largest)
        tl.store(p_of_token + rows * OTHERS, tl.sum(b_scale * s, axis=0))
        tl.store(p_of_token + rows * SLOPES, tl.sum(b_scale * (a + s * tl.maximum(b_shift, LEAST)), axis=0) * LN2)
        tl.store(p_of_token + rows * SQUARES, tl.sum(b_scale * b_scale * q, axis=0))
        tl.store(p_of_token + rows * TARGET, at_target)


@triton.jit(do_not_specialize=["tokens", "shards"])
def statistics_kernel(
    p_sums,  # (shards, 5, tokens) float32
    p_ids,  # (tokens,) int64
    p_logprob,  # (tokens,) float32, written, like the next two
    p_entropy,
    p_sum_pi_squared,
    p_state,  # (4, tokens) float32, written
    p_nonfinite,  # int64 scalar; the number of such tokens is added to it
    tokens,
    shards,
    temperature: tl.float64,
    BLOCK: tl.constexpr,
):
    """Do what `statistics` in `v05/ops/token_statistics/sums.py` does, in float64. Grid (tokens / BLOCK, rounded up)."""
    token = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = token < tokens
    rows = tokens.to(tl.int64)
    ignored = tl.load(p_ids + token, mask=inside, other=IGNORED) == IGNORED
    zeros = tl.zeros((BLOCK,), tl.float64)
    largest, at_target = zeros + float("-inf"), zeros + float("-inf")
    for shard in range(shards):
        p_shard = p_sums + shard * 5 * rows + token
        largest = tl.maximum(largest, tl.load(p_shard + rows * MAXIMUM, mask=inside, other=0.0).to(tl.float64))
        at_target = tl.maximum(at_target, tl.load(p_shard + rows * TARGET, mask=inside, other=0.0).to(tl.float64))
    others, slopes, squares = zeros, zeros, zeros
    for shard in range(shards):
        p_shard = p_sums + shard * 5 * rows + token
        own = tl.load(p_shard + rows * MAXIMUM, mask=inside, other=0.0).to(tl.float64)
        b_others = tl.load(p_shard + rows * OTHERS, mask=inside, other=0.0).to(tl.float64)
        b_slopes = tl.load(p_shard + rows * SLOPES, mask=inside, other=0.0).to(tl.float64)
        b_squares = tl.load(p_shard + rows * SQUARES, mask=inside, other=0.0).to(tl.float64)
        shift = tl.where(own == float("-inf"), zeros, (own - largest) / temperature)
        scale = tl.exp(shift)
        others += scale * b_others
        slopes += scale * (b_slopes + tl.where(b_others == 0.0, zeros, shift * b_others))
        squares += scale * scale * b_squares
    t = (at_target - largest) / temperature
    of_target = tl.exp(t)
    z = others + of_target
    small = others - others * others * (0.5 - others / 3.0)  # log(1 + others), to the third order
    log_z = tl.where(at_target == largest, tl.where(others < 1e-5, small, tl.log(others + 1.0)), tl.log(z))
    mean = (slopes + tl.where(of_target == 0.0, zeros, of_target * t)) / z
    logprob = t - log_z
    tl.store(p_logprob + token, tl.where(ignored, zeros, logprob).to(tl.float32), mask=inside)
    tl.store(p_entropy + token, tl.where(ignored, zeros, log_z - mean).to(tl.float32), mask=inside)
    sum_pi_squared = (squares + of_target * of_target) / (z * z)
    tl.store(p_sum_pi_squared + token, tl.where(ignored, zeros, sum_pi_squared).to(tl.float32), mask=inside)
    tl.store(p_state + rows * STATE_MAXIMUM + token, tl.where(ignored, zeros, largest).to(tl.float32), mask=inside)
    tl.store(p_state + rows * STATE_INVERSE + token, tl.where(ignored, zeros, 1.0 / z).to(tl.float32), mask=inside)
    tl.store(p_state + rows * STATE_MEAN + token, tl.where(ignored, zeros, mean).to(tl.float32), mask=inside)
    tl.store(p_state + rows * STATE_REST + token, tl.where(ignored, zeros, others / z).to(tl.float32), mask=inside)
    usable = ignored | (tl.abs(logprob) < float("inf"))
    tl.atomic_add(p_nonfinite, tl.sum(tl.where(usable, 0, 1).to(tl.int64), axis=0))


@triton.jit
def gradient_of_tile(b_x, column, target, of_target, largest, weight, slope, mean, bits, HAS_SLOPE: tl.constexpr):
    """e^d (weight + slope (d - mean)), d in bits, and `of_target` at the target."""
    b_bits = (b_x - largest) * bits
    b_weight = weight
    if HAS_SLOPE:
        b_weight = weight + slope * (tl.maximum(b_bits, LEAST) - mean)
    return tl.where(column == target, of_target, tl.exp2(b_bits) * b_weight)


@triton.jit(
    do_not_specialize=[
        "tokens",
        "origin",
        "length",
        "stride_sequence",
        "stride_token",
        "out_origin",
        "out_stride_sequence",
        "out_stride_token",
        "V",
        "first",
    ]
)
def write_gradient_kernel(
    p_logits,  # aligned to 16 bytes; the first row starts at element `origin`
    p_ids,  # (tokens,) int64
    p_state,  # (4, tokens) float32
    p_of_logprob,  # (tokens,) float32
    p_of_entropy,  # (tokens,) float32, or None
    p_out,  # like the logits; may be the logits themselves
    tokens,
    origin,
    length,  # tokens of a sequence
    stride_sequence,
    stride_token,
    out_origin,
    out_stride_sequence,
    out_stride_token,
    V,
    first,  # the id of the first column
    bits: tl.float32,
    ALIGNED: tl.constexpr,
    LANES: tl.constexpr,
    E: tl.constexpr,
):
    """Write the gradient of the logits. Grid (tokens,).

    ALIGNED means that rows of the gradient and of the logits start at the same offset modulo 16 elements. The logits of a token
    that is ignored, or whose upstream gradients are 0, are not read.
    """
    token = tl.program_id(0)
    identity = tl.load(p_ids + token)
    rows = tokens.to(tl.int64)
    p_of_token = p_state + token
    largest = tl.load(p_of_token + rows * STATE_MAXIMUM)
    mean = tl.load(p_of_token + rows * STATE_MEAN) / LN2
    scale = bits * LN2  # 1 / temperature
    g = tl.load(p_of_logprob + token) * scale
    inverse = tl.load(p_of_token + rows * STATE_INVERSE)
    live = (g != 0.0) & (identity != IGNORED)
    slope = g
    HAS_SLOPE: tl.constexpr = p_of_entropy is not None
    if HAS_SLOPE:
        h = tl.load(p_of_entropy + token) * scale
        live = ((g != 0.0) | (h != 0.0)) & (identity != IGNORED)
        slope = -h * LN2 * inverse

    start = row_of(token, origin, length, stride_sequence, stride_token)
    shift = row_of(token, out_origin, length, out_stride_sequence, out_stride_token) - start
    if ALIGNED:
        shift = shift // 16 * 16
    body, size = body_of(start, V)
    before = (body - start).to(tl.int32)
    own = (identity >= first) & (identity < first + V)
    target = tl.where(own, identity - first, -1).to(tl.int32)
    at_target = tl.load(p_logits + start + target, mask=own, other=float("-inf")).to(tl.float32)
    of_target = g * tl.load(p_of_token + rows * STATE_REST)
    if HAS_SLOPE:
        target_bits = (at_target - largest) * bits
        of_target += tl.exp2(target_bits) * slope * (tl.maximum(target_bits, LEAST) - mean)
    weight = -g * inverse

    at = tile(LANES, E)
    p_body, p_out_body = p_logits + body, p_out + body + shift
    size_read = tl.where(live, size, 0)
    b_next = tl.load(p_body + at, mask=at < size_read, other=0.0)
    for block in range(0, size, LANES * E):
        b_x = b_next.to(tl.float32)
        following = block + LANES * E
        b_next = tl.load(p_body + following + at, mask=following + at < size_read, other=0.0)
        place = target - before - block
        b_out = gradient_of_tile(b_x, at, place, of_target, largest, weight, slope, mean, bits, HAS_SLOPE)
        b_out = tl.where(live, b_out, 0.0).to(p_out.dtype.element_ty)
        tl.store(p_out_body + block + at, b_out, mask=block + at < size)
    if (before > 0) | (before + size < V):
        column, inside = edges(start, body, size, V, LANES, E)
        b_x = tl.load(p_logits + start + column, mask=inside & (column < tl.where(live, V, 0)), other=0.0).to(tl.float32)
        b_out = gradient_of_tile(b_x, column, target, of_target, largest, weight, slope, mean, bits, HAS_SLOPE)
        tl.store(p_out + start + shift + column, tl.where(live, b_out, 0.0).to(p_out.dtype.element_ty), mask=inside)
