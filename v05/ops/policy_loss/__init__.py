"""`policy_loss` computes a policy-gradient loss, its gradient and its figures from log-probabilities and advantages in one pass."""

from __future__ import annotations

import math
from typing import Literal, NamedTuple

import torch

from v05.arguments import choice, nonnegative
from v05.ops.policy_loss.compute import Options, Rollouts, Tokens
from v05.ops.policy_loss.library import call_operator
from v05.ops.policy_loss.losses import KL_ESTIMATORS, LOSSES, Aggregation, Importance, KlEstimator, Loss
from v05.ops.policy_loss.weights import loss_weights

__all__ = ["LOSSES", "Importance", "Loss", "LossFigures", "PolicyLoss", "loss_weights", "policy_loss"]

BACKEND_OF_DEVICE = {"cpu": "torch", "cuda": "triton"}
_NO_IMPORTANCE = (0, False, math.inf, 0.0)


class LossFigures(NamedTuple):
    """Figures to monitor: float64 scalars on the loss's device, as means over the tokens that count unless stated otherwise.

    A figure is NaN if it is not defined, for example because no token counts or no sampler is given.

    Attributes:
        tokens: the number of tokens that count.
        kl: the estimated divergence from the reference in nats, weighted like the loss, before `kl_coefficient`.
        clip_fraction: the share of tokens where the clip changed the loss; under "cispo", where the ratio is out of bounds.
        dual_clip_fraction: the share of tokens where the dual clip changed the loss.
        ratio: the new probability over the old one.
        approx_kl: the old log-probability minus the new one in nats, an estimate of the divergence from the old policy.
        importance: the importance weight.
        beyond_fraction: the share of tokens whose importance ratio was out of bounds.
        mismatch: the absolute difference between the log-probabilities of the old policy and of the sampler, in nats.
    """

    tokens: torch.Tensor
    kl: torch.Tensor
    clip_fraction: torch.Tensor
    dual_clip_fraction: torch.Tensor
    ratio: torch.Tensor
    approx_kl: torch.Tensor
    importance: torch.Tensor
    beyond_fraction: torch.Tensor
    mismatch: torch.Tensor


class PolicyLoss(NamedTuple):
    """The result of `policy_loss`.

    Attributes:
        loss: float32 scalar, differentiable in the log-probabilities.
        figures: figures to monitor, without a gradient.
    """

    loss: torch.Tensor
    figures: LossFigures


