"""From hidden states: the logits of one chunk of tokens at a time, made again for the gradient."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch

from v05.ops.token_statistics.backends import Backend
from v05.ops.token_statistics.inputs import IGNORED, Targets, Upstream
from v05.ops.token_statistics.sums import SUMS

# Bytes of a chunk's logits where no chunk is given. On the CPU the matrix products want some hundred rows, and no more.
CHUNK_BYTES = {"cpu": 1 << 26, "cuda": 1 << 28}


class Layer(NamedTuple):
    """Hidden states (tokens, H) and the linear layer that makes logits of them, all in the dtype of the products."""

    hidden: torch.Tensor
    weight: torch.Tensor
    bias: torch.Tensor | None


def computed_in(hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> Layer:
    """The layer in the dtype of its products: float32 on the CPU, that of the hidden states on a GPU."""
    dtype = torch.float32 if hidden.is_cpu else hidden.dtype
    return Layer(hidden.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype))


def add_up(layer: Layer, targets: Targets, temperature: float, chunk: int, backend: Backend) -> torch.Tensor:
    """(SUMS, tokens) of `sums.py`, which of ignored tokens say nothing."""
    tokens = targets.ids.shape[0]
    rows = _rows_where(targets.ids != IGNORED) if targets.ids.is_cpu else None
    layer, targets = layer._replace(hidden=_picked(layer.hidden, rows)), targets._replace(ids=_picked(targets.ids, rows))
    parts = []
    for part, logits in _chunks(layer, chunk):
        parts.append(logits.new_empty((SUMS, logits.shape[0]), dtype=torch.float32))
        backend.add_up(logits, targets._replace(ids=targets.ids[part]), temperature, parts[-1])
    sums = torch.cat(parts, 1) if parts else layer.hidden.new_empty((SUMS, 0), dtype=torch.float32)
    return sums if rows is None else sums.new_zeros(SUMS, tokens).index_copy_(1, rows, sums)


def gradients(
    layer: Layer,
    targets: Targets,
    upstream: Upstream,
    temperature: float,
    chunk: int,
    backend: Backend,
    needed: Sequence[bool],
) -> tuple[torch.Tensor | None, torch.Tensor | None, torch.Tensor | None]:
    """Float32 gradients of hidden states, weight and bias, where needed; of this part of the vocabulary."""
    rows = None
    if targets.ids.is_cpu:
        moved = upstream.of_logprob != 0
        moved = moved if upstream.of_entropy is None else moved | (upstream.of_entropy != 0)
        rows = _rows_where(moved & (targets.ids != IGNORED))
    tokens, weight = layer.hidden.shape[0], layer.weight
    state, of_logprob, of_entropy = upstream
    state, of_logprob = _picked(state.t(), rows), _picked(of_logprob, rows)
    of_entropy = None if of_entropy is None else _picked(of_entropy, rows)
    layer, ids = layer._replace(hidden=_picked(layer.hidden, rows)), _picked(targets.ids, rows)

    def zeros(shape: Sequence[int], is_needed: bool) -> torch.Tensor | None:
        return weight.new_zeros(shape, dtype=torch.float32) if is_needed else None

    of_hidden = zeros(layer.hidden.shape, needed[0])
    of_weight, of_bias = zeros(weight.shape, needed[1]), zeros(weight.shape[:1], needed[2])
    for part, logits in _chunks(layer, chunk):
        of_part = Upstream(state[part].t().contiguous(), of_logprob[part], None if of_entropy is None else of_entropy[part])
        backend.write_gradient(logits, targets._replace(ids=ids[part]), of_part, temperature, logits)
        if of_hidden is not None:
            torch.mm(logits, weight, out=of_hidden[part])
        if of_weight is not None:
            of_weight.addmm_(logits.t(), layer.hidden[part])
        if of_bias is not None:
            of_bias += logits.sum(0)
    if of_hidden is not None and rows is not None:
        of_hidden = of_hidden.new_zeros((tokens, weight.shape[1])).index_copy_(0, rows, of_hidden)
    return of_hidden, of_weight, of_bias


def _chunks(layer: Layer, chunk: int) -> Iterator[tuple[slice, torch.Tensor]]:
    """The logits of one chunk of tokens after another, in memory that they share."""
    hidden, weight, bias = layer
    tokens, vocabulary = hidden.shape[0], weight.shape[0]
    chunk = chunk or max(CHUNK_BYTES[hidden.device.type] // (4 * vocabulary), 1)
    memory = hidden.new_empty((min(chunk, tokens), vocabulary))
    for start in range(0, tokens, chunk):
        part = slice(start, start + chunk)
        rows = hidden[part]
        logits = memory[: rows.shape[0]]
        if bias is None:
            torch.mm(rows, weight.t(), out=logits)
        else:
            torch.addmm(bias, rows, weight.t(), out=logits)
        yield part, logits


def _rows_where(wanted: torch.Tensor) -> torch.Tensor | None:
    """The rows that are wanted; None if all are. It looks at values, for which a GPU would have to be waited for."""
    return None if wanted.all() else wanted.nonzero()[:, 0]


def _picked(tensor: torch.Tensor, rows: torch.Tensor | None) -> torch.Tensor:
    return tensor if rows is None else tensor[rows]
