"""The policy-gradient loss: clipped importance ratios times advantages, aggregated over tokens, rollouts and prompts.

Named departures from the published losses:
- GRPO (arXiv 2402.03300) averages over a fixed group size. Groups differ in size here, so each rollout carries a weight: with
  `group_weighting` "prompt" the rollouts of a group share their prompt's weight; with "rollout" every rollout weighs the same.
  For equal sizes the two agree with the paper.
- DAPO (arXiv 2503.14476) divides the sum over tokens by the number of tokens; "token" aggregation does so with the weights
  above, and is DAPO's under "rollout" weighting.
- Dr. GRPO (arXiv 2503.20783) divides by a constant length. "token" divides by the batch's mean length instead, which differs by
  one factor a batch that Adam absorbs.
- An engine samples from a policy slightly other than the trainer's (another precision, a stale step). Truncated importance sampling
  (as TRL and verl have it) weighs every token by min(trainer's probability / engine's, cap), both before the update.
- The KL term is GRPO's unbiased estimator exp(d) - d - 1, d = log ref - log policy; its coefficient is 0 by default, as in DAPO.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from v05.train.config import Aggregation, GroupWeighting


def rollout_weights(offsets: torch.Tensor, group_weighting: GroupWeighting) -> torch.Tensor:
    """(N,) weights that sum to 1 over the rollouts of G groups with (G+1,) offsets. Empty groups have no say."""
    sizes = offsets.diff()
    if group_weighting == "rollout":
        n = int(sizes.sum())
        return torch.full((n,), 1.0 / max(n, 1), device="cpu")
    groups = int((sizes > 0).sum())
    return (1.0 / (sizes.double() * groups)).repeat_interleave(sizes).float()


def token_weights(weights: torch.Tensor, mask: torch.Tensor, aggregation: Aggregation) -> torch.Tensor:
    """(N, T) weights of tokens from (N,) weights of rollouts: their sum against per-token losses is the batch's loss.

    "sequence": a rollout's weight is spread over its tokens. "token": every token of equally weighted rollouts weighs the same,
    so long completions count for more.
    """
    lengths = mask.sum(-1)
    per_token = weights / (lengths.clamp(min=1) if aggregation == "sequence" else (weights * lengths).sum().clamp(min=1e-12))
    return per_token[:, None] * mask


def importance_weights(trainer_logprobs: torch.Tensor, engine_logprobs: torch.Tensor, cap: float) -> torch.Tensor:
    """(N, T) truncated importance weights of tokens, without gradient; both log-probabilities before the update."""
    return (trainer_logprobs.detach() - engine_logprobs).exp().clamp(max=cap)


def mismatch(
    trainer_logprobs: Sequence[NDArray[np.float32]] | None, engine_logprobs: Sequence[NDArray[np.float32]], cap: float | None
) -> dict[str, float]:
    """How far the engine's policy is from the trainer's, over all tokens of all rollouts; NaN where that was not looked at.

    `mismatch`: mean absolute difference of log-probabilities, nats. `mismatch_ratio`: mean of the trainer's probability / the
    engine's, 1 in expectation. `capped_fraction`: of tokens whose ratio is above `cap`.
    """
    if not trainer_logprobs:
        return dict.fromkeys(("mismatch", "mismatch_ratio", "capped_fraction"), float("nan"))
    difference = np.concatenate(trainer_logprobs) - np.concatenate(engine_logprobs)
    ratio = np.exp(difference)
    return {
        "mismatch": float(np.abs(difference).mean()),
        "mismatch_ratio": float(ratio.mean()),
        "capped_fraction": float((ratio > (cap or np.inf)).mean()),
    }


@dataclass(frozen=True)
class PolicyLoss:
    """`total` to differentiate; the number of tokens whose ratio was `clipped`; `kl` to the reference, None without one."""

    total: torch.Tensor
    clipped: torch.Tensor
    kl: torch.Tensor | None


def policy_loss(
    logprobs: torch.Tensor,
    old_logprobs: torch.Tensor,
    advantages: torch.Tensor,
    weights: torch.Tensor,
    *,
    clip_low: float,
    clip_high: float,
    importance: torch.Tensor | None = None,
    reference_logprobs: torch.Tensor | None = None,
    kl_coefficient: float = 0.0,
) -> PolicyLoss:
    """Clipped surrogate of tokens, all arguments (N, T); `weights` is zero at padding and sums the loss up.

    The ratio is clipped to [1 - clip_low, 1 + clip_high]; clip_high above clip_low is DAPO's clip-higher. `importance`, from
    `importance_weights`, multiplies the surrogate.
    """
    inside = weights != 0
    ratio = torch.where(inside, logprobs - old_logprobs, 0.0).exp()
    clipped = ratio.clamp(1 - clip_low, 1 + clip_high)
    surrogate = torch.minimum(ratio * advantages, clipped * advantages)
    if importance is not None:
        surrogate = torch.where(inside, importance, 0.0) * surrogate
    total = -(weights * surrogate).sum()
    limited = (clipped * advantages < ratio * advantages) & inside
    kl = None
    if reference_logprobs is not None:
        difference = torch.where(inside, reference_logprobs - logprobs, 0.0)
        kl = (weights * (difference.exp() - difference - 1)).sum()
        total = total + kl_coefficient * kl
    return PolicyLoss(total, limited.sum(), kl)
