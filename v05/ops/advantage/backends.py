"""The backends: the C++ core on the CPU and one Triton launch on a GPU. Both are called as

    backend(rollouts, groups, prior, options, out, table)

and write the advantages into `out` and the statistics into `table`, unless `table` is None. Their arguments have been checked, are
contiguous and are on one device.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import TypeAlias

import torch

from v05 import _core
from v05.arguments import choice
from v05.ops.advantage.inputs import DTYPES, Groups, Rollouts, outcomes_of
from v05.ops.advantage.options import Options

Backend: TypeAlias = Callable[[Rollouts, Groups, torch.Tensor | None, Options, torch.Tensor, torch.Tensor | None], None]


def run_cpp(
    rollouts: Rollouts,
    groups: Groups,
    prior: torch.Tensor | None,
    options: Options,
    out: torch.Tensor,
    table: torch.Tensor | None,
) -> None:
    """Compute on CPU tensors in the C++ core."""
    rewards, mask, cu_seqlens, valid, trajectory_ids, energy = rollouts
    # The core writes float32 and float64, so half-precision outputs are rounded from float32.
    target = out if out.dtype in (torch.float32, torch.float64) else torch.empty_like(out, dtype=torch.float32)
    _core.compute_advantages(
        (
            rewards.shape[0],
            rewards.ndim == 2,
            rewards.data_ptr(),
            DTYPES[rewards.dtype],
            None if mask is None else mask.data_ptr(),
            0 if mask is None else DTYPES[mask.dtype],
            None if cu_seqlens is None else cu_seqlens.data_ptr(),
            None if valid is None else valid.data_ptr(),
            None if trajectory_ids is None else trajectory_ids.data_ptr(),
            None if energy is None else energy.data_ptr(),
        ),
        (
            groups.number,
            None if groups.offsets is None else groups.offsets.data_ptr(),
            None if groups.ids is None else groups.ids.data_ptr(),
        ),
        None if prior is None else prior.data_ptr(),
        options.core,
        (target.data_ptr(), DTYPES[target.dtype], target.numel()),
        None if table is None else table.data_ptr(),
        torch.get_num_threads(),
    )
    if target is not out:
        out.copy_(target)


def run_triton(
    rollouts: Rollouts,
    groups: Groups,
    prior: torch.Tensor | None,
    options: Options,
    out: torch.Tensor,
    table: torch.Tensor | None,
) -> None:
    """Compute on CUDA tensors, or on any tensors in Triton's interpreter.

    A kernel cannot raise, so non-finite rewards are excluded and counted.
    """
    launch, group_rows = _kernels()
    order, offsets, valid = groups.order, groups.offsets, rollouts.valid
    if groups.ids is not None:
        offsets, order, valid = group_rows(groups.ids, valid, groups.number)
    assert offsets is not None
    counted = valid
    if rollouts.trajectory_ids is not None:
        finite = outcomes_of(rollouts.rewards, rollouts.mask).isfinite()
        counted = first_of_trajectory(rollouts.trajectory_ids, offsets, order, finite if valid is None else valid & finite)
    launch(rollouts, valid, counted, offsets, order, prior, options.kernel, out, table)


@cache
def _kernels() -> tuple[Callable[..., None], Callable[..., tuple[torch.Tensor, torch.Tensor, torch.Tensor]]]:
    """The launchers of the two kernels. Importing them imports Triton, so this is done at the first call."""
    from v05.kernels.advantage.launch import launch
    from v05.kernels.grouping.launch import group_rows

    return launch, group_rows


def first_of_trajectory(
    trajectory_ids: torch.Tensor, offsets: torch.Tensor, order: torch.Tensor | None, valid: torch.Tensor | None
) -> torch.Tensor:
    """(N,) bool, True for the first valid row of each trajectory in a group. Sorts rows stably and does not synchronise."""
    n = trajectory_ids.numel()
    position = torch.arange(n, device=trajectory_ids.device)
    rows = position if order is None else order
    group = torch.searchsorted(offsets[1:].contiguous(), position, right=True)  # of the row at each position
    ignored = torch.zeros(n, dtype=torch.bool, device=rows.device) if valid is None else ~valid[rows]
    by = torch.argsort(ignored, stable=True)
    by = by[torch.argsort(trajectory_ids[rows][by], stable=True)]
    by = by[torch.argsort(group[by], stable=True)]
    key = torch.stack((group[by], trajectory_ids[rows][by]))
    starts = torch.ones(n, dtype=torch.bool, device=rows.device)
    starts[1:] = (key[:, 1:] != key[:, :-1]).any(dim=0)
    first = torch.empty_like(starts)
    first[rows[by]] = starts & ~ignored[by]
    return first


BACKENDS: dict[str, Backend] = {"cpp": run_cpp, "triton": run_triton}
BACKEND_OF_DEVICE = {"cpu": "cpp", "cuda": "triton"}


def backend_for(name: str | None, device: torch.device, tracing: bool) -> Backend:
    """The backend called `name`, or the device's own for None. A ValueError if it cannot run on the device."""
    own = BACKEND_OF_DEVICE.get(device.type)
    if own is None:
        raise ValueError(f"rewards: device {device} has no backend; move the tensors to one of {', '.join(BACKEND_OF_DEVICE)}")
    if name is None:
        name = own
    elif choice("backend", name, BACKENDS) == "cpp" and own != "cpp":
        raise ValueError(f"backend='cpp' needs CPU tensors, got {device}")
    elif name != own and tracing:
        raise ValueError(f"backend={name!r} is not that of {device}, and torch traces no other; leave it out under torch.compile")
    return BACKENDS[name]
