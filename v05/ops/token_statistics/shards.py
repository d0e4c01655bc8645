"""A vocabulary that is split in equal shards over the ranks of a process group."""

from __future__ import annotations

from functools import cache

import torch
import torch.distributed as dist

_GROUPS: dict[str, dist.ProcessGroup] = {}  # operators get a group's name


def name_of(group: dist.ProcessGroup | None) -> str | None:
    if group is None:
        return None
    name: str = group.group_name
    _GROUPS[name] = group
    return name


def group_of(name: str | None) -> dist.ProcessGroup | None:
    return None if name is None else _GROUPS[name]


def first_of_shard(group: dist.ProcessGroup | None, size: int, device: torch.device) -> int:
    """The id of the first token of this rank's shard. A ValueError if the shards have different sizes."""
    if group is None:
        return 0
    _refuse_unequal(group, size, device)
    return dist.get_rank(group) * size


def size_of_vocabulary(group: dist.ProcessGroup | None, size: int) -> int:
    return size if group is None else dist.get_world_size(group) * size


def gathered(sums: torch.Tensor, group: dist.ProcessGroup | None) -> torch.Tensor:
    """(shards, ...), the sums of every rank in rank order."""
    if group is None:
        return sums[None]
    world = dist.get_world_size(group)
    everyone = sums.new_empty((world * sums.shape[0], *sums.shape[1:]))
    dist.all_gather_into_tensor(everyone, sums.contiguous(), group)
    return everyone.view(world, *sums.shape)


@cache
def _refuse_unequal(group: dist.ProcessGroup, size: int, device: torch.device) -> None:
    """A ValueError if the shards have different sizes. Cached for each size, because the check synchronises on a GPU."""
    sizes = gathered(torch.full((1,), size, dtype=torch.int64, device=device), group).flatten().tolist()
    if len(set(sizes)) > 1:
        raise ValueError(f"process_group: shards of {sizes} tokens of the vocabulary; pad it so that every rank has as many")
