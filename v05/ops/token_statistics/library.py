"""The op as registered operators, which autograd, torch.compile and torch.export do not trace into.

Two operators compute statistics, from logits and from hidden states, and two compute their gradients. An operator takes only
tensors, numbers and strings, so a process group is passed by its name.
"""

from __future__ import annotations

from typing import Any, TypeAlias

import torch
import torch.distributed as dist

from v05.ops.token_statistics import linear
from v05.ops.token_statistics.backends import backend_for
from v05.ops.token_statistics.inputs import Targets, Upstream, refuse_targets
from v05.ops.token_statistics.linear import Layer
from v05.ops.token_statistics.shards import first_of_shard, gathered, group_of, size_of_vocabulary
from v05.ops.token_statistics.sums import STATE, SUMS, Made

Gradient: TypeAlias = torch.Tensor | None

# FRAGMENT: other files of this package add operators of their own to the namespace.
_LIBRARY = torch.library.Library("v05", "FRAGMENT")
_TAGS = (torch.Tag.pt2_compliant_tag, torch.Tag.needs_fixed_stride_order)
_MADE = "(Tensor logprob, Tensor entropy, Tensor sum_pi_squared, Tensor nonfinite, Tensor state)"
_UPSTREAM = "Tensor state, Tensor of_logprob, Tensor? of_entropy"
_LIBRARY.define(
    "token_statistics(Tensor logits, Tensor targets, float temperature, bool inplace_backward, str? backend, str? group) -> "
    + _MADE,
    tags=_TAGS,
)
_LIBRARY.define(
    f"token_statistics_backward(Tensor logits, Tensor targets, {_UPSTREAM}, float temperature, str? backend, str? group) -> Tensor",
    tags=_TAGS,
)
_LIBRARY.define(
    "linear_token_statistics(Tensor hidden, Tensor weight, Tensor? bias, Tensor targets, float temperature, int chunk, "
    "str? backend, str? group) -> " + _MADE,
    tags=_TAGS,
)
_LIBRARY.define(
    f"linear_token_statistics_backward(Tensor hidden, Tensor weight, Tensor? bias, Tensor targets, {_UPSTREAM}, "
    "float temperature, int chunk, str? backend, str? group, bool[] needed) -> Tensor[]",
    tags=_TAGS,
)


def of_logits(
    logits: torch.Tensor, targets: torch.Tensor, temperature: float, inplace_backward: bool, backend: str | None, group: str | None
) -> Made:
    """The results of `sums.statistics` for logits, through torch's dispatcher."""
    made: Made = torch.ops.v05.token_statistics(logits, targets, temperature, inplace_backward, backend, group)
    return made


def of_hidden_states(
    layer: Layer, targets: torch.Tensor, temperature: float, chunk: int, backend: str | None, group: str | None
) -> Made:
    """The results of `sums.statistics` for hidden states, through torch's dispatcher. Targets may have any shape."""
    made: Made = torch.ops.v05.linear_token_statistics(*layer, targets, temperature, chunk, backend, group)
    return made


def _run(
    logits: torch.Tensor, ids: torch.Tensor, temperature: float, inplace_backward: bool, backend: str | None, group: str | None
) -> Made:
    ranks, columns = group_of(group), logits.shape[-1]
    refuse_targets(ids, size_of_vocabulary(ranks, columns))
    sums = logits.new_empty((SUMS, ids.numel()), dtype=torch.float32)
    targets = Targets(ids, first_of_shard(ranks, columns, logits.device))
    run = backend_for(backend, logits.device)
    run.add_up(logits, targets, temperature, sums)
    return run.statistics(gathered(sums, ranks), ids, temperature)


