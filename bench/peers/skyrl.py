"""SkyRL's unchanged estimator, called with tensors as in its trainer."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from skyrl.backends.skyrl_train.utils import ppo_utils


def loop(token_rewards: torch.Tensor, mask: torch.Tensor, uid: NDArray[np.object_]) -> torch.Tensor:
    advantages: torch.Tensor = ppo_utils.compute_grpo_outcome_advantage(token_rewards, mask, uid)[0]
    return advantages
