"""Addresses of rows of logits, and tiles of a row: LANES lanes of E consecutive elements, 128 bits of a thread each."""

import triton
import triton.language as tl


@triton.jit
def row_of(token, origin, length, stride_sequence, stride_token):
    """The position of the first element of a token's row."""
    token = token.to(tl.int64)
    return origin + token // length * stride_sequence + token % length * stride_token


@triton.jit
def body_of(start, V):
    """(body, size): the position and the length of the body of a row, which begins and ends at multiples of 16 elements.

    The compiler can see that, so it uses 128-bit accesses wherever the row starts.
    """
    stop = start + V
    body = (start + 15) // 16 * 16
    return body, tl.maximum(stop // 16 * 16 - body, 0).to(tl.int32)


@triton.jit
def tile(LANES: tl.constexpr, E: tl.constexpr):
    return tl.arange(0, LANES)[:, None] * E + tl.arange(0, E)[None, :]


@triton.jit
def edges(start, body, size, V, LANES: tl.constexpr, E: tl.constexpr):
    """(column, inside) of the up to 15 columns on either side of the body, as the first 32 elements of a tile."""
    before = tl.minimum((body - start).to(tl.int32), V)
    at = tile(LANES, E)
    column = tl.where(at < 16, at, before + size + at - 16)
    return column, (at < 32) & (column < tl.where(at < 16, before, V))


@triton.jit
def exponential(x, largest, bits, step_high, step_low, EXACT: tl.constexpr):
    """(e^d, d in bits) of d = (x - largest) / temperature, where `bits` = log2(e) / temperature.

    With EXACT, the error of e^d does not grow with d. The rounding error of the difference is added back, and whole bits, of
    `step_high` + `step_low` = temperature ln 2 each, are subtracted before the rest is multiplied.
    """
    d = x - largest
    b_bits = d * bits
    if EXACT:
        back = d - x
        lost = (x - (d - back)) - (largest + back)
        whole = (b_bits + 12582912.0) - 12582912.0  # 1.5 * 2^23: rounds to a whole number
        rest = (d - whole * step_high) - whole * step_low + lost
        b_e = tl.exp2(rest * bits) * tl.exp2(whole)
        return tl.where(b_bits < -150.0, 0.0, b_e), b_bits  # also 0 for masked logits, whose rest is NaN
    else:
        return tl.exp2(b_bits), b_bits
