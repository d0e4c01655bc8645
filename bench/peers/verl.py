"""verl's unchanged estimators, called with tensors as in its trainer."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from verl.trainer.ppo import core_algos


def vectorized(token_rewards: torch.Tensor, mask: torch.Tensor, uid: NDArray[np.object_]) -> torch.Tensor:
    advantages: torch.Tensor = core_algos.compute_grpo_vectorized_outcome_advantage(token_rewards, mask, uid)[0]
    return advantages


def loop(token_rewards: torch.Tensor, mask: torch.Tensor, uid: NDArray[np.object_]) -> torch.Tensor:
    advantages: torch.Tensor = core_algos.compute_grpo_outcome_advantage(token_rewards, mask, uid)[0]
    return advantages
