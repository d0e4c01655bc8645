"""One batch of a trainer in all the forms that the cases need, with output buffers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray


class Shape(NamedTuple):
    rollouts: int
    tokens: int  # padded length of a response
    group_size: int

    @property
    def groups(self) -> int:
        return self.rollouts // self.group_size

    def __str__(self) -> str:
        return f"{self.rollouts} x {self.tokens}, groups of {self.group_size}"


SHAPES = (Shape(512, 1024, 8), Shape(4096, 2048, 16), Shape(1024, 8192, 16), Shape(1024, 32768, 16), Shape(16384, 4096, 8))


@dataclass(frozen=True, eq=False)
class Batch:
    """N rollouts of up to T tokens in G groups of one size.

    Attributes:
        rewards: (N,) float32, 0 or 1.
        token_rewards: (N, T) float32, with the reward at the last token.
        prior: (G,) float64.
        offsets: (G + 1,) int64 group offsets.
        ids: (N,) int64 group ids in order.
        any_ids: (N,) int64 group ids in random order.
        uid: (N,) strings, one object per group, as in verl's trainer.
        mask: (N, T) bool, with lengths uniform in 1 .. T.
        long_mask: the same mask as int64, as in verl's trainer.
        cu_seqlens: (N + 1,) int64.
        source, out: (N, T) float32 buffers.
        half_out: (N, T) bfloat16 buffer.
        packed_out: (total tokens,) float32 buffer.
        rows_out: (N,) float32 buffer.
        backend: the argument `backend` of `fused_advantage`: None on a GPU, "triton" for CPU tensors.
    """

    shape: Shape
    rewards: torch.Tensor
    token_rewards: torch.Tensor
    prior: torch.Tensor
    offsets: torch.Tensor
    ids: torch.Tensor
    any_ids: torch.Tensor
    uid: NDArray[np.object_]
    mask: torch.Tensor
    long_mask: torch.Tensor
    cu_seqlens: torch.Tensor
    source: torch.Tensor
    out: torch.Tensor
    half_out: torch.Tensor
    packed_out: torch.Tensor
    rows_out: torch.Tensor
    backend: Literal["triton"] | None


def make_batch(shape: Shape, seed: int, device: torch.device) -> Batch:
    n, t, size = shape
    generator = torch.Generator().manual_seed(seed)
    rewards = torch.randint(0, 2, (n,), generator=generator).float()
    lengths = torch.randint(1, t + 1, (n,), generator=generator)
    ids = torch.arange(n) // size
    uid = np.array([f"{group:08x}-5f3a-4c1e-9d2b-7a6e5c4d3b2a" for group in range(shape.groups)], dtype=object)
    ends = lengths.to(device)[:, None]
    mask = torch.arange(t, device=device) < ends
    return Batch(
        shape=shape,
        rewards=rewards.to(device),
        token_rewards=torch.zeros(n, t, device=device).scatter_(1, ends - 1, rewards.to(device)[:, None]),
        prior=torch.rand(shape.groups, generator=generator, dtype=torch.float64).to(device),
        offsets=torch.arange(0, n + 1, size).to(device),
        ids=ids.to(device),
        any_ids=ids[torch.randperm(n, generator=generator)].to(device),
        uid=uid.repeat(size),
        mask=mask,
        long_mask=mask.long(),
        cu_seqlens=torch.cat((torch.zeros(1, dtype=torch.int64), lengths.cumsum(0))).to(device),
        source=torch.rand(n, t, device=device),
        out=torch.empty(n, t, device=device),
        half_out=torch.empty(n, t, device=device, dtype=torch.bfloat16),
        packed_out=torch.empty(int(lengths.sum()), device=device),
        rows_out=torch.empty(n, device=device),
        backend=None if device.type == "cuda" else "triton",
    )


def batches_beyond(cache_bytes: int, shape: Shape) -> int:
    """How many batches exceed a cache of that size, so that no batch is still in the cache when its turn comes again.

    A padded token takes 5 bytes. The batches exceed four times the cache, because packed and bfloat16 calls use half of these
    bytes.
    """
    return max(2, -(-4 * cache_bytes // (5 * shape.rollouts * shape.tokens)))
