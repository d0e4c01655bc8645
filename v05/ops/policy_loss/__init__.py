"""`policy_loss`: log-probabilities and the advantages of rollouts in, the loss, its figures and its gradient out, in one pass."""

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
    """What to watch, float64 without a dimension each, on the loss's device. NaN where it is not defined, without tokens too.

    Attributes:
        tokens: how many count. All but `kl` are means over them.
        kl: what the reference adds to the loss, before its coefficient.
        clip_fraction: of tokens whose ratio the clip held; under CISPO, whose ratio is out of bounds.
        dual_clip_fraction: of tokens that the dual clip held.
        ratio: new probability over old.
        approx_kl: old log-probability less new, nats; an estimate of the divergence from the old policy.
        importance: the importance weight.
        beyond_fraction: of tokens whose importance ratio was beyond the bounds.
        mismatch: absolute difference of the old policy's log-probability and the sampler's, nats.
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
    """`loss`, float32 without a dimension, to be differentiated by the log-probabilities; and its `figures`."""

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
    """The policy-gradient loss of N rollouts, from one advantage a rollout.

    Advantages stay (N,): a token reads its rollout's inside the kernel. The loss, its gradient and its figures come out of one pass
    over the tokens, on CUDA of one launch when `weights` are given; the backward pass is one multiplication. Nothing synchronises.
    torch.compile(fullgraph=True) takes the call whole, as the registered operator `v05::policy_loss`.

    Log-probabilities are in nats, (N, T) with a mask or (total_tokens,) with cu_seqlens, all alike; they are read as float32. A
    log-ratio beyond 20 in size counts as 20 and passes no gradient.

    Args:
        logprob: of the policy in training. The gradient goes to this one alone.
        old_logprob: of the policy that the ratio is taken to: as before the step's first update.
        advantages: (N,), one a rollout, as `fused_advantage` gives them without a layout.
        mask: (N, T) of bool or integers, 1 for the tokens that count. What stands elsewhere is not looked at. Exactly one of `mask`
            and `cu_seqlens`.
        cu_seqlens: (N + 1,) integers from 0 to total_tokens: rollout i has the tokens cu_seqlens[i] .. cu_seqlens[i + 1] - 1.
        loss: a name of `LOSSES`, which says what is done to the ratio and gives the defaults of the next four.
        clip_low, clip_high: the ratio is held between 1 - clip_low and 1 + clip_high.
        clip_dual: the largest ratio of a negative advantage (dual clip, arXiv 1912.09729); infinite: none.
        aggregation: how tokens and rollouts make up the batch's loss, see `loss_weights`.
        group_offsets: (G + 1,), to weigh prompts alike and not rollouts, see `loss_weights`.
        length: what aggregation "constant" (Dr. GRPO) divides by.
        weights: (N,) weights of a rollout's tokens, as `loss_weights` makes them; in place of the last three. For micro-batches:
            weights of the whole batch, so that the micro-batches' losses add up to its loss.
        sampler_logprob: of the policy that sampled, where that is not quite the old one (another engine, a stale step): every token
            is weighed by `importance`.
        importance: the bounds and the level of these weights; None is `Importance()`, and without `sampler_logprob` no weights.
        reference_logprob: of a reference, from which the policy is held back by `kl_coefficient` times the divergence.
        kl_estimator: "k1", "k2" or "k3" of joschu.net/blog/kl-approx.html; the last is GRPO's.
        backend: "torch" or "triton"; None goes by device. "triton" on CPU tensors needs TRITON_INTERPRET=1.

    Returns:
        `loss` and `figures`.

    Raises:
        ValueError: names the argument, the shape or value seen and the remedy. A value that is not finite spreads to the loss.
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
        raise ValueError("weights: aggregation, group_offsets and length would make others; leave them out, or the weights")
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
    """(N,) how many tokens count."""
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
            raise ValueError("importance: nothing to weigh by; give sampler_logprob too")
        return _NO_IMPORTANCE
    chosen = importance or Importance()
    return 1 if chosen.level == "token" else 2, chosen.beyond == "mask", chosen.cap, chosen.floor


def _kl_numbers(reference: torch.Tensor | None, coefficient: float, estimator: str) -> tuple[int, float]:
    coefficient = nonnegative("kl_coefficient", coefficient)
    if reference is None:
        if coefficient:
            raise ValueError(f"kl_coefficient={coefficient}: nothing to diverge from; give reference_logprob too")
        return 0, 0.0
    return KL_ESTIMATORS[choice("kl_estimator", estimator, KL_ESTIMATORS)], coefficient
