"""The backends: torch on the CPU and one Triton launch on a GPU. Both are called as

    backend(tokens, rollouts, options) -> loss, gradient, figures

Their arguments have been checked, are contiguous and are on one device. The gradient is the derivative of the loss with respect to
each token's log-probability. A backward pass multiplies it by the upstream gradient, a scalar.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple, TypeAlias

import torch

from v05.ops.policy_loss.losses import Surrogate

FARTHEST = 20.0  # log-ratios are clipped to it, without a gradient; verl's bound, far beyond what any loss keeps
FIGURES = (
    "tokens",
    "kl",
    "clip_fraction",
    "dual_clip_fraction",
    "ratio",
    "approx_kl",
    "importance",
    "beyond_fraction",
    "mismatch",
)  # the order of the table, shared with kernels/policy_loss/kernel.py


class Tokens(NamedTuple):
    """Log-probabilities of tokens, float32: (tokens,) packed or (N, T) padded."""

    logprob: torch.Tensor
    old: torch.Tensor
    sampler: torch.Tensor | None
    reference: torch.Tensor | None
    mask: torch.Tensor | None  # (N, T) bool or integers, 1 for the tokens that count; None if packed
    cu_seqlens: torch.Tensor | None  # (N + 1,) int64; None if padded


class Rollouts(NamedTuple):
    """(N,) float32 each: the advantages of rollouts, and the weights of their tokens."""

    advantages: torch.Tensor
    weights: torch.Tensor


class Options(NamedTuple):
    """The loss, the importance weights and the KL term as numbers, in the order of the operator's schema."""

    surrogate: int
    of_sequence: bool  # whether a rollout's tokens share one ratio
    clip_low: float
    clip_high: float
    clip_dual: float
    importance: int  # 0: none; 1: by token; 2: by sequence
    masks_beyond: bool
    cap: float
    floor: float
    kl: int  # 0: none; else a number of KL_ESTIMATORS
    kl_coefficient: float


Results: TypeAlias = tuple[torch.Tensor, torch.Tensor, torch.Tensor]
Backend: TypeAlias = Callable[[Tokens, Rollouts, Options], Results]


class _Layout:
    """The mapping between tokens and rollouts of a padded or packed batch."""

    def __init__(self, tokens: Tokens) -> None:
        self.inside: torch.Tensor | None = None
        if tokens.mask is not None:
            self.inside = tokens.mask == 1
            return
        assert tokens.cu_seqlens is not None
        lengths = tokens.cu_seqlens.diff()
        self._rollouts = len(lengths)
        self._rollout_of = torch.repeat_interleave(lengths, output_size=len(tokens.logprob))

    def of_tokens(self, values: torch.Tensor) -> torch.Tensor:
        """Each rollout's value of (N,) values, in a shape that broadcasts with its tokens."""
        return values[self._rollout_of] if self.inside is None else values[:, None]

    def counted(self, values: torch.Tensor) -> torch.Tensor:
        """The values of tokens, with 0 outside the mask."""
        return values if self.inside is None else torch.where(self.inside, values, 0.0)

    def of_rollouts(self, values: torch.Tensor) -> torch.Tensor:
        """(N,) sums over the tokens of each rollout."""
        if self.inside is not None:
            return self.counted(values).sum(-1)
        return values.new_zeros(self._rollouts).index_add_(0, self._rollout_of, values)

    def lengths(self, like: torch.Tensor) -> torch.Tensor:
        """(N,) number of tokens that count."""
        return self.of_rollouts(torch.ones_like(like))


