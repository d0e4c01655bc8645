"""Advantages of groups that are split over the ranks of a process group. Every rank computes on the rollouts of all ranks."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray

from v05 import _core
from v05.arguments import shown
from v05.methods import Method
from v05.ops.advantage.backends import backend_for
from v05.ops.advantage.compute import compute
from v05.ops.advantage.inputs import (
    DTYPES,
    Array,
    Rollouts,
    energy_for,
    integer_ids,
    keys_of,
    outcomes_of,
    placed,
    read_groups,
    read_prior,
    read_rollouts,
    values_of,
)
from v05.ops.advantage.options import Options
from v05.ops.advantage.stats import AdvantageStats


class _RankRollouts(NamedTuple):
    """The rollouts of one rank, on the host, as it sends them to the others.

    Ranks exchange rewards, a few bytes each, and not moments of groups, so that no digit of the result depends on the split.
    """

    keys: list[Any]
    outcomes: torch.Tensor
    prior: torch.Tensor | None
    valid: torch.Tensor
    trajectories: list[Any] | None
    energy: torch.Tensor | None


def _of_this_rank(
    local: Rollouts,
    out: torch.Tensor,
    trajectory_ids: Array | Sequence[str] | None,
    prior: Array | None,
    group_ids: Array | Sequence[str] | None,
    group_offsets: Array | None,
    num_groups: int | None,
) -> _RankRollouts:
    if group_ids is None or group_offsets is not None:
        raise ValueError("group_ids: needed with process_group, without group_offsets, to identify groups across ranks")
    n = local.rewards.shape[0]
    keys = _key_list("group_ids", group_ids)
    if len(keys) != n:
        raise ValueError(f"group_ids: {len(keys)} ids for {n} rollouts; give one id a rollout")
    if num_groups is not None and not all(isinstance(key, int) for key in keys):
        raise ValueError(f"num_groups={num_groups} needs integer group_ids; leave it out with ids of other kinds")
    if local.cu_seqlens is not None and local.cu_seqlens.is_cpu:
        _core.check_offsets("cu_seqlens", local.cu_seqlens.numpy(), out.shape[0])
    if local.mask is not None and local.mask.is_cpu:
        _core.check_mask(local.mask.data_ptr(), DTYPES[local.mask.dtype], n, local.mask.numel())
    return _RankRollouts(
        keys,
        outcomes_of(local.rewards, local.mask).to("cpu", torch.float64),
        None if prior is None else placed("prior", values_of("prior", prior), torch.float64, torch.device("cpu")),
        torch.ones(n, dtype=torch.bool, device="cpu") if local.valid is None else local.valid.cpu(),
        None if trajectory_ids is None else _key_list("trajectory_ids", trajectory_ids),
        None if local.energy is None else local.energy.cpu(),
    )


def _key_list(name: str, ids: Array | Sequence[str]) -> list[Any]:
    """Ids as the caller gave them. Numbering them here would give each rank numbers of its own."""
    keys = ids if isinstance(ids, torch.Tensor) else keys_of(name, ids)
    return integer_ids(name, keys, tracing=False)[0].tolist() if isinstance(keys, torch.Tensor) else list(keys)


def across_ranks(
    process_group: dist.ProcessGroup,
    given: tuple[Any, ...],
    prior: Array | None,
    group_ids: Array | Sequence[str] | None,
    group_offsets: Array | None,
    num_groups: int | None,
    rule: Method,
    options: Options,
    backend: str | None,
) -> tuple[torch.Tensor, AdvantageStats]:
    """The advantages of this rank's rollouts, in its own layout, and the statistics of its groups.

    Args:
        given: the arguments of `read_rollouts`.

    Raises:
        ValueError: an argument is invalid on some rank. Every rank raises the same message, which names that rank.
    """
    if not isinstance(process_group, dist.ProcessGroup):
        raise ValueError(
            f"process_group={shown(process_group)} is no process group of torch.distributed that this process belongs to; "
            "give one, such as dist.group.WORLD"
        )
    local: tuple[Rollouts, torch.Tensor] | None = None
    mine: _RankRollouts | str
    trajectory_ids = given[4]
    try:
        rollouts, out = read_rollouts(*given)
        local = rollouts._replace(energy=energy_for(rule, rollouts)), out
        mine = _of_this_rank(*local, trajectory_ids, prior, group_ids, group_offsets, num_groups)
    except Exception as error:  # the other ranks wait for this one, so every error is sent to them
        mine = str(error) if isinstance(error, ValueError) else repr(error)
    ranks: list[Any] = [None] * dist.get_world_size(process_group)
    dist.all_gather_object(ranks, mine, group=process_group)
    for rank, theirs in enumerate(ranks):
        if isinstance(theirs, str):
            raise ValueError(f"{theirs} (on rank {rank} of the process group)")
    assert local is not None
    own, out = local
    device = own.rewards.device

    all_keys = [key for rank in ranks for key in rank.keys]
    ids, found = _core.factorize(all_keys) if num_groups is None else (np.array(all_keys, dtype=np.int64), num_groups)
    starts = np.cumsum([0, *(len(rank.keys) for rank in ranks)])
    groups_of = [_groups_of(ids[start:end], num_groups) for start, end in itertools.pairwise(starts)]
    shared_prior = _shared_prior(ranks, groups_of, found)
    if shared_prior is None and rule.needs_prior:
        raise ValueError(f"prior: needed by method={rule.name!r}; give (G,) values in reward units")
    if len({rank.trajectories is None for rank in ranks}) > 1:
        raise ValueError("trajectory_ids: given on some ranks only; give them on all or on none")
    union, advantages = read_rollouts(
        torch.cat([rank.outcomes for rank in ranks]).to(device),
        None,
        None,
        torch.cat([rank.valid for rank in ranks]),
        None if trajectory_ids is None else [key for rank in ranks for key in rank.trajectories],
        None if own.energy is None else torch.cat([rank.energy for rank in ranks]),
        torch.float64,
        None,
        tracing=False,
    )
    groups = read_groups(torch.from_numpy(ids).to(device), None, found, len(ids), device, tracing=False)
    whole_prior = None if shared_prior is None else read_prior(shared_prior, found, device)
    table = compute(union, groups, whole_prior, options, advantages, True, backend_for(backend, device, tracing=False))
    me = dist.get_rank(process_group)
    own_groups = torch.from_numpy(groups_of[me]).to(device)
    stats = AdvantageStats(None if whole_prior is None else whole_prior[own_groups], table[:, own_groups], options.baseline)
    return _spread(advantages[starts[me] : starts[me + 1]], own, out), stats


def _groups_of(ids: NDArray[np.int64], num_groups: int | None) -> NDArray[np.int64]:
    """The positions of a rank's groups among all groups, in the order of the rank's prior and statistics."""
    if num_groups is not None:
        return np.arange(num_groups)
    groups, first = np.unique(ids, return_index=True)
    return groups[np.argsort(first)]


def _shared_prior(ranks: Sequence[_RankRollouts], groups_of: Sequence[NDArray[np.int64]], found: int) -> torch.Tensor | None:
    """(found,) priors of the groups of all ranks, NaN for a group without one; None if no rank has a prior."""
    if all(rank.prior is None for rank in ranks):
        return None
    shared = torch.full((found,), torch.nan, dtype=torch.float64, device="cpu")
    for rank, (theirs, groups) in enumerate(zip(ranks, groups_of, strict=True)):
        prior = theirs.prior
        if prior is None or tuple(prior.shape) != groups.shape:
            raise ValueError(
                f"prior: rank {rank} has {len(groups)} groups and gave "
                + ("no prior" if prior is None else f"shape {tuple(prior.shape)}")
                + "; every rank gives one value for each of its groups"
            )
        known = shared[torch.from_numpy(groups)]
        contradicted = (known != prior) & ~known.isnan() & ~prior.isnan()
        if contradicted.any():
            g = int(contradicted.nonzero()[0])
            raise ValueError(
                f"prior: rank {rank} gave {prior[g].item()} for a group that an earlier rank gave {known[g].item()}; "
                "give a group's prior alike on all its ranks, or NaN on all but one"
            )
        shared[torch.from_numpy(groups)] = torch.where(prior.isnan(), known, prior)
    return shared


def _spread(advantages: torch.Tensor, rollouts: Rollouts, out: torch.Tensor) -> torch.Tensor:
    """Write (N,) advantages into the padded, packed or per-rollout `out`."""
    values = advantages.to(out.dtype)
    if rollouts.mask is not None:
        return torch.where(rollouts.mask == 1, values[:, None], torch.zeros((), dtype=out.dtype, device=out.device), out=out)
    if rollouts.cu_seqlens is not None:
        values = values.repeat_interleave(rollouts.cu_seqlens.diff(), output_size=out.numel())
    return out.copy_(values)
