"""Value priors predict each prompt's mean reward before it is sampled. They learn from rollouts of earlier steps."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray


class ValuePrior(Protocol):
    """Predicts the success rate of prompts under the current policy and learns from the rewards of the policy's rollouts."""

    def predict(self, prompts: Sequence[str]) -> NDArray[np.float64]:
        """(G,) success rates in [0, 1] of G prompt texts. NaN means that there is no prior for the prompt."""
        ...

    def observe(self, prompts: Sequence[str], successes: NDArray[np.float64], trials: NDArray[np.float64]) -> None:
        """Learn the outcomes of G prompts under the current policy: (G,) successes in (G,) trials."""
        ...

    def state_dict(self) -> dict[str, NDArray[Any]]:
        """Everything the prior has learnt, as numeric arrays by name, for a checkpoint."""
        ...

    def load_state_dict(self, state: dict[str, NDArray[Any]]) -> None:
        """Resume from the `state_dict` of a prior with the same settings. Predictions are then bitwise the same.

        Raises ValueError for a state that `state_dict` cannot have returned, and then changes nothing.
        """
        ...


def kept_array(state: Mapping[str, NDArray[Any]], name: str, shape: tuple[int | None, ...]) -> NDArray[Any]:
    """The array `name` of a `state_dict`. None in `shape` allows any length.

    Raises ValueError if the array is missing, has another shape, or holds values that are not finite numbers.
    """
    if name not in state:
        raise ValueError(f"{name} is missing")
    values = np.asarray(state[name])
    if len(values.shape) != len(shape) or any(n is not None and n != m for n, m in zip(shape, values.shape, strict=True)):
        raise ValueError(f"{name} has the shape {values.shape}, not {shape}")
    if values.dtype.kind not in "iuf" or not np.isfinite(values).all():
        raise ValueError(f"{name} holds values of {values.dtype} that are not finite numbers")
    return values


def kept_texts(state: Mapping[str, NDArray[Any]], name: str) -> list[str]:
    """The distinct texts that a `state_dict` stores as a JSON list in bytes. ValueError if they are missing or invalid."""
    texts = json.loads(kept_array(state, name, (None,)).astype(np.uint8).tobytes())
    if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts) or len(set(texts)) < len(texts):
        raise ValueError(f"{name} is not a list of distinct texts")
    return texts


def refuse_values(name: str, bad: NDArray[np.bool_] | bool) -> None:
    """Raise ValueError if any value of the array `name` is bad."""
    if np.any(bad):
        raise ValueError(f"{name} holds {int(np.sum(bad))} values that are out of bounds")


class _UnteachablePrior:
    """A prior that never changes."""

    def observe(self, prompts: Sequence[str], successes: NDArray[np.float64], trials: NDArray[np.float64]) -> None:
        pass

    def state_dict(self) -> dict[str, NDArray[Any]]:
        return {}

    def load_state_dict(self, state: dict[str, NDArray[Any]]) -> None:
        pass


class ConstantPrior(_UnteachablePrior):
    """Predicts a fixed success rate for every prompt. It is the control without information."""

    def __init__(self, value: float = 0.5) -> None:
        self.value = value

    def predict(self, prompts: Sequence[str]) -> NDArray[np.float64]:
        return np.full(len(prompts), self.value)


class NoisePrior(_UnteachablePrior):
    """Predicts a random success rate in [0, 1), fixed for each prompt text. It is the control with useless information."""

    def __init__(self, seed: int = 0) -> None:
        self._key = seed.to_bytes(8, "little")

    def predict(self, prompts: Sequence[str]) -> NDArray[np.float64]:
        digests = (hashlib.blake2b(prompt.encode(), digest_size=8, key=self._key).digest() for prompt in prompts)
        return np.array([int.from_bytes(digest, "little") / 2**64 for digest in digests])


class MeanPrior:
    """Predicts the mean of all past outcomes for every prompt, with more weight on recent ones. NaN before the first outcome.

    Args:
        forgetting: factor per step on past outcomes. 0.98 remembers about 50 steps; 1 weighs all outcomes equally.
    """

    def __init__(self, forgetting: float = 0.98) -> None:
        self._forgetting = forgetting
        self._successes = self._trials = 0.0

    def predict(self, prompts: Sequence[str]) -> NDArray[np.float64]:
        return np.full(len(prompts), self._successes / self._trials if self._trials else np.nan)

    def observe(self, prompts: Sequence[str], successes: NDArray[np.float64], trials: NDArray[np.float64]) -> None:
        """Learn one step's outcomes. A step without a trial changes nothing."""
        if np.sum(trials) > 0:
            self._successes = self._forgetting * self._successes + float(np.sum(successes))
            self._trials = self._forgetting * self._trials + float(np.sum(trials))

    def state_dict(self) -> dict[str, NDArray[Any]]:
        return {"successes": np.array(self._successes), "trials": np.array(self._trials)}

    def load_state_dict(self, state: dict[str, NDArray[Any]]) -> None:
        successes, trials = (float(kept_array(state, name, ())) for name in ("successes", "trials"))
        refuse_values("trials", trials < 0)
        refuse_values("successes", not 0 <= successes <= trials)
        self._successes, self._trials = successes, trials
