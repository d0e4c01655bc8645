"""Value priors: a guess at each prompt's mean reward before any rollout is bought, learnt from rollouts already paid for."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import numpy as np
from numpy.typing import NDArray


class ValuePrior(Protocol):
    """Predicts the success rate of prompts under the current policy and learns from what its rollouts were worth."""

    def predict(self, prompts: Sequence[str]) -> NDArray[np.float64]:
        """(G,) success rates in [0, 1] of G prompt texts."""
        ...

    def observe(self, prompts: Sequence[str], successes: NDArray[np.float64], trials: NDArray[np.float64]) -> None:
        """Learn that G prompts, (G,) successes out of (G,) trials each, went this way under the current policy."""
        ...


class ConstantPrior:
    """The same success rate for every prompt: the control that knows nothing."""

    def __init__(self, value: float = 0.5) -> None:
        self.value = value

    def predict(self, prompts: Sequence[str]) -> NDArray[np.float64]:
        return np.full(len(prompts), self.value)

    def observe(self, prompts: Sequence[str], successes: NDArray[np.float64], trials: NDArray[np.float64]) -> None:
        pass
