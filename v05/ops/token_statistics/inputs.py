"""Checks of the arguments: shapes, dtypes, devices and, on the CPU, the values of targets."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch

from v05.arguments import integer, real, shown

IGNORED = -100  # the target of an ignored token, as in torch.nn.functional.cross_entropy
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


class Targets(NamedTuple):
    """int64 ids of the whole vocabulary, or IGNORED, and `first`, the id of the first column of this rank's logits."""

    ids: torch.Tensor
    first: int


class Upstream(NamedTuple):
    """Float32 inputs of the backward pass: the state of tokens (`sums.py`), (STATE, tokens), and upstream gradients, (tokens,)."""

    state: torch.Tensor
    of_logprob: torch.Tensor
    of_entropy: torch.Tensor | None


def read_temperature(temperature: float) -> float:
    given = real("temperature", temperature)
    if not 0 < given < math.inf:
        raise ValueError(f"temperature={given:.15g}; give a finite number above 0")
    return given


def read_chunk(chunk: int | None) -> int:
    """The chunk, or 0 if the op chooses it."""
    return 0 if chunk is None else integer("chunk", chunk, 1)


def read_targets(targets: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    """int64 targets, one for each row of `tokens` (logits or hidden states), on their device."""
    shape, device = tokens.shape[:-1], tokens.device
    if not isinstance(targets, torch.Tensor) or targets.dtype not in (torch.int64, torch.int32):
        raise ValueError(f"targets: {_seen(targets)}; give a tensor of int64 token ids, {IGNORED} where a token is ignored")
    if targets.shape != shape:
        raise ValueError(f"targets: shape {tuple(targets.shape)} for tokens of shape {tuple(shape)}; give one id a token")
    if targets.device != device:
        raise ValueError(f"targets: on {targets.device}, but the logits are on {device}; move the targets there")
    return targets.long()


def read_logits(logits: torch.Tensor) -> torch.Tensor:
    """(tokens, V) or (N, T, V) logits whose rows are contiguous and do not overlap. Copies only if they are not."""
    refuse_dtype("logits", logits)
    if logits.ndim not in (2, 3) or logits.shape[-1] == 0:
        raise ValueError(f"logits: shape {tuple(logits.shape)}; give (tokens, V) or (N, T, V) with V of at least 1")
    in_place = logits.stride(-1) == 1 or logits.shape[-1] == 1
    for size, stride in zip(logits.shape[:-1], logits.stride()[:-1], strict=True):
        in_place = in_place and (size == 1 or stride >= logits.shape[-1])
    return logits if in_place else logits.contiguous()


def read_hidden(hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """(tokens, H) hidden states that match weight and bias."""
    refuse_dtype("hidden", hidden)
    refuse_dtype("weight", weight)
    if weight.ndim != 2 or 0 in weight.shape:
        raise ValueError(f"weight: shape {tuple(weight.shape)}; give the (V, H) matrix of the output layer")
    vocabulary, width = weight.shape
    if hidden.ndim == 0 or hidden.shape[-1] != width:
        raise ValueError(f"hidden: shape {tuple(hidden.shape)} for a weight of shape {tuple(weight.shape)}; give (tokens, {width})")
    if bias is not None:
        refuse_dtype("bias", bias)
        if bias.shape != (vocabulary,):
            raise ValueError(f"bias: shape {tuple(bias.shape)}; give ({vocabulary},), one a row of weight")
    for name, tensor in {"weight": weight, "bias": bias}.items():
        if tensor is not None and tensor.device != hidden.device:
            raise ValueError(f"{name}: on {tensor.device}, but hidden is on {hidden.device}; move {name} there")
    return hidden.reshape(-1, width)


def refuse_dtype(name: str, tensor: torch.Tensor) -> None:
    if not isinstance(tensor, torch.Tensor) or tensor.dtype not in DTYPES:
        raise ValueError(f"{name}: {_seen(tensor)}; give a tensor of float32, bfloat16 or float16")


def refuse_targets(targets: torch.Tensor, vocabulary: int) -> None:
    """Raise a ValueError for ids outside the vocabulary, on the CPU only: reading values of a GPU would synchronise."""
    if targets.is_cpu and targets.numel():
        outside = ((targets < 0) | (targets >= vocabulary)) & (targets != IGNORED)
        if outside.any():
            place = int(outside.flatten().nonzero()[0])
            value = int(targets.flatten()[place])
            raise ValueError(
                f"targets: {value} at position {place} is no id of a vocabulary of {vocabulary}; "
                f"give 0 to {vocabulary - 1}, or {IGNORED} for a token to be ignored"
            )


def _seen(given: object) -> str:
    return f"dtype {given.dtype}" if isinstance(given, torch.Tensor) else shown(given)
