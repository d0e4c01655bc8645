"""Batches that users of RL trainers reported as computed wrongly, with the right advantages, worked out by hand."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import numpy as np
import pytest
import torch

NAN = math.nan
TOLERANCE = 1e-5  # covers eps in the divisors and float32 in the tensors
STEP = 2.0**-10  # the smallest difference that float32 holds at 8192


@dataclass(frozen=True)
class Situation:
    """N rows and their advantages.

    Attributes:
        rewards, groups: (N,) reward and group id of each row.
        expected: (N,) advantages.
        priors: success rate predicted for a group; 0.5 for groups without an entry.
        trajectories: (N,) trajectory of each row; rows of one trajectory are parts of one rollout. None: each row is a rollout.
        lengths: (N,) tokens of each row; None: 2 each.
    """

    name: str
    method: str
    rewards: list[float]
    groups: str
    expected: list[float]
    priors: dict[str, float] = field(default_factory=dict)
    leave_one_out: bool = False
    reward_range: tuple[float, float] = (0.0, 1.0)
    trajectories: list[int] | None = None
    lengths: list[int] | None = None

    @property
    def ids(self) -> list[str]:
        return ["pad0" if group == "_" else group for group in self.groups]

    @property
    def valid(self) -> list[bool]:
        """Rows that are neither padding nor rejected. A rejected row has no token."""
        lengths = self.lengths or [2] * len(self.groups)
        return [group != "_" and length > 0 for group, length in zip(self.groups, lengths, strict=True)]

    @property
    def prior(self) -> list[float]:
        """Predicted reward of each group, in order of the groups' first rows; NaN for padding."""
        low, high = self.reward_range
        rates = {"pad0": NAN} | self.priors
        return [low + rates.get(group, 0.5) * (high - low) for group in dict.fromkeys(self.ids)]

    @property
    def mask(self) -> torch.Tensor:
        lengths = torch.tensor([2] * len(self.rewards) if self.lengths is None else self.lengths)
        return (torch.arange(3) < lengths[:, None]).long()

    @property
    def token_rewards(self) -> torch.Tensor:
        """(N, 3) float32, the reward at the last token. If the mask holds no token, the reward is at the row's end, where verl puts
        it.
        """
        rewards = torch.zeros(len(self.rewards), 3)
        rewards[torch.arange(len(rewards)), self.mask.sum(1) - 1] = torch.tensor(self.rewards, dtype=torch.float32)
        return rewards

    @property
    def expected_tokens(self) -> torch.Tensor:
        return torch.tensor(self.expected, dtype=torch.float32)[:, None] * self.mask


SITUATIONS = [
    Situation("uneven groups", "dr_grpo", [1, 0, 0, 1, 1, 1, 0], "aaaabbb", [1 / 2, -1 / 2, -1 / 2, 1 / 2, 1 / 3, 1 / 3, -2 / 3]),
    Situation("uneven groups with a prior", "v05", [1, 0, 0, 1, 1, 1, 1], "aaaabbb", [0.6, -0.4, -0.4, 0.6, 5 / 54, 5 / 54, 5 / 54],
              priors={"a": 0.4, "b": 0.1}),
    Situation("rows of a group not adjacent", "dr_grpo", [1, 1, 0, 1, 0, 0, 1], "abababa",
              [1 / 2, 1 / 3, -1 / 2, 1 / 3, -1 / 2, -2 / 3, 1 / 2]),
    Situation("a singleton has no baseline but itself", "grpo", [1, 1, 0], "abb", [0, 0.5**0.5, -(0.5**0.5)]),
    Situation("a singleton has its prior", "v05", [1, 1, 0], "abb", [0.25, 0.5, -0.5], priors={"a": 0.75}),
    Situation("one NaN reward in a group", "dr_grpo", [1, NAN, 0, 1, 1, 0], "aaabbb", [0.5, 0, -0.5, 1 / 3, 1 / 3, -2 / 3]),
    Situation("all rewards of a group NaN", "v05", [NAN, NAN, 1, 0], "aabb", [0, 0, 0.5, -0.5]),
    Situation("one success, leave one out, scaled", "grpo", [1, 0, 0, 0], "aaaa", [2, -2 / 3, -2 / 3, -2 / 3], leave_one_out=True),
    Situation("all alike, scaled", "grpo", [0.1, 0.1, 0.1, 1, 0], "aaabb", [0, 0, 0, 0.5**0.5, -(0.5**0.5)]),
    Situation("nearly equal at a large offset", "grpo", [8192, 8192 + STEP, 8192 + 2 * STEP], "aaa",
              [-1 / (1 + 1e-6 / STEP), 0, 1 / (1 + 1e-6 / STEP)]),
    Situation("rows of one trajectory count once", "dr_grpo", [1, 1, 0], "aaa", [0.5, 0.5, -0.5], trajectories=[0, 0, 1]),
    Situation("a rejected row", "dr_grpo", [1, 1, 0, 0], "aaaa", [2 / 3, 0, -1 / 3, -1 / 3], lengths=[2, 0, 2, 2]),
    Situation("a rejected row beside a prior", "v05", [1, 0, 0, 1, 0], "aaabb", [0.75, -0.25, 0, 0.5, 0], priors={"a": 0.25},
              lengths=[2, 1, 0, 3, 0]),
    Situation("all rows of a group rejected", "v05", [1, 0, 1, 0], "aabb", [0, 0, 0.5, -0.5], lengths=[0, 0, 2, 2]),
    Situation("padding rows", "v05", [1, 0, 0, 1], "aa__", [0.5, -0.5, 0, 0]),
]  # fmt: skip


def situations(*without: str) -> list[object]:
    """The situations as pytest parameters, without those whose name contains one of the words."""
    return [pytest.param(case, id=case.name) for case in SITUATIONS if not any(word in case.name for word in without)]


class FixedPrior:
    """Success rates by prompt text, 0.5 for an unknown prompt. Remembers what it was taught."""

    def __init__(self, rates: dict[str, float] | None = None) -> None:
        self.rates = rates or {}
        self.learnt: dict[str, tuple[float, float]] = {}

    def predict(self, prompts):
        return np.array([self.rates.get(prompt, 0.5) for prompt in prompts])

    def observe(self, prompts, successes, trials):
        self.learnt.update(zip(prompts, zip(successes, trials, strict=True), strict=True))

    def state_dict(self):
        return {}

    def load_state_dict(self, state):
        pass
