"""The launches of the kernels that read logits, and their variants for the ahead-of-time compiler."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import TYPE_CHECKING, NamedTuple

import torch

from v05.kernels.launcher import Launcher
from v05.kernels.token_statistics.kernel import add_up_kernel, statistics_kernel, write_gradient_kernel
from v05.kernels.variant import Variant

if TYPE_CHECKING:
    from v05.ops.token_statistics.inputs import Targets, Upstream
    from v05.ops.token_statistics.sums import Made

TILE = 2048  # elements that a program loads at once: 16 per thread, which is two or four loads of 128 bits
BLOCK = 128  # tokens of a program of statistics_kernel
TOKENS, VOCABULARY = 8192, 151_936  # the batch for which memory traffic is counted

_add_up = Launcher(add_up_kernel)
_statistics = Launcher(statistics_kernel)
_write_gradient = Launcher(write_gradient_kernel)


def add_up(logits: torch.Tensor, targets: Targets, temperature: float, out: torch.Tensor) -> None:
    """Do what `v05.ops.token_statistics.cpu.add_up` does. A ValueError for CPU tensors without the interpreter."""
    tokens, columns = out.shape[1], logits.shape[-1]
    rows = _rows(logits)
    if tokens > 0:
        _add_up(
            (tokens, 1, 1),
            logits.device,
            (rows.memory, targets.ids.contiguous(), out),
            (tokens, *rows.places, columns, targets.first, *_scale(temperature)),
            _tile(logits.dtype),
        )


def statistics(sums: torch.Tensor, ids: torch.Tensor, temperature: float) -> Made:
    """Do what `v05.ops.token_statistics.sums.statistics` does. A ValueError for CPU tensors without the interpreter."""
    shards, _, tokens = sums.shape
    of_token = tuple(sums.new_empty(ids.shape) for _ in range(3))
    state, nonfinite = sums.new_empty(4, tokens), torch.zeros((), dtype=torch.int64, device=sums.device)
    if tokens > 0:
        _statistics(
            (-(-tokens // BLOCK), 1, 1),
            sums.device,
            (sums, ids.contiguous(), *of_token, state, nonfinite),
            (tokens, shards, temperature),
            (BLOCK,),
        )
    return *of_token, nonfinite, state


def write_gradient(logits: torch.Tensor, targets: Targets, upstream: Upstream, temperature: float, out: torch.Tensor) -> None:
    """Do what `v05.ops.token_statistics.cpu.write_gradient` does. A ValueError for CPU tensors without the interpreter."""
    tokens, columns = targets.ids.numel(), logits.shape[-1]
    rows, rows_out = _rows(logits), _rows(out)
    origin, length, *strides = rows.places
    out_origin, _, *out_strides = rows_out.places
    aligned = all((a - b) % 16 == 0 for a, b in zip((origin, *strides), (out_origin, *out_strides), strict=True))
    if tokens > 0:
        _write_gradient(
            (tokens, 1, 1),
            logits.device,
            (rows.memory, targets.ids.contiguous(), *upstream, rows_out.memory),
            (tokens, origin, length, *strides, out_origin, *out_strides, columns, targets.first, _scale(temperature)[0]),
            (aligned, *_tile(logits.dtype)),
        )


class _Rows(NamedTuple):
    memory: torch.Tensor  # the logits, from an address that is a multiple of 16 bytes
    places: tuple[int, int, int, int]  # the kernels' origin, length, stride_sequence and stride_token


def _rows(logits: torch.Tensor) -> _Rows:
    sequences = logits if logits.ndim == 3 else logits[None]
    origin = logits.data_ptr() % 16 // logits.element_size()
    memory = logits if origin == 0 else logits.as_strided((1,), (1,), logits.storage_offset() - origin)
    return _Rows(memory, (origin, max(sequences.shape[1], 1), *sequences.stride()[:2]))


def _tile(dtype: torch.dtype) -> tuple[int, int]:
    """(LANES, E) with 128 bits per lane."""
    each = 16 // dtype.itemsize
    return TILE // each, each


def _scale(temperature: float) -> tuple[float, float, float]:
    """(bits, step_high, step_low): log2(e) / temperature, and its inverse as the sum of two numbers for float32.

    step_high has so few digits that its products with whole numbers up to 150 are exact.
    """
    step = temperature * math.log(2)
    mantissa, exponent = math.frexp(step)
    high = math.ldexp(math.floor(mantissa * 2**16), exponent - 16)
    return 1 / step, high, step - high


def variants() -> Iterator[Variant]:
    """Yield each dtype of logits, forward and backward, aligned and not, then the statistics and a gradient without the entropy."""
    tokens = {"p_ids": "i64"}
    for name, element, dtype in (
        ("bfloat16", "bf16", torch.bfloat16),
        ("float16", "fp16", torch.float16),
        ("float32", "fp32", torch.float32),
    ):
        block = dict(zip(("LANES", "E"), _tile(dtype), strict=True))
        yield Variant(name, add_up_kernel, tokens | {"p_logits": element, "p_sums": "fp32"}, block)
        upstream = {"p_state": "fp32", "p_of_logprob": "fp32", "p_of_entropy": "fp32"}
        both = Variant(
            f"gradient-{name}",
            write_gradient_kernel,
            tokens | upstream | {"p_logits": element, "p_out": element},
            block | {"ALIGNED": True},
        )
        yield both
        yield both.but(f"gradient-{name}-elsewhere", {"ALIGNED": False})
    made = ("p_sums", "p_logprob", "p_entropy", "p_sum_pi_squared", "p_state")
    numbers = dict.fromkeys(made, "fp32") | {"p_nonfinite": "i64"}
    yield Variant("statistics", statistics_kernel, tokens | numbers, {"BLOCK": BLOCK})
    without = {pointer: kind for pointer, kind in both.pointers.items() if pointer != "p_of_entropy"}
    yield Variant("gradient-float32-logprob", write_gradient_kernel, without, both.constants)


def traffic(variant: Variant) -> tuple[int, int]:
    """(bytes, floor_bytes) of one launch on TOKENS x VOCABULARY. Every logit is read once and every gradient written once."""
    size = variant.element_bytes()
    if variant.kernel is statistics_kernel:
        once = TOKENS * (size["p_ids"] + (5 + 3 + 4) * size["p_sums"])
        return once, once
    logits = TOKENS * VOCABULARY * (size["p_logits"] + size.get("p_out", 0))
    sums = sum(size.get(name, 0) for name in ("p_ids", "p_of_logprob", "p_of_entropy"))
    once = logits + TOKENS * (sums + 5 * size.get("p_sums", 0) + 4 * size.get("p_state", 0))
    return once, once
