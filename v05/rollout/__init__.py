"""Rollouts: engines that turn requests into completions, verifiers that score them, the scheduler that says which to ask for.

An engine works continuously: rollouts join while others are under way and come back as they finish.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
from numpy.typing import NDArray

from v05.energy import completion_energy

if TYPE_CHECKING:
    import torch

ATTEMPTS = 3  # that `generate` gives a request


@dataclass(frozen=True)
class Request:
    """One rollout to sample.

    Attributes:
        prompt: token ids.
        seed: non-negative int64; the same request under the same weights gives the same completion, but for rounding.
        greedy: every token is the likeliest; its log-probability is still what sampling would give it.
    """

    prompt: tuple[int, ...]
    seed: int
    greedy: bool = False


@dataclass(frozen=True)
class Completion:
    """One sampled rollout.

    Attributes:
        tokens: (L,) int64, the token that ends it included when the policy wrote one.
        logprobs: (L,) float32, of each token under the sampling policy.
        finished: False when the length limit cut it off.
        sum_pi_squared: (L,) float64, the sum over the vocabulary of squared probabilities under the sampling policy; None where the
            engine does not know the whole distribution.
    """

    tokens: NDArray[np.int64]
    logprobs: NDArray[np.float32]
    finished: bool
    sum_pi_squared: NDArray[np.float64] | None = None

    @property
    def energy(self) -> float:
        """About the squared norm of the gradient of its log-probability, as far as the engine knows it (v05.energy)."""
        return completion_energy(self.logprobs, self.sum_pi_squared)


@dataclass(frozen=True)
class Failure:
    """What stands in a result's place where there is none; `error` says why, to a person."""

    error: str


class NotFiniteError(RuntimeError):
    """The policy gives no finite log-probabilities: its weights have diverged, are damaged, or overflow."""


class RolloutEngine(Protocol):
    """Samples completions from the current policy.

    Attributes:
        capacity: rollouts in flight that keep it busy; more are accepted and wait.
        reproducible: what `poll` returns follows from the calls before it, never from the time.
    """

    @property
    def capacity(self) -> int: ...

    @property
    def reproducible(self) -> bool: ...

    def submit(self, keys: Sequence[int], requests: Sequence[Request]) -> None:
        """Start rollouts; each has a key that no other rollout in flight has."""
        ...

    def poll(self, timeout: float | None = None) -> list[tuple[int, Completion | Failure]]:
        """Wait until a rollout in flight has finished; the keys and results of all that have.

        Every rollout comes back: what dies or hangs on the way, in an actor or a server, comes as a Failure.
        Empty when nothing is in flight, or after `timeout` seconds, of which a reproducible engine takes no notice.
        """
        ...

    def update_weights(self, state: Iterable[tuple[str, torch.Tensor]]) -> None:
        """Sample from these weights from now on, names as in the model's state_dict. Nothing may be in flight (ValueError)."""
        ...

    def decode(self, completion: Completion) -> str:
        """The completion as text, special tokens and the token that ended it left out."""
        ...

    def close(self) -> None:
        """Give back what the engine holds: processes, actors, connections."""
        ...


def decode(tokenizer: Any, completion: Completion) -> str:
    """The completion as text, special tokens and the token that ended it left out: every engine's `decode`."""
    tokens = completion.tokens[:-1] if completion.finished else completion.tokens
    return str(tokenizer.decode(tokens, skip_special_tokens=True))


def refuse_update_in_flight(in_flight: bool) -> None:
    """The ValueError of every engine's `update_weights` while rollouts are in flight."""
    if in_flight:
        raise ValueError("update_weights: rollouts are in flight; poll until none is")


def generate(engine: RolloutEngine, requests: Sequence[Request]) -> list[Completion]:
    """One completion a request, in the same order, from an engine with nothing in flight.

    Raises RuntimeError, with the engine's words, if a request fails `ATTEMPTS` times.
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
