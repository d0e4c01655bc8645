"""Tokens of rollouts on the GPU: their addresses and mask, writing an advantage to them, and summing their rewards."""

import triton
import triton.language as tl


@triton.jit
def load_block(p_mask, row, start, T, block, inside, BLOCK_T: tl.constexpr):
    """The mask, 1 or other, of the tokens block .. block + BLOCK_T - 1 of a row whose tokens begin at `start`."""
    if p_mask.dtype.element_ty == tl.uint32:  # one bit per token
        place = (block - start).to(tl.int32)
        word = (place >> 5) + tl.arange(0, BLOCK_T // 32)
        shift = (place & 31).to(tl.uint32)
        words = words_of(T)
        p_words = p_mask + row * words + word
        b_word = tl.load(p_words, mask=word < words, other=0) >> shift
        b_word |= (tl.load(p_words + 1, mask=word + 1 < words, other=0) << 1) << (31 - shift)
        b_bits = (b_word[:, None] >> tl.arange(0, 32).to(tl.uint32)[None, :]) & 1
        return tl.reshape(b_bits, (BLOCK_T,)).to(tl.int8)
    else:
        return tl.load(p_mask + (block + tl.arange(0, BLOCK_T)), mask=inside, other=0)


@triton.jit
def words_of(T):
    """The number of 32-bit words for a row of T tokens."""
    return (T + 31) // 32


@triton.jit
def tokens_of(p_order, p_mask, p_cu_seqlens, position, inside, T, chunk, BLOCK_T: tl.constexpr):
    """(row, start, stop, mask) of the rollout at a position: its tokens are start .. stop - 1, and mask is that of the chunk's
    first block of them.

    Callers load them early, so that memory is busy while statistics are computed, or while the previous rollout is stored.
    """
    row = position
    if p_order is not None:
        row = tl.load(p_order + position, mask=inside, other=0)
    if p_cu_seqlens is not None:
        start = tl.load(p_cu_seqlens + row, mask=inside, other=0)
        stop = tl.load(p_cu_seqlens + row + 1, mask=inside, other=0)
    else:
        start = row * T
        stop = start + T
    b_mask = chunk
    if p_mask is not None and p_mask.dtype.element_ty != tl.uint32:
        block, b_inside = first_block(start, stop, chunk, BLOCK_T)
        b_mask = load_block(p_mask, row, start, T, block, b_inside & inside, BLOCK_T)
    return row, start, stop, b_mask


@triton.jit
def first_block(start, stop, chunk, BLOCK_T: tl.constexpr):
    """(block, inside): the start of the chunk's first block in the body of tokens start .. stop - 1, and which tokens are in the
    body.

    The bounds of the body are multiples of 16, and the compiler can see that. So it uses 128-bit accesses wherever the row starts.
    """
    block = (start + 15) // 16 * 16 + chunk * BLOCK_T
    return block, block + tl.arange(0, BLOCK_T) < stop // 16 * 16


@triton.jit
def store_block(p_out, p_mask, b_mask, block, inside, value, BLOCK_T: tl.constexpr):
    """Write `value` to the tokens block .. block + BLOCK_T - 1 whose mask is 1, and 0 to the others."""
    if p_mask is not None:
        value = tl.where(b_mask == 1, value, 0.0)
    tl.store(p_out + (block + tl.arange(0, BLOCK_T)), value, mask=inside)


@triton.jit
def fill_tokens(p_out, p_mask, row, start, stop, b_mask, T, value, chunk, num_chunks, BLOCK_T: tl.constexpr):
    """Write this chunk's share of the tokens start .. stop - 1 of a row. b_mask is the mask of its first block.

    Chunk 0 also writes the up to 15 tokens on either side of the body. An aligned row has none.
    """
    first, b_inside = first_block(start, stop, chunk, BLOCK_T)
    b_first = b_mask
    if p_mask is not None and p_mask.dtype.element_ty == tl.uint32:
        b_first = load_block(p_mask, row, start, T, first, b_inside, BLOCK_T)
    store_block(p_out, p_mask, b_first, first, b_inside, value, BLOCK_T)
    body_start, body_stop = (start + 15) // 16 * 16, stop // 16 * 16
    for block in range(body_start + (chunk + num_chunks) * BLOCK_T, body_stop, num_chunks * BLOCK_T):
        b_inside = block + tl.arange(0, BLOCK_T) < body_stop
        b_other = chunk
        if p_mask is not None:
            b_other = load_block(p_mask, row, start, T, block, b_inside, BLOCK_T)
        store_block(p_out, p_mask, b_other, block, b_inside, value, BLOCK_T)
    if (chunk == 0) & ((start < body_start) | (body_stop < stop)):
        lane = tl.arange(0, 32)
        tail_start = tl.maximum(body_start, body_stop)
        t = tl.where(lane < 16, start + lane, tail_start + lane - 16)
        edge = t < tl.where(lane < 16, tl.minimum(body_start, stop), stop)
        b_value = value
        if p_mask is not None:
            if p_mask.dtype.element_ty == tl.uint32:
                place = t - start
                b_word = tl.load(p_mask + row * words_of(T) + (place >> 5), mask=edge, other=0)
                b_edge = (b_word >> (place & 31).to(tl.uint32)) & 1
            else:
                b_edge = tl.load(p_mask + t, mask=edge, other=0)
            b_value = tl.where(b_edge == 1, value, 0.0)
        tl.store(p_out + t, b_value, mask=edge)


@triton.jit
def sum_token_rewards_kernel(
    p_token_rewards,  # (N, T)
    p_mask,  # (N, T)
    p_rewards,  # (N,) float64, written
    p_bits,  # (N, words_of(T)) uint32, written
    T,
    BLOCK_T: tl.constexpr,
):
    """rewards[i] = sum of token_rewards[i, t] over the tokens t with mask[i, t] = 1. Grid (N,).

    It also stores the mask with one bit per token, so that the next kernel does not read its 1 to 8 bytes per token again.
    """
    row = tl.program_id(0).to(tl.int64)
    words = words_of(T)
    bit = tl.arange(0, 32).to(tl.uint32)
    b_sum = tl.zeros((BLOCK_T,), tl.float64)
    for block in range(0, T, BLOCK_T):
        t = block + tl.arange(0, BLOCK_T)
        b_mask = tl.load(p_mask + row * T + t, mask=t < T, other=0) == 1
        b_token_reward = tl.load(p_token_rewards + row * T + t, mask=t < T, other=0.0)
        b_sum += tl.where(b_mask, b_token_reward, 0.0).to(tl.float64)
        b_words = tl.sum(tl.reshape(b_mask, (BLOCK_T // 32, 32)).to(tl.uint32) << bit[None, :], axis=1)
        word = block // 32 + tl.arange(0, BLOCK_T // 32)
        tl.store(p_bits + row * words + word, b_words, mask=word < words)
    tl.store(p_rewards + row, tl.sum(b_sum))
