"""The CPU backend: the C++ core (`csrc/tokens`) reads float32 logits. Other dtypes are widened one block of rows at a time."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from v05 import _core
from v05.ops.token_statistics.inputs import Targets, Upstream

BLOCK_ELEMENTS = 1 << 18  # 1 MiB of float32, which fits in the cache


def add_up(logits: torch.Tensor, targets: Targets, temperature: float, out: torch.Tensor) -> None:
    """Write the sums that `sums.py` defines into `out`, (SUMS, tokens) float32. Columns of ignored tokens are not written.

    Args:
        logits: (tokens, V) or (N, T, V), each row contiguous.
        targets: (tokens,) or (N, T).
    """
    ids = targets.ids.contiguous()
    for x, first_token, tokens in _blocks(logits):
        wide = x.float()
        asked = (ids.data_ptr() + 8 * first_token, tokens, x.shape[-1], targets.first, temperature)
        _core.add_up_logits(_rows(wide), asked, out.data_ptr() + 4 * first_token, out.shape[1], torch.get_num_threads())


def write_gradient(logits: torch.Tensor, targets: Targets, upstream: Upstream, temperature: float, out: torch.Tensor) -> None:
    """Write the gradient of the logits into `out`, which has their shape and may be the logits themselves.

    A token whose upstream gradients are 0 has a gradient of 0, whatever its logits are.
    """
    ids, (state, of_logprob, of_entropy) = targets.ids.contiguous(), upstream
    for (x, first_token, tokens), (to, _, _) in zip(_blocks(logits), _blocks(out), strict=True):
        wide = x.float()
        made = to if to.dtype == torch.float32 else torch.empty_like(wide)
        _core.write_logit_gradient(
            _rows(wide),
            (ids.data_ptr() + 8 * first_token, tokens, x.shape[-1], targets.first, temperature),
            state.data_ptr() + 4 * first_token,
            state.shape[1],
            of_logprob.data_ptr() + 4 * first_token,
            None if of_entropy is None else of_entropy.data_ptr() + 4 * first_token,
            _rows(made),
            torch.get_num_threads(),
        )
        if made is not to:
            to.copy_(made)


def _rows(logits: torch.Tensor) -> tuple[int, int, int, int]:
    """The layout of rows for the core: address, tokens of a sequence, strides of a sequence and of a token in elements."""
    length = logits.shape[-2]
    return logits.data_ptr(), max(length, 1), 0 if logits.ndim == 2 else logits.stride(0), logits.stride(-2)


def _blocks(logits: torch.Tensor) -> Iterator[tuple[torch.Tensor, int, int]]:
    """Yield (block, its first token, its number of tokens). Float32 logits are one block."""
    sequences = logits if logits.ndim == 3 else logits[None]
    outer, length, columns = sequences.shape
    most = outer * length if logits.dtype == torch.float32 else max(BLOCK_ELEMENTS // columns, 1)
    whole = max(most // max(length, 1), 1)  # sequences in a block
    for sequence in range(0, outer, whole):
        for token in range(0, length, max(most, 1)):
            block = sequences[sequence : sequence + whole, token : token + most]
            yield block, sequence * length + token, block.shape[0] * block.shape[1]
