"""A fix for Mamba-2 layers with a bounded time step (Nemotron-H, Zamba2) when they read one token at a time.

transformers applies the bounds in a pass over several tokens, but not in a step by one token. Without the bounds, a token is
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
    # Falcon-H1 scales the projection afterwards, so a bound on the projection would be wrong.
    return [
        module
        for module in model.modules()
        if tuple(getattr(module, "time_step_limit", None) or UNBOUNDED) != UNBOUNDED and not hasattr(module, "mup_vector")
    ]


@contextlib.contextmanager
def bounded_time_steps(mixers: Sequence[Any]) -> Iterator[None]:
    """Inside the block, steps by one token apply the same bounds as passes over several tokens."""
    with contextlib.ExitStack() as hooks:
        for mixer in mixers:
            hooks.callback(mixer.in_proj.register_forward_hook(partial(_bound, mixer)).remove)
        yield


def _bound(mixer: Any, projection: torch.nn.Module, inputs: Any, projected: torch.Tensor) -> torch.Tensor | None:
    """A forward hook: bounds the last columns of a (B, 1, D) projection, which are time steps before bias and softplus.

    Returns None, which changes nothing, for several tokens.
    """
    if projected.shape[1] != 1:
        return None
    low, high = (_inverse_softplus(limit) - mixer.dt_bias.float() for limit in mixer.time_step_limit)
    rest, steps = projected.split((projected.shape[-1] - mixer.num_heads, mixer.num_heads), dim=-1)
    return torch.cat((rest, torch.maximum(torch.minimum(steps.float(), high), low).to(steps.dtype)), dim=-1)


def _inverse_softplus(value: float) -> float:
    """The x for which log(1 + exp(x)) = value."""
    if value <= 0:
        return -math.inf
    return value + math.log(-math.expm1(-value)) if math.isfinite(value) else math.inf
