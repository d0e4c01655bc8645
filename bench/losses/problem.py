"""One batch (hidden states or logits, targets, old log-probabilities and advantages), and its loss in plain torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch

ROLLOUT = 1024  # tokens per rollout
CLIP = 0.2
Start = Literal["logits", "hidden"]


class Size(NamedTuple):
    """The size of a problem. `hidden` is 0 if it starts from logits."""

    tokens: int
    vocabulary: int
    hidden: int


@dataclass(frozen=True)
class Problem:
    """N rollouts of T tokens.

    Attributes:
        given: (N, T, V) logits or (N, T, H) hidden states, with gradient.
        weight: (V, H) weight of the output layer, with gradient. None for logits.
        targets: (N, T) int64 token ids.
        old: (N, T) float32 old log-probabilities.
        mask: (N, T) bool, all ones.
        advantages: (N,).
    """

    given: torch.Tensor
    weight: torch.Tensor | None
    targets: torch.Tensor
    old: torch.Tensor
    mask: torch.Tensor
    advantages: torch.Tensor

    @property
    def leaves(self) -> tuple[torch.Tensor, ...]:
        return (self.given,) if self.weight is None else (self.given, self.weight)

    def gradients(self) -> list[torch.Tensor]:
        """The gradients of the last backward pass, which are then cleared."""
        found = [leaf.grad for leaf in self.leaves]
        for leaf in self.leaves:
            leaf.grad = None
        return [gradient for gradient in found if gradient is not None]


def make_problem(size: Size, device: torch.device, dtype: torch.dtype) -> Problem:
    generator = torch.Generator(device).manual_seed(0)
    rollouts, length = max(size.tokens // ROLLOUT, 1), min(size.tokens, ROLLOUT)

    def normal(*shape: int, scale: float) -> torch.Tensor:
        made = torch.empty(shape, device=device, dtype=dtype)
        return made.normal_(0, scale, generator=generator).requires_grad_()

    weight = None
    if size.hidden:
        given = normal(rollouts, length, size.hidden, scale=1.0)
        weight = normal(size.vocabulary, size.hidden, scale=2 / size.hidden**0.5)
    else:
        given = normal(rollouts, length, size.vocabulary, scale=2.0)
    targets = torch.randint(size.vocabulary, (rollouts, length), device=device, generator=generator)
    return Problem(
        given=given,
        weight=weight,
        targets=targets,
        # -(log V + 2) is near the log-probability of a random token, but so far from it that some ratios are clipped.
        old=torch.full((rollouts, length), -float(torch.tensor(size.vocabulary).log()) - 2.0, device=device),
        mask=torch.ones((rollouts, length), dtype=torch.bool, device=device),
        advantages=torch.randn(rollouts, device=device, generator=generator),
    )


def plain_loss(logprob: torch.Tensor, problem: Problem) -> torch.Tensor:
    """A straightforward version of the clipped loss, averaged over all tokens."""
    ratio = (logprob - problem.old).exp()
    advantages = problem.advantages[:, None]
    surrogate = torch.minimum(ratio * advantages, ratio.clamp(1 - CLIP, 1 + CLIP) * advantages)
    return -(surrogate * problem.mask).sum() / problem.mask.sum()
