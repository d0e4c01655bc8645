"""Statistics from hidden states. Logits are computed one chunk of tokens at a time, and again for the gradient."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from packaging.version import Version

from v05.ops.token_statistics.backends import Backend
from v05.ops.token_statistics.inputs import IGNORED, Targets, Upstream
from v05.ops.token_statistics.sums import SUMS

# Bytes of the float32 logits of a default chunk. On the CPU, matrix products of a few hundred rows are already fast. On a GPU,
# every chunk reads and writes the whole gradient of the weight, which should take less time than its product.
CHUNK_BYTES = {"cpu": 1 << 26, "cuda": 1 << 29}
# Whether torch can return half-precision products in float32 (2.8 and later), and add them to a float32 matrix (2.13 and later).
_WIDE_PRODUCTS = hasattr(torch.ops.aten.mm, "dtype_out")
_WIDE_SUMS = _WIDE_PRODUCTS and Version(torch.__version__) >= Version("2.13.0")


class Layer(NamedTuple):
    """Hidden states (tokens, H), and the weight (V, H) and bias (V,) of the output layer. `computed_in` gives them one dtype."""

    hidden: torch.Tensor
    weight: torch.Tensor
    bias: torch.Tensor | None


def computed_in(hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> Layer:
    """The layer in the dtype of its products: float32 on the CPU, the dtype of the hidden states on a GPU."""
    dtype = torch.float32 if hidden.is_cpu else hidden.dtype
    return Layer(hidden.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype))


def add_up(layer: Layer, targets: Targets, temperature: float, chunk: int, backend: Backend) -> torch.Tensor:
    """The (SUMS, tokens) sums that `sums.py` defines. Columns of ignored tokens have arbitrary values."""
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
    """Float32 gradients of hidden states, weight and bias, None where not needed, from this rank's part of the vocabulary."""
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
    memory = None
    for part, logits in _chunks(layer, chunk):
        if memory is None:  # the gradient overwrites the logits unless its products need another dtype
            memory = logits if logits.dtype == weight.dtype else torch.empty_like(logits, dtype=weight.dtype)
        gradient = memory[: logits.shape[0]]
        of_part = Upstream(state[part].t().contiguous(), of_logprob[part], None if of_entropy is None else of_entropy[part])
        backend.write_gradient(logits, targets._replace(ids=ids[part]), of_part, temperature, gradient)
        if of_hidden is not None:
            _multiply(gradient, weight, of_hidden[part])
        if of_weight is not None:
            _add_product(gradient.t(), layer.hidden[part], of_weight)
        if of_bias is not None:
            of_bias += gradient.sum(0, dtype=torch.float32)
    if of_hidden is not None and rows is not None:
        of_hidden = of_hidden.new_zeros((tokens, weight.shape[1])).index_copy_(0, rows, of_hidden)
    return of_hidden, of_weight, of_bias


def _chunks(layer: Layer, chunk: int) -> Iterator[tuple[slice, torch.Tensor]]:
    """Yield (tokens, float32 logits) of one chunk after another. All chunks share one buffer."""
    hidden, weight, bias = layer
    tokens, vocabulary = hidden.shape[0], weight.shape[0]
    chunk = chunk or max(CHUNK_BYTES[hidden.device.type] // (4 * vocabulary), 1)
    memory = hidden.new_empty((min(chunk, tokens), vocabulary), dtype=torch.float32)
    for start in range(0, tokens, chunk):
        part = slice(start, start + chunk)
        rows = hidden[part]
        logits = memory[: rows.shape[0]]
        _multiply(rows, weight.t(), logits)
        if bias is not None:
            logits += bias
        yield part, logits


def _multiply(a: torch.Tensor, b: torch.Tensor, out: torch.Tensor) -> None:
    """Write a @ b into the float32 `out`. Before torch 2.8 a half-precision product is first rounded to half precision."""
    if a.dtype == out.dtype:
        torch.mm(a, b, out=out)
    elif _WIDE_PRODUCTS:
        torch.mm(a, b, out_dtype=out.dtype, out=out)
    else:
        out.copy_(a @ b)


def _add_product(a: torch.Tensor, b: torch.Tensor, total: torch.Tensor) -> None:
    """Add a @ b to the float32 `total`. Before torch 2.13 a half-precision product is first rounded to half precision."""
    if a.dtype == total.dtype:
        total.addmm_(a, b)
    elif _WIDE_SUMS:
        torch.addmm(total, a, b, out_dtype=total.dtype, out=total)
    else:
        total += a @ b


def _rows_where(wanted: torch.Tensor) -> torch.Tensor | None:
    """The rows that are wanted, or None if all are. It reads values, which would synchronise on a GPU."""
    return None if wanted.all() else wanted.nonzero()[:, 0]


def _picked(tensor: torch.Tensor, rows: torch.Tensor | None) -> torch.Tensor:
    return tensor if rows is None else tensor[rows]
