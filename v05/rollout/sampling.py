"""How a token is drawn: from the logits, a uniform number of the rollout's own, and nothing else."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import LogitsProcessorList, TemperatureLogitsWarper, TopPLogitsWarper

BLOCK = 256  # tokens whose probabilities are added up before they are searched


class Sampler:
    """Draws tokens, with what the statistics of a completion need. No call waits for the device.

    Args:
        temperature: divides the logits; 0 takes the likeliest token.
        top_p: share of the probability that is sampled from, the likeliest tokens first.
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
        """Tokens (N,), their log-probabilities and the sums of squared probabilities (N,) float32, of (N, V) logits.

        `uniform` (N,) float64 decides, but where `greedy` (N,) takes the likeliest. Probabilities are computed in float32: each
        token's slice of the unit interval, and the sum of squares, are right to a relative 1e-5 of what the logits say.
        """
        # transformers annotates its arguments as LongTensor and FloatTensor, which no torch function returns; none reads ids.
        logits = self._warp(None, logits.float())  # type: ignore[arg-type]
        if self._greedy:
            largest, likeliest = logits.max(-1, keepdim=True)
            # The difference is 0, or NaN where the largest is not finite.
            logits = torch.full_like(logits, -torch.inf).scatter_(1, likeliest, largest - largest)
        log_p = torch.log_softmax(logits, dim=-1)
        pi = log_p.exp()
        token = torch.where(greedy, log_p.argmax(-1), inverse_cdf(pi, uniform))
        norm = torch.linalg.vector_norm(pi, dim=-1)  # without a second (N, V)
        return token, log_p.gather(1, token[:, None]).squeeze(1), norm.square()


def inverse_cdf(pi: torch.Tensor, uniform: torch.Tensor) -> torch.Tensor:
    """The token whose slice of the unit interval holds `uniform`: (N, V), (N,) float64 -> (N,).

    A long vocabulary is searched twice: for the block of tokens, then within it, so that few sums are kept in float64.
    """
    vocabulary = pi.shape[1]
    if vocabulary <= BLOCK:
        return _search(pi, uniform)[0]
    blocks = torch.nn.functional.pad(pi, (0, -vocabulary % BLOCK)).unflatten(1, (-1, BLOCK))
    block, within = _search(blocks.sum(-1), uniform)
    rows = torch.arange(len(pi), device=pi.device)
    return (block * BLOCK + _search(blocks[rows, block], within)[0]).clamp(max=vocabulary - 1)


def _search(weights: torch.Tensor, uniform: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The column whose slice holds `uniform`, and where in that slice it lies, in [0, 1): (N, C), (N,) -> (N,), (N,)."""
    cdf = weights.double().cumsum(-1)
    # Scaled by the last entry, so that rounding never leaves the interval's end uncovered.
    target = uniform[:, None] * cdf[:, -1:]
    # Where nothing is finite, no slice holds anything.
    column = torch.searchsorted(cdf, target, right=True).clamp(max=weights.shape[1] - 1)
    width = weights.gather(1, column).double()
    within = (target - cdf.gather(1, column) + width) / width
    return column.squeeze(1), within.squeeze(1).clamp(0.0, 1 - 2.0**-53)


def uniforms(seeds: NDArray[np.uint64], count: int) -> NDArray[np.float64]:
    """(N, count) numbers in [0, 1), a function of seed and position alone."""
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
