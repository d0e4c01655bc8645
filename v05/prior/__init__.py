"""Value priors: a guess at each prompt's mean reward before any rollout is bought, learnt from rollouts already paid for."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
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
        """Go on from what `state_dict` of a prior with the same settings gave: predictions are the same to the last bit.

        Raises ValueError for what it never gave. Nothing has changed then.
        """
        ...


def kept_array(state: Mapping[str, NDArray[Any]], name: str, shape: tuple[int | None, ...]) -> NDArray[Any]:
    """An array of a `state_dict`, of finite numbers; None in `shape` is any length. ValueError where it is missing or another."""
    if name not in state:
        raise ValueError(f"{name} is missing")
    values = np.asarray(state[name])
    if len(values.shape) != len(shape) or any(n is not None and n != m for n, m in zip(shape, values.shape, strict=True)):
        raise ValueError(f"{name} has the shape {values.shape}, not {shape}")
    if values.dtype.kind not in "iuf" or not np.isfinite(values).all():
        raise ValueError(f"{name} holds values of {values.dtype} that are no finite numbers")
    return values


def kept_texts(state: Mapping[str, NDArray[Any]], name: str) -> list[str]:
    """Distinct texts that a `state_dict` has as the bytes of their JSON. ValueError where they are missing or others."""
    texts = json.loads(kept_array(state, name, (None,)).astype(np.uint8).tobytes())
    if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts) or len(set(texts)) < len(texts):
        raise ValueError(f"{name} holds no list of distinct texts")
    return texts


def refuse_values(name: str, bad: NDArray[np.bool_] | bool) -> None:
    """ValueError if any is bad."""
    if np.any(bad):
        raise ValueError(f"{name} holds {int(np.sum(bad))} values that cannot be")


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


class MeanPrior:
    """The same success rate for every prompt: the mean of all outcomes so far, recent ones counting more. NaN before the first.

    Args:
        forgetting: factor a step on past outcomes; 0.98 is a memory of some 50 steps, 1 weighs all outcomes alike.
    """

    def __init__(self, forgetting: float = 0.98) -> None:
        self._forgetting = forgetting
        self._successes = self._trials = 0.0

    def predict(self, prompts: Sequence[str]) -> NDArray[np.float64]:
        return np.full(len(prompts), self._successes / self._trials if self._trials else np.nan)

    def observe(self, prompts: Sequence[str], successes: NDArray[np.float64], trials: NDArray[np.float64]) -> None:
        """Learn one step's outcomes; a step without a trial teaches nothing."""
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
