"""The history of a policy: the context rows that V0 infers from, and each prompt's own past outcomes.

A history is a list of versions. A version is one checkpoint or one training step of the policy, with the outcomes of some prompts
under it. A prompt has at most one row in a context, its latest outcome. Its outcomes under earlier versions are its past, which is
a feature of the row. So no row is predicted from its own label, and queries have the same features as context rows.
"""

from __future__ import annotations

import json
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from v05.prior import kept_array, kept_texts, refuse_values

ROUNDING = 1e-9  # excess over 1 that rounding may cause in a mean of rates
KEPT_OUTCOMES = 8  # latest outcomes kept of each prompt
LEVEL_STRENGTH = 32.0  # how many prompts the previous version's level counts for in a version's level
FIRST_LEVEL, FIRST_STRENGTH = 0.5, 2.0  # previous level and its strength for the first version
PAST_STRENGTH = 2.0  # trials with a surplus of 0 that are added to a prompt's past, to shrink its surplus
PAST_MEMORY = 0.8  # factor per version on the trials of a prompt's past


class Outcome(NamedTuple):
    """The success rate of one prompt's rollouts under one version."""

    version: int
    rate: float
    trials: float


@dataclass(frozen=True)
class Past:
    """Outcomes of Q prompts under earlier versions. All arrays are (Q,) float64.

    Attributes:
        surplus: success rate minus the level of its version, averaged over versions and shrunk to 0. It is 0 without a past.
        trials: the discounted number of rollouts behind the surplus.
        age: the number of versions since the latest of these rollouts.
    """

    surplus: NDArray[np.float64]
    trials: NDArray[np.float64]
    age: NDArray[np.float64]

    def __getitem__(self, rows: NDArray[np.int64]) -> Past:
        return Past(self.surplus[rows], self.trials[rows], self.age[rows])


@dataclass(frozen=True)
class Context:
    """A context of N rows, one per prompt. Arrays are (N,) float64.

    Attributes:
        prompts: N distinct prompt texts.
        rate: success rate of the row's rollouts.
        trials: the number of the row's rollouts.
        age: the row's age in versions, 0 for the newest version.
        level: smoothed mean success rate over all prompts of the row's version.
        past: each prompt's outcomes before the row.
        current: level of the newest version.
    """

    prompts: list[str]
    rate: NDArray[np.float64]
    trials: NDArray[np.float64]
    age: NDArray[np.float64]
    level: NDArray[np.float64]
    past: Past
    current: float

    def __len__(self) -> int:
        return len(self.prompts)

    def __getitem__(self, rows: NDArray[np.int64]) -> Context:
        return Context(
            [self.prompts[i] for i in rows],
            self.rate[rows],
            self.trials[rows],
            self.age[rows],
            self.level[rows],
            self.past[rows],
            self.current,
        )


