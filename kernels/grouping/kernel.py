"""Order rows by group in one launch, by counting and ranking instead of sorting."""

import triton
import triton.language as tl


@triton.jit
def load_ids(p_ids, row, N, G):
    """(id, placed). A kernel cannot reject ids: one that names no group becomes 0 and is not placed."""
    b_id = tl.load(p_ids + row, mask=row < N, other=-1)
    b_placed = (b_id >= 0) & (b_id < G)
    return tl.where(b_placed, b_id, 0).to(tl.int32), b_placed


@triton.jit(do_not_specialize=["N", "G"])
def group_rows_kernel(
    p_ids,  # (N,) int64
    p_valid,  # (N,) bool, or None if all rows are valid
    p_offsets,  # (G + 1,) int64, written
    p_order,  # (N,) int64, written
    p_placed,  # (N,) bool, written: whether the row is valid and its id names a group
    N,
    G,
    EACH: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Write offsets and order so that group g has the rows order[offsets[g]] .. order[offsets[g + 1] - 1], in ascending order.

    A row whose id names no group goes to group 0. Grid (G / EACH, rounded up). Each program reads all ids twice: first it counts
    the rows of its own groups and of all groups before them, then it ranks the rows.
    """
    lowest = tl.program_id(0) * EACH
    group = lowest + tl.arange(0, EACH)
    below = 0
    counts = tl.zeros((EACH,), tl.int32)
    for start in range(0, N, BLOCK):
        row = start + tl.arange(0, BLOCK)
        b_id, _ = load_ids(p_ids, row, N, G)
        b_inside = row < N
        below += tl.sum((b_inside & (b_id < lowest)).to(tl.int32))
        counts += tl.sum((b_inside[None, :] & (b_id[None, :] == group[:, None])).to(tl.int32), axis=1)
    ends = below + tl.cumsum(counts)
    tl.store(p_offsets + 1 + group, ends.to(tl.int64), mask=group < G)
    if lowest == 0:
        tl.store(p_offsets, tl.zeros((), tl.int64))

    place = ends - counts  # place of the next row of each group
    for start in range(0, N, BLOCK):
        row = start + tl.arange(0, BLOCK)
        b_id, b_placed = load_ids(p_ids, row, N, G)
        b_own = (row < N)[None, :] & (b_id[None, :] == group[:, None])
        b_one = b_own.to(tl.int32)
        b_rank = place[:, None] + tl.cumsum(b_one, axis=1) - 1
        tl.store(p_order + b_rank, (row.to(tl.int64))[None, :] + tl.zeros_like(b_rank), mask=b_own)
        if p_valid is not None:
            b_placed &= tl.load(p_valid + row, mask=row < N, other=0) != 0
        mine = (row < N) & (b_id >= lowest) & (b_id < lowest + EACH)
        tl.store(p_placed + row, b_placed, mask=mine)
        place += tl.sum(b_one, axis=1)