def policy_loss(
    logprob: torch.Tensor,
    old_logprob: torch.Tensor,
    advantages: torch.Tensor,
    *,
    mask: torch.Tensor | None = None,
    cu_seqlens: torch.Tensor | None = None,
    loss: str = "ppo",
    clip_low: float | None = None,
    clip_high: float | None = None,
    clip_dual: float | None = None,
    aggregation: Aggregation | None = None,
    group_offsets: torch.Tensor | None = None,
    length: int | None = None,
    weights: torch.Tensor | None = None,
    sampler_logprob: torch.Tensor | None = None,
    importance: Importance | None = None,
    reference_logprob: torch.Tensor | None = None,
    kl_coefficient: float = 0.0,
    kl_estimator: KlEstimator = "k3",
    backend: Literal["torch", "triton"] | None = None,
) -> PolicyLoss:
    """The policy-gradient loss of N rollouts from log-probabilities and one advantage per rollout.

    Advantages keep the shape (N,): the kernel reads a token's advantage from its rollout. The loss, its gradient and its figures
    are computed in one pass over the tokens, which on CUDA is one launch if `weights` are given. The backward pass is one
    multiplication. Nothing synchronises. torch.compile(fullgraph=True) accepts the call as one registered operator,
    `v05::policy_loss`.

    Log-probabilities are in nats and are read as float32. All have the same shape: (N, T) with `mask`, or (total_tokens,) with
    `cu_seqlens`. A log-ratio with an absolute value above 20 counts as 20 (or -20) and has no gradient.

    Args:
        logprob: log-probabilities of the sampled tokens under the policy in training. Only they receive a gradient.
        old_logprob: the same under the old policy, which is the denominator of the ratio: usually the policy before the step's
            first update.
        advantages: (N,) floats, one per rollout, as `fused_advantage` returns them without `response_mask` and `cu_seqlens`.
        mask: (N, T) bool or integers, 1 for the tokens that count. Log-probabilities of the other tokens are not used. Give exactly
            one of `mask` and `cu_seqlens`.
        cu_seqlens: (N + 1,) integers that rise from 0 to total_tokens. Rollout i has the tokens
            cu_seqlens[i] .. cu_seqlens[i + 1] - 1.
        loss: a name in `LOSSES`. It chooses the formula and the defaults of `clip_low`, `clip_high`, `clip_dual` and `aggregation`.
        clip_low, clip_high: the ratio is clipped to between 1 - clip_low and 1 + clip_high.
        clip_dual: the largest ratio for a negative advantage (dual clip, arXiv 1912.09729). math.inf means no dual clip.
        aggregation: how the losses of tokens add up to the loss of the batch, see `loss_weights`.
        group_offsets: (G + 1,) integers. With them prompts have equal weight, otherwise rollouts have; see `loss_weights`.
        length: the divisor of aggregation "constant" (Dr. GRPO).
        weights: (N,) floats, the weight of each token of a rollout, as `loss_weights` returns it. Give them in place of
            `aggregation`, `group_offsets` and `length`. For micro-batches pass the weights of the whole batch, so that the losses
            of the micro-batches add up to the loss of the batch.
        sampler_logprob: log-probabilities under the policy that sampled, if it is not exactly the old policy (another inference
            engine, or an older step). The loss of each token is then multiplied by an importance weight.
        importance: bounds and level of the importance weights. None is `Importance()`. Requires `sampler_logprob`.
        reference_logprob: log-probabilities under a reference policy. Adds `kl_coefficient` times the divergence from it.
        kl_coefficient: at least 0. A value above 0 requires `reference_logprob`.
        kl_estimator: the estimator of that divergence: "k1", "k2" or "k3" (http://joschu.net/blog/kl-approx.html). GRPO uses "k3".
        backend: "torch" or "triton"; None chooses by device. "triton" on CPU tensors needs TRITON_INTERPRET=1.

    Returns:
        `loss`, a float32 scalar, and `figures`.

    Raises:
        ValueError: an argument is invalid. The message names the argument, the shape or value seen and the remedy. Non-finite
            values are not an error: they make the loss non-finite. On CUDA the values of `cu_seqlens` are not checked.

    Example:
        >>> old_logprob = torch.tensor([[-1.0, -2.0], [-0.5, 0.0]])
        >>> logprob = old_logprob.clone().requires_grad_()
        >>> mask = torch.tensor([[1, 1], [1, 0]])
        >>> out = policy_loss(logprob, old_logprob, torch.tensor([1.0, -2.0]), mask=mask, loss="grpo")
        >>> out.loss.item()  # the mean over rollouts of -1 and 2
        0.5
        >>> out.loss.backward()
        >>> logprob.grad.tolist()
        [[-0.25, -0.25], [1.0, 0.0]]

    Source: the papers that `LOSSES` names for each loss.
    """
    row = LOSSES[choice("loss", loss, LOSSES)]
    device = logprob.device
    if device.type not in BACKEND_OF_DEVICE:
        raise ValueError(f"logprob: device {device}; move the tensors to one of {', '.join(BACKEND_OF_DEVICE)}")
    n = len(advantages)
    tokens = _read_tokens(n, logprob, old_logprob, sampler_logprob, reference_logprob, mask, cu_seqlens)
    if weights is None:
        weights = loss_weights(
            _lengths(tokens), aggregation=aggregation or row.aggregation, group_offsets=group_offsets, length=length
        )
    elif not (aggregation is None and group_offsets is None and length is None):
        raise ValueError("weights: aggregation, group_offsets and length are replaced by weights; leave out those, or weights")
    rollouts = Rollouts(_floats("advantages", advantages, (n,), device), _floats("weights", weights, (n,), device))
    options = Options(
        int(row.surrogate),
        row.ratio == "sequence",
        nonnegative("clip_low", row.clip_low if clip_low is None else clip_low),
        nonnegative("clip_high", row.clip_high if clip_high is None else clip_high),
        row.clip_dual if clip_dual is None else _above_one("clip_dual", clip_dual),
        *_importance_numbers(importance, sampler_logprob),
        *_kl_numbers(reference_logprob, kl_coefficient, kl_estimator),
    )
    name = BACKEND_OF_DEVICE[device.type] if backend is None else choice("backend", backend, ("torch", "triton"))
    total, _, figures = call_operator(tokens, rollouts, options, name)
    return PolicyLoss(total, LossFigures(*figures.unbind()))