def run_torch(tokens: Tokens, rollouts: Rollouts, options: Options) -> Results:
    """Compute with torch, on any device."""
    layout = _Layout(tokens)
    difference = layout.counted(tokens.logprob - tokens.old)
    advantage, weight = layout.of_tokens(rollouts.advantages), layout.counted(layout.of_tokens(rollouts.weights))
    lengths = layout.lengths(difference)
    log_ratio = difference
    if options.of_sequence:
        log_ratio = layout.of_tokens(layout.of_rollouts(difference) / lengths.clamp(min=1))
    loss, slope, clipped, dual_clipped, ratio = _surrogate(tokens.logprob, log_ratio, advantage, options)
    figures = dict.fromkeys(FIGURES, loss.new_tensor(torch.nan, dtype=torch.float64))
    if options.importance:
        assert tokens.sampler is not None
        gap = layout.counted(tokens.old - tokens.sampler)
        by = layout.of_tokens(layout.of_rollouts(gap)) if options.importance == 2 else gap
        importance, beyond = _importance(by, options)
        loss, slope = loss * importance, slope * importance
        figures |= {"importance": _total(layout, importance), "beyond_fraction": _total(layout, beyond)}
        figures["mismatch"] = _total(layout, gap.abs())
    if options.kl:
        assert tokens.reference is not None
        kl, kl_slope = _kl(layout.counted(tokens.reference - tokens.logprob), options.kl)
        loss, slope = loss + options.kl_coefficient * kl, slope + options.kl_coefficient * kl_slope
        figures["kl"] = (weight * kl).sum(dtype=torch.float64)
    figures["tokens"] = count = lengths.sum(dtype=torch.float64)
    figures |= {"clip_fraction": _total(layout, clipped), "dual_clip_fraction": _total(layout, dual_clipped)}
    figures |= {"ratio": _total(layout, ratio), "approx_kl": -difference.sum(dtype=torch.float64)}
    summed = torch.stack([figures[name] for name in FIGURES])
    summed[2:] /= count
    total = layout.counted(weight * loss).sum(dtype=torch.float64)
    return total.float(), layout.counted(weight * slope), summed


def _total(layout: _Layout, values: torch.Tensor) -> torch.Tensor:
    return layout.counted(values.float()).sum(dtype=torch.float64)


def _surrogate(
    logprob: torch.Tensor, log_ratio: torch.Tensor, advantage: torch.Tensor, options: Options
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """For each token: (loss, its slope in the log-probability, whether clipped, whether dual-clipped, ratio)."""
    ratio = log_ratio.clamp(-FARTHEST, FARTHEST).exp()
    lowest, highest = 1 - options.clip_low, 1 + options.clip_high
    below, above = ratio < lowest, ratio > highest
    if options.surrogate == Surrogate.WEIGHTED:
        slope = -advantage * ratio.clamp(lowest, highest)
        return slope * logprob, slope, below | above, torch.zeros_like(below), ratio
    rises = advantage >= 0
    factor = torch.where(rises, ratio.clamp(max=highest), ratio.clamp(min=lowest))
    dual = ~rises & (factor > options.clip_dual)
    factor = torch.where(dual, options.clip_dual, factor)
    stopped = torch.where(rises, above, below)
    flat = stopped | dual | (log_ratio.abs() > FARTHEST)
    slope = torch.where(flat, 0.0, -advantage * ratio)
    return -advantage * factor, slope, stopped & (advantage != 0), dual, ratio


def _importance(log_ratio: torch.Tensor, options: Options) -> tuple[torch.Tensor, torch.Tensor]:
    """(weights, whether out of bounds) from the log-ratio of the old policy to the sampler."""
    ratio = log_ratio.clamp(-FARTHEST, FARTHEST).exp()
    beyond = (ratio > options.cap) | (ratio < options.floor)
    if options.masks_beyond:
        return torch.where(beyond, 0.0, ratio), beyond
    return ratio.clamp(options.floor, options.cap), beyond


def _kl(difference: torch.Tensor, estimator: int) -> tuple[torch.Tensor, torch.Tensor]:
    """(estimated divergence, its slope in the policy's log-probability) from the reference's log-probability minus the policy's."""
    if estimator == 1:
        return -difference, torch.ones_like(difference)
    if estimator == 2:
        return difference.square() / 2, -difference
    ratio = difference.clamp(-FARTHEST, FARTHEST).exp()
    slope = torch.where(difference.abs() > FARTHEST, 0.0, 1 - ratio)
    return ratio - difference.clamp(-FARTHEST, FARTHEST) - 1, slope
