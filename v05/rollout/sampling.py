"""Drawing tokens, as a function of the logits and one uniform random number per rollout and position."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import LogitsProcessorList, TemperatureLogitsWarper, TopPLogitsWarper

BLOCK = 256  # tokens per block of the two-level search in `inverse_cdf`


class Sampler:
    """Draws tokens and computes their statistics. No call makes the host wait for the device.

    Args:
        temperature: divides the logits; 0 takes the likeliest token.
        top_p: sample only from the likeliest tokens that together have this probability.
    """

    def __init__(self, temperature: float = 1.0, top_p: float = 1.0) -> None:
        self._greedy = temperature == 0
        self._warp = LogitsProcessorList()
        if temperature not in (0, 1):
            self._warp.append(TemperatureLogitsWarper(temperature))
        if top_p < 1:
            self._warp.append(TopPLogitsWarper(top_p))

    def draw(
        self, logits: torch.Tensor, uniform: torch.Tensor, greedy: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Draw one token per row of (N, V) logits.

        Args:
            uniform: (N,) float64 in [0, 1), decides which token is drawn.
            greedy: (N,) bool, take the likeliest token instead.

        Returns:
            (N,) int64 tokens, (N,) float32 log-probabilities of the tokens, and (N,) float32 sums of squared probabilities over the
            vocabulary. Probabilities are computed in float32, and have a relative error of at most about 1e-5.
        """
        # transformers annotates its arguments as LongTensor and FloatTensor, which no torch function returns. No warper reads the
        # ids.
        logits = self._warp(None, logits.float())  # type: ignore[arg-type]
        if self._greedy:
            largest, likeliest = logits.max(-1, keepdim=True)
            # The difference is 0, or NaN if the largest logit is not finite.
            logits = torch.full_like(logits, -torch.inf).scatter_(1, likeliest, largest - largest)
        log_p = torch.log_softmax(logits, dim=-1)
        pi = log_p.exp()
        token = torch.where(greedy, log_p.argmax(-1), inverse_cdf(pi, uniform))
        norm = torch.linalg.vector_norm(pi, dim=-1)  # avoids a second (N, V) tensor
        return token, log_p.gather(1, token[:, None]).squeeze(1), norm.square()


def inverse_cdf(pi: torch.Tensor, uniform: torch.Tensor) -> torch.Tensor:
    """The token whose slice of the unit interval contains `uniform`: (N, V), (N,) float64 -> (N,) int64.

    A long vocabulary is searched in two levels, first for a block of tokens and then within it, so that few float64 sums are
    needed.
    """
    vocabulary = pi.shape[1]
    if vocabulary <= BLOCK:
        return _search(pi, uniform)[0]
    blocks = torch.nn.functional.pad(pi, (0, -vocabulary % BLOCK)).unflatten(1, (-1, BLOCK))
    block, within = _search(blocks.sum(-1), uniform)
    rows = torch.arange(len(pi), device=pi.device)
    return (block * BLOCK + _search(blocks[rows, block], within)[0]).clamp(max=vocabulary - 1)


def _search(weights: torch.Tensor, uniform: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The column whose slice contains `uniform`, and the position within the slice, in [0, 1): (N, C), (N,) -> (N,), (N,)."""
    cdf = weights.double().cumsum(-1)
    # Scaling by the last entry makes the slices cover the whole interval in spite of rounding.
    target = uniform[:, None] * cdf[:, -1:]
    # If the weights are not finite, searchsorted may return a column beyond the last.
    column = torch.searchsorted(cdf, target, right=True).clamp(max=weights.shape[1] - 1)
    width = weights.gather(1, column).double()
    within = (target - cdf.gather(1, column) + width) / width
    return column.squeeze(1), within.squeeze(1).clamp(0.0, 1 - 2.0**-53)


def uniforms(seeds: NDArray[np.uint64], count: int) -> NDArray[np.float64]:
    """(N, count) float64 numbers in [0, 1), each a function of its seed and position only."""
    with np.errstate(over="ignore"):
        positions = np.arange(1, count + 1, dtype=np.uint64) * _GOLDEN
        bits = _mix(_mix(seeds + _GOLDEN)[:, None] + positions[None, :])
    numbers: NDArray[np.float64] = (bits >> np.uint64(11)).astype(np.float64) * 2.0**-53
    return numbers


_GOLDEN = np.uint64(0x9E3779B97F4A7C15)


def _mix(state: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """splitmix64's finaliser (Steele, Lea & Flood 2014)."""
    state = (state ^ (state >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    state = (state ^ (state >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    mixed: NDArray[np.uint64] = state ^ (state >> np.uint64(31))
    return mixed