def _read_tokens(
    n: int,
    logprob: torch.Tensor,
    old: torch.Tensor,
    sampler: torch.Tensor | None,
    reference: torch.Tensor | None,
    mask: torch.Tensor | None,
    cu_seqlens: torch.Tensor | None,
) -> Tokens:
    if (mask is None) == (cu_seqlens is None):
        raise ValueError("give exactly one of mask, for (N, T) log-probabilities, and cu_seqlens, for packed ones")
    shape, device = tuple(logprob.shape), logprob.device
    if len(shape) != (1 if mask is None else 2) or (mask is not None and shape[0] != n):
        wanted = "(total_tokens,) with cu_seqlens" if mask is None else f"({n}, T) with a mask, for {n} advantages"
        raise ValueError(f"logprob has shape {shape}; give {wanted}")
    if mask is not None:
        if mask.shape != logprob.shape or mask.is_floating_point():
            raise ValueError(f"mask: {mask.dtype} of shape {tuple(mask.shape)}; give bool or integers of logprob's shape {shape}")
        mask = mask.to(device).contiguous()
    if cu_seqlens is not None:
        if cu_seqlens.shape != (n + 1,) or cu_seqlens.is_floating_point() or cu_seqlens.dtype == torch.bool:
            raise ValueError(f"cu_seqlens: {cu_seqlens.dtype} of shape {tuple(cu_seqlens.shape)}; give integers, ({n + 1},)")
        cu_seqlens = cu_seqlens.to(device, torch.int64).contiguous()
        if device.type == "cpu" and not torch.compiler.is_compiling():
            _refuse_disorder(cu_seqlens, len(logprob))

    def beside(name: str, values: torch.Tensor) -> torch.Tensor:
        return _floats(name, values, shape, device).detach()

    return Tokens(
        _floats("logprob", logprob, shape, device),
        beside("old_logprob", old),
        None if sampler is None else beside("sampler_logprob", sampler),
        None if reference is None else beside("reference_logprob", reference),
        mask,
        cu_seqlens,
    )


def _refuse_disorder(cu_seqlens: torch.Tensor, total: int) -> None:
    if cu_seqlens[0] != 0 or cu_seqlens[-1] != total or (cu_seqlens.diff() < 0).any():
        raise ValueError(f"cu_seqlens={cu_seqlens.tolist()[:8]} do not rise from 0 to the {total} tokens of logprob; give (N + 1,)")


def _lengths(tokens: Tokens) -> torch.Tensor:
    """(N,) number of tokens that count."""
    if tokens.mask is not None:
        return (tokens.mask == 1).sum(-1)
    assert tokens.cu_seqlens is not None
    return tokens.cu_seqlens.diff()


def _floats(name: str, values: torch.Tensor, shape: tuple[int, ...], device: torch.device) -> torch.Tensor:
    if tuple(values.shape) != shape or not values.is_floating_point() or values.device != device:
        raise ValueError(
            f"{name}: {values.dtype} of shape {tuple(values.shape)} on {values.device}; give floats of shape {shape} on {device}"
        )
    return values.float().contiguous()


def _above_one(name: str, value: float) -> float:
    if not value > 1:
        raise ValueError(f"{name}={value}; give a ratio above 1, or math.inf")
    return float(value)


def _importance_numbers(importance: Importance | None, sampler: torch.Tensor | None) -> tuple[int, bool, float, float]:
    if sampler is None:
        if importance is not None:
            raise ValueError("importance: its weights need the sampler's log-probabilities; give sampler_logprob too")
        return _NO_IMPORTANCE
    chosen = importance or Importance()
    return 1 if chosen.level == "token" else 2, chosen.beyond == "mask", chosen.cap, chosen.floor


def _kl_numbers(reference: torch.Tensor | None, coefficient: float, estimator: str) -> tuple[int, float]:
    coefficient = nonnegative("kl_coefficient", coefficient)
    if reference is None:
        if coefficient:
            raise ValueError(f"kl_coefficient={coefficient}: there is no reference to diverge from; give reference_logprob too")
        return 0, 0.0
    return KL_ESTIMATORS[choice("kl_estimator", estimator, KL_ESTIMATORS)], coefficient
