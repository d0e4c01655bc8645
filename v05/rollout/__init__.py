"""Rollouts: engines that turn requests into completions, verifiers that score completions, and the scheduler that connects both.

An engine works continuously: new rollouts join while others are under way, and each returns as soon as it is finished.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from v05.energy import completion_energy

if TYPE_CHECKING:
    import torch

ATTEMPTS = 3  # how often `generate` tries a request


@dataclass(frozen=True)
class Request:
    """One rollout to sample.

    Attributes:
        prompt: token ids.
        seed: non-negative int64. The same request under the same weights gives the same completion, except for rounding.
        greedy: take the likeliest token at every position. Log-probabilities are still those of sampling.
    """

    prompt: tuple[int, ...]
    seed: int
    greedy: bool = False


@dataclass(frozen=True)
class Completion:
    """One sampled rollout.

    Attributes:
        tokens: (L,) int64, including the token that ends the completion if the policy wrote one.
        logprobs: (L,) float32, log-probability of each token under the sampling policy, in nats.
        finished: False if the length limit cut the completion off.
        sum_pi_squared: (L,) float64, the sum over the vocabulary of squared probabilities under the sampling policy; None if the
            engine does not know the whole distribution.
    """

    tokens: NDArray[np.int64]
    logprobs: NDArray[np.float32]
    finished: bool
    sum_pi_squared: NDArray[np.float64] | None = None

    @property
    def energy(self) -> float:
        """An approximation of the squared gradient norm of the completion's log-probability, from what the engine knows
        (v05.energy)."""
        return completion_energy(self.logprobs, self.sum_pi_squared)


@dataclass(frozen=True)
class Failure:
    """Takes the place of a result that could not be produced. `error` is the reason, as text for a person."""

    error: str


class NotFiniteError(RuntimeError):
    """The policy gives log-probabilities that are not finite: its weights have diverged, are damaged, or overflow."""


class RolloutEngine(Protocol):
    """Samples completions from the current policy.

    Attributes:
        capacity: number of rollouts in flight that keep the engine busy; further ones are accepted and wait.
        reproducible: the results of `poll` depend on the previous calls only, never on timing.
    """

    @property
    def capacity(self) -> int: ...

    @property
    def reproducible(self) -> bool: ...

    def submit(self, keys: Sequence[int], requests: Sequence[Request]) -> None:
        """Start rollouts. Each key must differ from those of all other rollouts in flight."""
        ...

    def poll(self, timeout: float | None = None) -> list[tuple[int, Completion | Failure]]:
        """Wait until a rollout in flight has finished, and return the keys and results of all finished rollouts.

        Every rollout returns: one that is lost or hangs in an actor or a server returns as a Failure. The list is empty if nothing
        is in flight, or after `timeout` seconds. A reproducible engine ignores `timeout`.
        """
        ...

    def update_weights(self, state: Iterable[tuple[str, torch.Tensor]]) -> None:
        """Sample from these weights from now on; names are those of the model's state_dict. Raises ValueError while rollouts are in
        flight."""
        ...

    def decode(self, completion: Completion) -> str:
        """The completion as text, without special tokens and the token that ended it."""
        ...

    def close(self) -> None:
        """Release what the engine holds: processes, actors, connections."""
        ...


@runtime_checkable
class SleepingEngine(Protocol):
    """A RolloutEngine that can give its device memory back while the trainer computes gradients. Other engines have no `sleep`."""

    def sleep(self) -> None:
        """Give memory back and sample nothing until the next `update_weights`. Nothing may be in flight (ValueError)."""
        ...


def decode(tokenizer: Any, completion: Completion) -> str:
    """The completion as text, without special tokens and the token that ended it. Implements `decode` of the engines."""
    tokens = completion.tokens[:-1] if completion.finished else completion.tokens
    return str(tokenizer.decode(tokens, skip_special_tokens=True))


def refuse_update_in_flight(in_flight: bool) -> None:
    """Raise the ValueError of `update_weights` if rollouts are in flight."""
    if in_flight:
        raise ValueError("update_weights: rollouts are in flight; poll until none is")


def generate(engine: RolloutEngine, requests: Sequence[Request]) -> list[Completion]:
    """One completion per request, in the same order, from an engine with nothing in flight.

    Raises RuntimeError, with the engine's error, if a request fails `ATTEMPTS` times.
    """
    done: dict[int, Completion] = {}
    waiting = deque(range(len(requests)))
    failures = [0] * len(requests)
    in_flight = 0
    while len(done) < len(requests):
        keys = [waiting.popleft() for _ in range(min(len(waiting), engine.capacity - in_flight))]
        if keys:
            engine.submit(keys, [requests[key] for key in keys])
        in_flight += len(keys)
        for key, result in engine.poll():
            in_flight -= 1
            if isinstance(result, Completion):
                done[key] = result
                continue
            failures[key] += 1
            if failures[key] == ATTEMPTS:
                raise RuntimeError(f"a rollout failed {ATTEMPTS} times; the last error: {result.error}")
            waiting.append(key)
    return [done[key] for key in range(len(requests))]