def _run_backward(
    logits: torch.Tensor,
    ids: torch.Tensor,
    state: torch.Tensor,
    of_logprob: torch.Tensor,
    of_entropy: torch.Tensor | None,
    temperature: float,
    backend: str | None,
    group: str | None,
    *,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    out = torch.empty_like(logits) if out is None else out
    targets = Targets(ids, first_of_shard(group_of(group), logits.shape[-1], logits.device))
    upstream = _in_memory(state, of_logprob, of_entropy)
    backend_for(backend, logits.device).write_gradient(logits, targets, upstream, temperature, out)
    return out


def _run_linear(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    ids: torch.Tensor,
    temperature: float,
    chunk: int,
    backend: str | None,
    group: str | None,
) -> Made:
    ranks, columns = group_of(group), weight.shape[0]
    refuse_targets(ids, size_of_vocabulary(ranks, columns))
    targets = Targets(ids.flatten(), first_of_shard(ranks, columns, hidden.device))
    layer, run = linear.computed_in(hidden, weight, bias), backend_for(backend, hidden.device)
    sums = linear.add_up(layer, targets, temperature, chunk, run)
    return run.statistics(gathered(sums, ranks), ids, temperature)


def _run_linear_backward(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    ids: torch.Tensor,
    state: torch.Tensor,
    of_logprob: torch.Tensor,
    of_entropy: torch.Tensor | None,
    temperature: float,
    chunk: int,
    backend: str | None,
    group: str | None,
    needed: list[bool],
) -> list[torch.Tensor]:
    """Of hidden states, weight and bias: those that are needed."""
    ranks = group_of(group)
    targets = Targets(ids.flatten(), first_of_shard(ranks, weight.shape[0], hidden.device))
    upstream = _in_memory(state, of_logprob, of_entropy)
    layer, run = linear.computed_in(hidden, weight, bias), backend_for(backend, hidden.device)
    of_hidden, of_weight, of_bias = linear.gradients(layer, targets, upstream, temperature, chunk, run, needed)
    if of_hidden is not None and ranks is not None:
        dist.all_reduce(of_hidden, group=ranks)
    made = zip((of_hidden, of_weight, of_bias), (hidden, weight, bias), strict=True)
    return [gradient.to(like.dtype) for gradient, like in made if gradient is not None and like is not None]


def _in_memory(state: torch.Tensor, of_logprob: torch.Tensor, of_entropy: torch.Tensor | None) -> Upstream:
    """Contiguous upstream gradients, (tokens,): torch may pass one number, expanded."""
    return Upstream(state, of_logprob.flatten().contiguous(), None if of_entropy is None else of_entropy.flatten().contiguous())


def _fake(logits: torch.Tensor, ids: torch.Tensor, *_: Any) -> Made:
    made = (logits.new_empty(ids.shape, dtype=torch.float32) for _ in range(3))
    state = logits.new_empty((STATE, ids.numel()), dtype=torch.float32)
    return next(made), next(made), next(made), logits.new_empty((), dtype=torch.int64), state


def _fake_linear(hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, ids: torch.Tensor, *_: Any) -> Made:
    return _fake(hidden, ids)


def _fake_backward(logits: torch.Tensor, *_: Any) -> torch.Tensor:
    return torch.empty_like(logits)


def _fake_linear_backward(
    hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, *others: Any
) -> list[torch.Tensor]:
    of_layer = zip((hidden, weight, bias), others[-1], strict=True)
    return [torch.empty_like(tensor) for tensor, is_needed in of_layer if is_needed and tensor is not None]


def _keep(ctx: Any, inputs: tuple[Any, ...], output: Made) -> None:
    logits, ids, ctx.temperature, ctx.in_place, *ctx.place = inputs
    ctx.save_for_backward(logits, ids, output[-1])
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, *of_made: Gradient) -> tuple[Gradient, ...]:
    gradient, upstream = None, _upstream(*of_made[:2])
    if upstream is not None:
        logits, *kept = ctx.saved_tensors
        given = (*kept, *upstream, ctx.temperature, *ctx.place)
        if ctx.in_place:
            gradient = logits.detach()
            _run_backward(gradient, *given, out=gradient)
            torch.autograd.graph.increment_version(gradient)  # so that torch refuses other backward passes that need the logits
        else:
            gradient = torch.ops.v05.token_statistics_backward(logits, *given)
    return gradient, *(None,) * 5


def _keep_linear(ctx: Any, inputs: tuple[Any, ...], output: Made) -> None:
    hidden, weight, bias, ids, *ctx.options = inputs
    ctx.save_for_backward(hidden, weight, bias, ids, output[-1])
    ctx.set_materialize_grads(False)


def _backward_linear(ctx: Any, *of_made: Gradient) -> tuple[Gradient, ...]:
    needed, upstream = list(ctx.needs_input_grad[:3]), _upstream(*of_made[:2])
    if upstream is None:
        return (None,) * 8
    made = iter(torch.ops.v05.linear_token_statistics_backward(*ctx.saved_tensors, *upstream, *ctx.options, needed))
    return *(next(made) if is_needed else None for is_needed in needed), *(None,) * 5


def _upstream(of_logprob: Gradient, of_entropy: Gradient) -> tuple[torch.Tensor, Gradient] | None:
    """(gradient of logprob, gradient of entropy or None), or None if there is neither."""
    if of_logprob is None:
        return None if of_entropy is None else (torch.zeros_like(of_entropy), of_entropy)
    return of_logprob, of_entropy


for _name, _body, _shape in (
    ("token_statistics", _run, _fake),
    ("token_statistics_backward", _run_backward, _fake_backward),
    ("linear_token_statistics", _run_linear, _fake_linear),
    ("linear_token_statistics_backward", _run_linear_backward, _fake_linear_backward),
):
    _LIBRARY.impl(_name, _body, "CompositeExplicitAutograd")
    torch.library.register_fake(f"v05::{_name}", _shape, lib=_LIBRARY)
torch.library.register_autograd("v05::token_statistics", _backward, setup_context=_keep, lib=_LIBRARY)
torch.library.register_autograd("v05::linear_token_statistics", _backward_linear, setup_context=_keep_linear, lib=_LIBRARY)
