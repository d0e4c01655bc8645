"""Value priors: a guess at each prompt's mean reward before any rollout is bought, learnt from rollouts already paid for."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray


class ValuePrior(Protocol):
    """Predicts the success rate of prompts under the current policy and learns from what its rollouts were worth."""

    def predict(self, prompts: Sequence[str]) -> NDArray[np.float64]:
        """(G,) success rates in [0, 1] of G prompt texts; NaN is no prior."""
        ...

    def observe(self, prompts: Sequence[str], successes: NDArray[np.float64], trials: NDArray[np.float64]) -> None:
        """Learn that G prompts, (G,) successes out of (G,) trials each, went this way under the current policy."""
        ...

    def state_dict(self) -> dict[str, NDArray[Any]]:
        """All that was learnt, as numeric arrays by name; a checkpoint keeps them."""
        ...

    def load_state_dict(self, state: dict[str, NDArray[Any]]) -> None:
        """Go on from what `state_dict` of a prior with the same settings gave: predictions are the same to the last bit."""
        ...


class _UnteachablePrior:
    """Learns nothing."""

    def observe(self, prompts: Sequence[str], successes: NDArray[np.float64], trials: NDArray[np.float64]) -> None:
        pass

    def state_dict(self) -> dict[str, NDArray[Any]]:
        return {}

    def load_state_dict(self, state: dict[str, NDArray[Any]]) -> None:
        pass


class ConstantPrior(_UnteachablePrior):
    """The same success rate for every prompt: the control that knows nothing."""

    def __init__(self, value: float = 0.5) -> None:
        self.value = value

    def predict(self, prompts: Sequence[str]) -> NDArray[np.float64]:
        return np.full(len(prompts), self.value)


class NoisePrior(_UnteachablePrior):
    """A success rate between 0 and 1 that has nothing to do with the prompt but is always the same for it: the useless prior."""

    def __init__(self, seed: int = 0) -> None:
        self._key = seed.to_bytes(8, "little")

    def predict(self, prompts: Sequence[str]) -> NDArray[np.float64]:
        digests = (hashlib.blake2b(prompt.encode(), digest_size=8, key=self._key).digest() for prompt in prompts)
        return np.array([int.from_bytes(digest, "little") / 2**64 for digest in digests])
