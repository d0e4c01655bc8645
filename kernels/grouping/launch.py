"""The launch of the grouping kernel, and its variants for the ahead-of-time compiler."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from v05.kernels.grouping.kernel import group_rows_kernel
from v05.kernels.launcher import Launcher
from v05.kernels.variant import GROUPS, ROLLOUTS, Variant

MOST_ROWS = 1 << 15  # sorting more rows is as fast
MOST_GROUPS = 1 << 13
ENOUGH_PROGRAMS = 256
TILE = 4096  # pairs of a group and a row that a program compares at once
MOST_EACH = MOST_GROUPS // ENOUGH_PROGRAMS

_group_rows = Launcher(group_rows_kernel)


def group_rows(ids: torch.Tensor, valid: torch.Tensor | None, num_groups: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Order rows by group: group g has the rows order[offsets[g]] .. order[offsets[g + 1] - 1], in ascending order.

    This takes one launch, or one sort for more than MOST_ROWS rollouts or MOST_GROUPS groups. Neither synchronises with the host.

    Args:
        ids: (N,) int64. Rows whose id is not in [0, num_groups) go to group 0 and are not placed.
        valid: (N,) bool; None if all rows are valid.

    Returns:
        offsets: (num_groups + 1,) int64.
        order: (N,) int64.
        placed: (N,) bool, the valid rows whose id names a group.
    """
    n, device = ids.shape[0], ids.device
    if n > MOST_ROWS or num_groups > MOST_GROUPS or num_groups == 0:
        return by_sorting(ids, valid, num_groups)
    offsets = torch.empty(num_groups + 1, dtype=torch.int64, device=device)
    order = torch.empty(n, dtype=torch.int64, device=device)
    placed = torch.empty(n, dtype=torch.bool, device=device)
    each = 1 << (-(-num_groups // ENOUGH_PROGRAMS) - 1).bit_length()
    grid = (-(-num_groups // each), 1, 1)
    _group_rows(grid, device, (ids, valid, offsets, order, placed), (n, num_groups), (each, min(TILE // each, 1024)))
    return offsets, order, placed


def by_sorting(ids: torch.Tensor, valid: torch.Tensor | None, num_groups: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Do what `group_rows` does by sorting, for any size."""
    placed = (ids >= 0) & (ids < num_groups)
    ordered, order = torch.sort(torch.where(placed, ids, 0), stable=True)
    offsets = torch.searchsorted(ordered, torch.arange(num_groups + 1, device=ids.device, dtype=ids.dtype))
    return offsets, order, placed if valid is None else valid & placed


def variants() -> Iterator[Variant]:
    """Yield the kernel for the fewest and the most groups per program, with and without `valid`."""
    pointers = {"p_ids": "i64", "p_offsets": "i64", "p_order": "i64", "p_placed": "u8"}
    yield Variant("one-group-each", group_rows_kernel, pointers, {"EACH": 1, "BLOCK": 1024})
    yield Variant("one-group-each-valid", group_rows_kernel, pointers | {"p_valid": "u8"}, {"EACH": 1, "BLOCK": 1024})
    yield Variant("many-groups-each", group_rows_kernel, pointers, {"EACH": MOST_EACH, "BLOCK": TILE // MOST_EACH})


def traffic(variant: Variant) -> tuple[int, int]:
    """(bytes, floor_bytes) of one launch on ROLLOUTS in GROUPS groups. Every program reads all ids twice, from the cache."""
    size = variant.element_bytes()
    programs = -(-GROUPS // int(variant.constants["EACH"]))
    written = ROLLOUTS * (size["p_order"] + size["p_placed"] + size.get("p_valid", 0)) + (GROUPS + 1) * size["p_offsets"]
    valid = programs * ROLLOUTS * size.get("p_valid", 0)
    return programs * 2 * ROLLOUTS * size["p_ids"] + valid + written, ROLLOUTS * size["p_ids"] + written