class History:
    """Outcomes of prompts under the versions of one policy, the latest `KEPT_OUTCOMES` of each prompt.

    Args:
        capacity: how many prompts are kept. The prompt that was not seen for longest is dropped first.
    """

    def __init__(self, capacity: int = 100_000) -> None:
        self._capacity = capacity
        self._outcomes: OrderedDict[str, list[Outcome]] = OrderedDict()
        self.levels: list[float] = []

    def __len__(self) -> int:
        return len(self._outcomes)

    def add(self, prompts: Sequence[str], rates: NDArray[np.float64], trials: NDArray[np.float64]) -> None:
        """Add a version with the (G,) success rates in [0, 1] of G prompts, each from (G,) > 0 trials."""
        before, strength = (self.levels[-1], LEVEL_STRENGTH) if self.levels else (FIRST_LEVEL, FIRST_STRENGTH)
        self.levels.append(float((rates.sum() + strength * before) / (len(rates) + strength)))
        self.extend(prompts, rates, trials)

    def extend(self, prompts: Sequence[str], rates: NDArray[np.float64], trials: NDArray[np.float64]) -> None:
        """Add outcomes to the newest version without changing its level. Several outcomes of a prompt are pooled."""
        version = len(self.levels) - 1
        for prompt, rate, n in zip(prompts, rates.tolist(), trials.tolist(), strict=True):
            outcomes = self._outcomes.setdefault(prompt, [])
            if outcomes and outcomes[-1].version == version:
                last = outcomes.pop()
                rate, n = (last.rate * last.trials + rate * n) / (last.trials + n), last.trials + n
            outcomes.append(Outcome(version, rate, n))
            del outcomes[:-KEPT_OUTCOMES]
            self._outcomes.move_to_end(prompt)
        while len(self._outcomes) > self._capacity:
            self._outcomes.popitem(last=False)

    def context(self, size: int) -> Context:
        """A context of the `size` prompts seen last, newest first."""
        newest = [prompt for prompt, _ in zip(reversed(self._outcomes), range(size), strict=False)]
        rows = [self._outcomes[prompt][-1] for prompt in newest]
        versions = np.array([row.version for row in rows], dtype=np.int64)
        return Context(
            newest,
            np.array([row.rate for row in rows]),
            np.array([row.trials for row in rows]),
            (len(self.levels) - 1 - versions).astype(np.float64),
            np.array(self.levels)[versions],
            self._past([self._outcomes[prompt][:-1] for prompt in newest], versions),
            self.levels[-1] if self.levels else FIRST_LEVEL,
        )

    def past(self, prompts: Sequence[str]) -> Past:
        """The past of the prompts, under all versions so far."""
        return self._past([self._outcomes.get(prompt, []) for prompt in prompts], np.full(len(prompts), len(self.levels)))

    def _past(self, outcomes: list[list[Outcome]], now: NDArray[np.int64]) -> Past:
        """The past that each of Q lists of outcomes is at version `now`, (Q,)."""
        surplus, trials, age = np.zeros((3, len(outcomes)))
        for i, earlier in enumerate(outcomes):
            for outcome in earlier:
                weight = outcome.trials * PAST_MEMORY ** (now[i] - 1 - outcome.version)
                surplus[i] += weight * (outcome.rate - self.levels[outcome.version])
                trials[i] += weight
            if earlier:
                age[i] = now[i] - earlier[-1].version
        return Past(surplus / (trials + PAST_STRENGTH), trials, age)

    def state_dict(self) -> dict[str, NDArray[Any]]:
        """(V,) levels, and of P prompts, least recent first: texts as JSON, (P,) counts of outcomes, and the outcomes in order."""
        outcomes = [outcome for kept in self._outcomes.values() for outcome in kept]
        return {
            "levels": np.array(self.levels, dtype=np.float64),
            "prompts": np.frombuffer(json.dumps(list(self._outcomes)).encode(), dtype=np.uint8).copy(),
            "counts": np.array([len(kept) for kept in self._outcomes.values()], dtype=np.int64),
            "versions": np.array([o.version for o in outcomes], dtype=np.int64),
            "rates": np.array([o.rate for o in outcomes], dtype=np.float64),
            "trials": np.array([o.trials for o in outcomes], dtype=np.float64),
        }

    def load_state_dict(self, state: dict[str, NDArray[Any]]) -> None:
        levels, counts = kept_array(state, "levels", (None,)), kept_array(state, "counts", (None,)).astype(np.int64)
        prompts = kept_texts(state, "prompts")
        refuse_values("counts", (counts < 1) | (len(counts) != len(prompts)))
        versions, rates, trials = (kept_array(state, name, (int(counts.sum()),)) for name in ("versions", "rates", "trials"))
        refuse_values("levels", (levels < 0) | (levels > 1))
        refuse_values("versions", (versions < 0) | (versions >= len(levels)))
        refuse_values("rates", (rates < 0) | (rates > 1 + ROUNDING) | (trials <= 0))
        rows = zip(versions.tolist(), rates.tolist(), trials.tolist(), strict=True)
        self.levels = levels.tolist()
        self._outcomes = OrderedDict(
            (prompt, [Outcome(*next(rows)) for _ in range(count)]) for prompt, count in zip(prompts, counts.tolist(), strict=True)
        )
