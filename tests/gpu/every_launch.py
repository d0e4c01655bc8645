"""One call of the op for every kernel and every way to launch it, on sizes that do not fill a block. CUDA graphs capture these
calls, and a memory checker watches them.

compute-sanitizer python tests/gpu/every_launch.py    # makes each call once on the GPU
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch

from v05.kernels.grouping.launch import MOST_ROWS
from v05.ops import AdvantageOutput, fused_advantage

N, T, G = 45, 37, 7
MANY = MOST_ROWS + 3  # more rows than the grouping kernel takes, so that their ids are sorted


@dataclass(frozen=True, eq=False)
class Inputs:
    """Tensors on one device. They stay in place when their values change."""

    rewards: torch.Tensor
    token_rewards: torch.Tensor
    many_rewards: torch.Tensor
    prior: torch.Tensor
    ids: torch.Tensor
    many_ids: torch.Tensor
    offsets: torch.Tensor
    mask: torch.Tensor
    long_mask: torch.Tensor
    cu_seqlens: torch.Tensor
    valid: torch.Tensor
    trajectories: torch.Tensor
    energy: torch.Tensor
    total: int

    def change(self) -> None:
        """Other rewards in the same memory."""
        for rewards in (self.rewards, self.token_rewards, self.many_rewards):
            rewards.copy_(0.75 - rewards / 2)


def make_inputs(device: torch.device) -> Inputs:
    draw = torch.Generator().manual_seed(0)
    lengths = torch.randint(0, T + 1, (N,), generator=draw)
    mask = torch.rand(N, T, generator=draw) < 0.6
    bounds = torch.randint(0, N + 1, (G - 1,), generator=draw).sort().values
    ends = torch.tensor([0]), torch.tensor([N])
    rewards, ids = torch.randint(0, 2, (N,), generator=draw), torch.randint(0, G, (N,), generator=draw)
    given = Inputs(
        rewards=rewards.float(),
        token_rewards=torch.rand(N, T, generator=draw) / T,
        many_rewards=torch.rand(MANY, generator=draw),
        prior=torch.rand(G, generator=draw, dtype=torch.float64),
        ids=ids,
        many_ids=torch.randint(0, G, (MANY,), generator=draw),
        offsets=torch.cat((ends[0], bounds, ends[1])),
        mask=mask,
        long_mask=mask.long(),
        cu_seqlens=torch.cat((ends[0], lengths.cumsum(0))),
        valid=torch.rand(N, generator=draw) < 0.8,
        trajectories=2 * ids + rewards,  # rows of one trajectory have one reward
        energy=torch.rand(N, generator=draw),
        total=int(lengths.sum()),
    )
    return Inputs(**{name: v.to(device) if isinstance(v, torch.Tensor) else v for name, v in vars(given).items()})


def calls(given: Inputs, backend: Literal["cpp", "triton"] | None = None) -> dict[str, Callable[[], AdvantageOutput]]:
    """The calls by name. Each makes a new output, except for packed rows: their buffer is made here."""
    packed = torch.full((given.total,), math.nan, device=given.rewards.device)
    by_ids = {"group_ids": given.ids, "num_groups": G, "backend": backend}
    by_offsets = {"group_offsets": given.offsets, "backend": backend}
    many = by_ids | {"group_ids": given.many_ids}
    some = by_ids | {"group_ids": given.ids[1:], "response_mask": given.mask[1:]}
    leave = {"leave_one_out": True}
    every_option = {"valid": given.valid, "trajectory_ids": given.trajectories, "scale": "batch"}
    r, tokens, p, mask, long_mask = given.rewards, given.token_rewards, given.prior, given.mask, given.long_mask
    return {
        "rollouts": lambda: fused_advantage(r, p, **by_ids),
        "no statistics": lambda: fused_advantage(r, p, **by_ids, stats=False),
        "padded": lambda: fused_advantage(r, p, **by_ids, response_mask=mask),
        "contiguous": lambda: fused_advantage(r, p, **by_offsets, response_mask=long_mask),
        "packed": lambda: fused_advantage(r, p, **by_ids, cu_seqlens=given.cu_seqlens, out=packed),
        "bfloat16": lambda: fused_advantage(r, p, **by_offsets, response_mask=mask, dtype=torch.bfloat16),
        "token rewards": lambda: fused_advantage(tokens, p, **by_ids, response_mask=mask),
        "token rewards, int64 mask": lambda: fused_advantage(tokens, p, **by_offsets, response_mask=long_mask),
        "every option": lambda: fused_advantage(r, p, **by_ids, response_mask=mask, **every_option),
        "groups of the batch": lambda: fused_advantage(r, **by_ids, method="js"),
        "energies": lambda: fused_advantage(r, **by_ids, method="otb", energy=given.energy, response_mask=mask),
        "calibrated": lambda: fused_advantage(r, p, **by_ids, method="calibrated", response_mask=mask, **leave),
        "optimal": lambda: fused_advantage(r, p, **by_ids, method="optimal", **leave),
        "many": lambda: fused_advantage(given.many_rewards, p, **many),
        "misaligned": lambda: fused_advantage(r[1:], p, **some),
    }


if __name__ == "__main__":
    for name, call in calls(make_inputs(torch.device("cuda"))).items():
        call()
        torch.cuda.synchronize()
        print("made:", name)
