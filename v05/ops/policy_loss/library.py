"""The loss as a registered operator, `v05::policy_loss`, with its backward pass. torch.compile does not trace into it.

An operator takes only tensors and numbers, so its schema lists the fields of `Tokens`, `Rollouts` and `Options`, in their order.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any

import torch

from v05.ops.policy_loss.compute import FIGURES, Backend, Options, Results, Rollouts, Tokens, run_torch

_LIBRARY = torch.library.Library("v05", "FRAGMENT")
_LIBRARY.define(
    "policy_loss(Tensor logprob, Tensor old, Tensor? sampler, Tensor? reference, Tensor? mask, Tensor? cu_seqlens, "
    "Tensor advantages, Tensor weights, int surrogate, bool of_sequence, float clip_low, float clip_high, float clip_dual, "
    "int importance, bool masks_beyond, float cap, float floor, int kl, float kl_coefficient, str backend) "
    "-> (Tensor loss, Tensor gradient, Tensor figures)",
    tags=(torch.Tag.pt2_compliant_tag,),
)
_TOKENS, _ROLLOUTS = len(Tokens._fields), len(Rollouts._fields)


def call_operator(tokens: Tokens, rollouts: Rollouts, options: Options, backend: str) -> Results:
    """(loss, its gradient in the log-probabilities, figures). Only the loss is differentiable."""
    results: Results = torch.ops.v05.policy_loss(*tokens, *rollouts, *options, backend)
    return results


def _run(*given: Any) -> Results:
    *fields, backend = given
    tokens, rollouts = Tokens(*fields[:_TOKENS]), Rollouts(*fields[_TOKENS : _TOKENS + _ROLLOUTS])
    return _backend(backend)(tokens, rollouts, Options(*fields[_TOKENS + _ROLLOUTS :]))


@cache
def _backend(name: str) -> Backend:
    if name == "torch":
        return run_torch
    from v05.kernels.policy_loss import launch  # imports Triton

    backend: Backend = launch.launch
    return backend


def _fake(logprob: torch.Tensor, *_: Any) -> Results:
    figures = logprob.new_empty(len(FIGURES), dtype=torch.float64)
    return logprob.new_empty((), dtype=torch.float32), torch.empty_like(logprob), figures


def _keep(ctx: Any, inputs: Sequence[Any], output: Results) -> None:
    _, gradient, figures = output
    ctx.mark_non_differentiable(gradient, figures)
    ctx.save_for_backward(gradient)


def _backward(ctx: Any, by_loss: torch.Tensor, *_: Any) -> tuple[torch.Tensor | None, ...]:
    (gradient,) = ctx.saved_tensors
    return (gradient * by_loss, *(None for _ in range(_TOKENS + _ROLLOUTS + len(Options._fields))))


_LIBRARY.impl("policy_loss", _run, "CPU")
_LIBRARY.impl("policy_loss", _run, "CUDA")
torch.library.register_fake("v05::policy_loss", _fake, lib=_LIBRARY)
torch.library.register_autograd("v05::policy_loss", _backward, setup_context=_keep, lib=_LIBRARY)
