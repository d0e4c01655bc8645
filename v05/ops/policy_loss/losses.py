"""The table of policy losses, and `Importance`, the settings of importance weights.

A loss is a row of data, not code. Let d be the log-ratio of a token's new probability to its old one, or with ratio "sequence" the
mean of d over the rollout's tokens. Let r = exp(d), and let A be the rollout's advantage. The loss of a token is then

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
    """The formula of a token's loss, see above. `kernels/policy_loss/kernel.py` has the same numbers."""

    CLIPPED = 0
    WEIGHTED = 1


@dataclass(frozen=True)
class Loss:
    """A row of the table `LOSSES`: a formula, and the settings that its paper prescribes.

    Attributes:
        name: the name for `policy_loss(loss=...)`.
        surrogate: which formula above.
        ratio: "token" if each token has its own log-ratio, "sequence" if all tokens have the mean of their rollout.
        clip_low, clip_high: the ratio is clipped to between 1 - clip_low and 1 + clip_high.
        clip_dual: the largest ratio for a negative advantage; math.inf for no limit.
        aggregation: how the losses of tokens add up to the loss of the batch (`loss_weights`).
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
KL_ESTIMATORS = {"k1": 1, "k2": 2, "k3": 3}  # kernels/policy_loss/kernel.py has the same numbers; 0 is no KL term


@dataclass(frozen=True)
class Importance:
    """Bounds and level of importance weights, which correct for tokens that were sampled by a slightly different policy.

    The policy of an inference engine can differ from the trainer's, for example in precision or because it is a few steps old. The
    importance weight is the old policy's probability over the sampler's, of a token or of a whole rollout, within bounds.

    Attributes:
        cap, floor: the bounds of the ratio, dimensionless, at least 0.
        level: "token" weighs each token by its own ratio, which has less noise and some bias. "sequence" weighs all tokens of a
            rollout by the product of their ratios.
        beyond: for ratios out of bounds, "truncate" uses the nearer bound, "mask" uses the weight 0.

    TRL and verl have truncation at both levels. "mask" corresponds to the masking mode of TRL and to IcePop in verl.

    Raises:
        ValueError: a field has an unknown value, or floor is above cap.
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
