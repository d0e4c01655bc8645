"""The table of policy losses: what each does to a token's probability ratio, and what its paper prescribes beside; and the weights
by which truncated importance sampling makes up for an engine's own policy.

A loss is a row of data, not code. With d the log-ratio of a token, new over old, or the mean of its rollout's ("sequence"),
r = exp(d), and A the rollout's advantage, a token's loss is

    CLIPPED   -A min(r, 1 + clip_high)                    where A >= 0,
              -A min(max(r, 1 - clip_low), clip_dual)     where A < 0
    WEIGHTED  -A clip(r, 1 - clip_low, 1 + clip_high) logprob, in which the ratio carries no gradient.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from enum import IntEnum
from typing import Literal

from v05.arguments import choice, nonnegative

Aggregation = Literal["token", "sequence", "constant"]
Level = Literal["token", "sequence"]
KlEstimator = Literal["k1", "k2", "k3"]


class Surrogate(IntEnum):
    """What a loss does to the ratio. The numbers are shared with `kernels/policy_loss/kernel.py`."""

    CLIPPED = 0
    WEIGHTED = 1


@dataclass(frozen=True)
class Loss:
    """A row of the table.

    Attributes:
        ratio: whose log-ratio a token has, its own or its rollout's mean.
        clip_low, clip_high: the ratio is held between 1 - clip_low and 1 + clip_high, as the formulas above say.
        clip_dual: the largest ratio of a negative advantage; infinite: none.
        aggregation: of tokens and rollouts to the batch's loss (`loss_weights`).
        source: the paper.
    """

    name: str
    surrogate: Surrogate
    ratio: Level
    clip_low: float
    clip_high: float
    clip_dual: float
    aggregation: Aggregation
    source: str


LOSSES: Mapping[str, Loss] = {
    loss.name: loss
    for loss in (
        Loss("ppo", Surrogate.CLIPPED, "token", 0.2, 0.2, math.inf, "token", "arXiv 1707.06347"),
        Loss("grpo", Surrogate.CLIPPED, "token", 0.2, 0.2, math.inf, "sequence", "arXiv 2402.03300"),
        Loss("dapo", Surrogate.CLIPPED, "token", 0.2, 0.28, math.inf, "token", "arXiv 2503.14476"),
        Loss("dr_grpo", Surrogate.CLIPPED, "token", 0.2, 0.2, math.inf, "constant", "arXiv 2503.20783"),
        Loss("dual_clip", Surrogate.CLIPPED, "token", 0.2, 0.2, 3.0, "token", "arXiv 1912.09729"),
        Loss("gspo", Surrogate.CLIPPED, "sequence", 3e-4, 4e-4, math.inf, "sequence", "arXiv 2507.18071"),
        Loss("cispo", Surrogate.WEIGHTED, "token", 1.0, 4.0, math.inf, "token", "arXiv 2506.13585"),
    )
}
KL_ESTIMATORS = {"k1": 1, "k2": 2, "k3": 3}  # shared by number with kernels/policy_loss/kernel.py; 0 is none


@dataclass(frozen=True)
class Importance:
    """Weights of tokens that make up for an engine whose policy is not quite the trainer's (another precision, a stale step):
    the old policy's probability over the sampler's, of a token or of a whole rollout, held within bounds.

    Attributes:
        cap, floor: the bounds; "truncate" takes the nearer one, "mask" leaves out what is beyond them.
        level: "token" weighs each token by its own ratio (less noise, some bias), "sequence" all tokens of a rollout by their
            product.

    Truncated importance sampling at token and sequence level is TRL's and verl's; "mask" is TRL's mask and verl's IcePop.

    Raises:
        ValueError: a field is not one of these, or floor is above cap.
    """

    cap: float = 2.0
    floor: float = 0.0
    level: Level = "token"
    beyond: Literal["truncate", "mask"] = "truncate"

    def __post_init__(self) -> None:
        choice("level", self.level, ("token", "sequence"))
        choice("beyond", self.beyond, ("truncate", "mask"))
        if nonnegative("floor", self.floor) > nonnegative("cap", self.cap):
            raise ValueError(f"floor={self.floor} is above cap={self.cap}; give bounds in order")
