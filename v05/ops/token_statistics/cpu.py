"""The passes over logits on the CPU: a block of rows at a time, so that what is made on the way stays in cache."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from v05.ops.token_statistics.inputs import IGNORED, Targets, Upstream

BLOCK_ELEMENTS = 1 << 17  # 1 MiB of float64, in which the difference of two logits is exact enough
_LEAST = -200.0  # e^d is 0 in float32 long before; d itself may be -inf, and 0 times that is not 0


def add_up(logits: torch.Tensor, targets: Targets, temperature: float, out: torch.Tensor) -> None:
    """Write the sums of `sums.py`, (SUMS, tokens) float32.

    Args:
        logits: (tokens, V) or (N, T, V), each row contiguous.
        targets: (tokens,) or (N, T).
    """
    outs = out.view(len(out), *targets.ids.shape)
    for block in _blocks(logits):
        x = logits[block].double()
        column, own = _columns(targets.ids[block], targets.first, x.shape[-1])
        largest = x.amax(-1, keepdim=True)
        d = _below(x, largest, temperature)
        d.scatter_(-1, column, torch.where(own, -torch.inf, d.gather(-1, column)))
        e = d.exp()
        outs[0][block] = largest[..., 0]
        outs[1][block] = e.sum(-1)
        outs[2][block] = (d.clamp_(min=_LEAST).mul_(e)).sum(-1)
        outs[3][block] = e.square_().sum(-1)
        outs[4][block] = torch.where(own, x.gather(-1, column), -torch.inf)[..., 0]


def write_gradient(logits: torch.Tensor, targets: Targets, upstream: Upstream, temperature: float, out: torch.Tensor) -> None:
    """Write the gradient of the logits into `out`, of their shape, which may be the logits themselves. A token whose upstream
    gradients are 0 has a gradient of 0, whatever its logits are.
    """
    state, of_logprob, of_entropy = upstream
    states = state.view(len(state), *targets.ids.shape, 1)
    for block in _blocks(logits):
        largest, inverse_z, mean, rest = (of_rows[block] for of_rows in states)
        g = of_logprob[block][..., None].double()
        h = None if of_entropy is None else of_entropy[block][..., None].double()
        x = logits[block].double()
        column, own = _columns(targets.ids[block], targets.first, x.shape[-1])
        d = _below(x, largest, temperature)
        pi = d.exp().mul_(inverse_z)
        no_gradient = g == 0
        if h is None:
            at_target = g * rest
            pi.mul_(-g)
        else:
            no_gradient &= h == 0
            slope = d.clamp_(min=_LEAST).sub_(mean).mul_(h)
            at_target = g * rest - pi.gather(-1, column) * slope.gather(-1, column)
            pi.mul_(slope.add_(g)).neg_()
        pi.scatter_(-1, column, torch.where(own, at_target, pi.gather(-1, column)))
        no_gradient |= (targets.ids[block] == IGNORED)[..., None]
        out[block] = pi.div_(temperature).masked_fill_(no_gradient, 0.0)


def _below(x: torch.Tensor, largest: torch.Tensor, temperature: float) -> torch.Tensor:
    """(x - largest) / temperature; of a row that is masked whole -inf."""
    d = x - largest.masked_fill(largest == -torch.inf, 0.0)
    return d if temperature == 1 else d.div_(temperature)


def _columns(ids: torch.Tensor, first: int, columns: int) -> tuple[torch.Tensor, torch.Tensor]:
    """(column, own), each (..., 1): where the target lies in this part of the vocabulary, if it does."""
    column = (ids - first)[..., None]
    own = (column >= 0) & (column < columns)
    return column.where(own, 0), own


def _blocks(logits: torch.Tensor) -> Iterator[tuple[slice, ...]]:
    """Indices of blocks of rows."""
    *rows, columns = logits.shape
    most = max(BLOCK_ELEMENTS // columns, 1)
    if len(rows) == 1:
        yield from ((slice(start, start + most),) for start in range(0, rows[0], most))
        return
    outer = max(most // max(rows[1], 1), 1)
    for start in range(0, rows[0], outer):
        for inner in range(0, rows[1], most):
            yield slice(start, start + outer), slice(inner, inner + most)
