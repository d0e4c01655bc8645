"""Mamba-2 layers whose time step is bounded (Nemotron-H, Zamba2), read token by token.

transformers bounds the time step in a pass over several tokens and forgets to in a step by one token. Without the bound, a token is
sampled from another distribution than the one that training computes.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import torch

UNBOUNDED = (0.0, math.inf)


def bounded_mixers(model: torch.nn.Module) -> list[Any]:
    """The Mamba-2 layers of a model whose time step is bounded."""
    # Falcon-H1 multiplies the projection afterwards, so that a bound on it would be another.
    return [
        module
        for module in model.modules()
        if tuple(getattr(module, "time_step_limit", None) or UNBOUNDED) != UNBOUNDED and not hasattr(module, "mup_vector")
    ]


@contextlib.contextmanager
def bounded_time_steps(mixers: Sequence[Any]) -> Iterator[None]:
    """Within, steps by one token have the bounds that passes over several have."""
    with contextlib.ExitStack() as hooks:
        for mixer in mixers:
            hooks.callback(mixer.in_proj.register_forward_hook(partial(_bound, mixer)).remove)
        yield


def _bound(mixer: Any, projection: torch.nn.Module, inputs: Any, projected: torch.Tensor) -> torch.Tensor | None:
    """The (B, 1, D) projection with its last columns, time steps before bias and softplus, in bounds; longer ones as they are."""
    if projected.shape[1] != 1:
        return None
    low, high = (_inverse_softplus(limit) - mixer.dt_bias.float() for limit in mixer.time_step_limit)
    rest, steps = projected.split((projected.shape[-1] - mixer.num_heads, mixer.num_heads), dim=-1)
    return torch.cat((rest, torch.maximum(torch.minimum(steps.float(), high), low).to(steps.dtype)), dim=-1)


def _inverse_softplus(value: float) -> float:
    """x with log(1 + exp(x)) = value."""
    if value <= 0:
        return -math.inf
    return value + math.log(-math.expm1(-value)) if math.isfinite(value) else math.inf
