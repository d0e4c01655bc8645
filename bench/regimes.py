"""Five synthetic regimes of pass rates and priors, with priors from good to worthless and rates of a real policy.

A rate is p ~ Beta(s + 0.35, 10 - s + 0.35), where s is drawn from the successes out of 10 in the context rows of a policy history.
The history is JSON lines with `split` and `score`, the mean reward in [-1, 1] of 10 rollouts. Below, l is logit p and e ~ N(0, 1).
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from scipy.special import expit, logit

from v05.simulate.replay import Groups

TRIALS, PSEUDO = 10, 0.35
HALLUCINATED = 0.15

Array = NDArray[np.float64]
Rng = np.random.Generator


def _good(rates: Array, rng: Rng) -> Array:
    return expit(logit(rates) + 0.6 * rng.normal(size=len(rates)))


def _fair(rates: Array, rng: Rng) -> Array:
    return expit(0.6 * logit(rates) + rng.normal(size=len(rates)))


def _hallucinated(rates: Array, rng: Rng) -> Array:
    return np.where(rng.random(len(rates)) < HALLUCINATED, rng.random(len(rates)), _good(rates, rng))


def _shifted(rates: Array, rng: Rng) -> Array:
    return expit(logit(rates) - 1.0 + 0.6 * rng.normal(size=len(rates)))


def _noise(rates: Array, rng: Rng) -> Array:
    return rng.random(len(rates))


REGIMES: dict[str, Callable[[Array, Rng], Array]] = {  # function that draws the priors of given rates
    "good prior": _good,
    "fair prior": _fair,
    "15 % hallucinated": _hallucinated,
    "shifted": _shifted,
    "noise as prior": _noise,
}


def read_successes(history: Path) -> NDArray[np.int64]:
    """The context rows' successes out of TRIALS."""
    rows = [json.loads(line) for line in history.read_text().splitlines()]
    scores = np.array([row["score"] for row in rows if row["split"] == "context"])
    return np.rint(TRIALS * (1 + scores) / 2).astype(np.int64)


def draw_from(successes: NDArray[np.int64], regime: str, maximum: int, rng: Rng) -> Callable[[int], Groups]:
    """A function that draws groups of a regime, for `Replay`."""

    def draw(groups: int) -> Groups:
        s = rng.choice(successes, groups)
        rates = rng.beta(s + PSEUDO, TRIALS - s + PSEUDO)
        rewards = (rng.random((groups, maximum)) < rates[:, None]).astype(np.float64)
        return Groups(rates, REGIMES[regime](rates, rng), rewards)

    return draw
