"""Rollouts: engines that turn requests into completions, and the scheduler that decides which to ask for."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class Request:
    """One rollout to sample.

    Attributes:
        prompt: token ids.
        seed: non-negative int64; the same request under the same weights gives the same completion, but for rounding.
    """

    prompt: tuple[int, ...]
    seed: int


@dataclass(frozen=True)
class Completion:
    """One sampled rollout.

    Attributes:
        tokens: (L,) int64, the end-of-sequence token included when the policy wrote one.
        logprobs: (L,) float32, of each token under the sampling policy.
        finished: False when the length limit cut it off.
    """

    tokens: NDArray[np.int64]
    logprobs: NDArray[np.float32]
    finished: bool


class RolloutEngine(Protocol):
    """Samples completions from the current policy."""

    def generate(self, requests: Sequence[Request]) -> list[Completion]:
        """One completion a request, in the same order."""
        ...

    def decode(self, completion: Completion) -> str:
        """The completion as text, special tokens left out."""
        ...
