"""Copies of arithmetic that other libraries have inside a trainer's method, where it cannot be called; and a plain torch version.

All functions except `plain_torch` take equal groups in contiguous rows, as those trainers do.
"""

from __future__ import annotations

import torch

TRL_EPS = 1e-4
OPENRLHF_EPS = 1e-9
PLAIN_EPS = 1e-6


def trl(rewards: torch.Tensor, group_size: int) -> torch.Tensor:
    """TRL 1.16.0, GRPOTrainer: means and standard deviations that ignore NaN, repeated for each rollout."""
    grouped = rewards.view(-1, group_size)
    mean = grouped.nanmean(dim=1).repeat_interleave(group_size, dim=0)
    known = (~grouped.isnan()).sum(dim=1)
    variance = (grouped - grouped.nanmean(dim=1, keepdim=True)).square().nanmean(dim=1) * (known / (known - 1))
    deviation = variance.sqrt().repeat_interleave(group_size, dim=0)
    return ((rewards - mean) / (deviation + TRL_EPS)).nan_to_num(nan=0.0)


def openrlhf(rewards: torch.Tensor, group_size: int) -> torch.Tensor:
    """OpenRLHF 0.11.2, RemoteExperienceMaker, estimator group_norm: mean and standard deviation of each row of a matrix."""
    grouped = rewards.reshape(-1, group_size)
    return ((grouped - grouped.mean(-1, keepdim=True)) / (grouped.std(-1, keepdim=True) + OPENRLHF_EPS)).reshape(-1)


def plain_torch(rewards: torch.Tensor, ids: torch.Tensor, groups: int) -> torch.Tensor:
    """Two passes of index_add_ for the moments, and a gather, in the dtype of the rewards."""
    zeros = rewards.new_zeros(groups)
    count = zeros.index_add(0, ids, torch.ones_like(rewards))
    deviation = rewards - (zeros.index_add(0, ids, rewards) / count)[ids]
    std = (zeros.index_add(0, ids, deviation**2) / (count - 1)).sqrt()
    return deviation / (std[ids] + PLAIN_EPS)
