"""The tracker of SPO (Single-stream Policy Optimization, arXiv 2509.13232): a prompt's success rate, from its own visits alone.

A visit turns the prompt's alpha into rho alpha + successes and its beta into rho beta + failures; alpha / (alpha + beta) is what it
predicts. With one rollout a visit, rho is a memory of 1 / (1 - rho) visits.

Departures from the paper, as far as its authors' code (volcengine/verl, recipe/spo) shows them:

- rho is fixed. There it is 2^(-D / 0.06), kept within [0.875, 0.96]. D is by how much the log-probability of the prompt's last
  completion has changed since that visit, the mean of absolute values over its tokens. To know it, a trainer has to keep the last
  completion of every prompt and to score it again at the next visit. The default is the lower bound, which predicted as well on
  the prompts of docs/training.md.
- There alpha + beta starts from 1 / (1 - 0.875) = 8, filled by rollouts of each prompt before training. Here it starts from
  alpha = beta = 1/2, as in that code without such rollouts. Outcomes observed before training count as one visit.
- Only the tracker is here: not the advantages that are divided by the batch's deviation, and not the sampling of prompts by
  sqrt(p (1 - p)).
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from v05.prior import kept_array, kept_texts, refuse_values

START = 0.5  # alpha and beta of a prompt without a visit


class SpoPrior:
    """Success rates from each prompt's own past; 1/2 for a prompt without one.

    Args:
        forgetting: rho, the factor on a prompt's past at each of its visits.
    """

    def __init__(self, forgetting: float = 0.875) -> None:
        self.forgetting = forgetting
        self._counts: dict[str, tuple[float, float]] = {}  # alpha and beta

    def predict(self, prompts: Sequence[str]) -> NDArray[np.float64]:
        alpha, beta = np.array([self._counts.get(prompt, (START, START)) for prompt in prompts]).reshape(-1, 2).T
        rates: NDArray[np.float64] = alpha / (alpha + beta)
        return rates

    def observe(self, prompts: Sequence[str], successes: NDArray[np.float64], trials: NDArray[np.float64]) -> None:
        """Learn one visit of each prompt; groups without a trial are none."""
        for prompt, s, n in zip(prompts, np.asarray(successes).tolist(), np.asarray(trials).tolist(), strict=True):
            if n > 0:
                alpha, beta = self._counts.get(prompt, (START, START))
                self._counts[prompt] = self.forgetting * alpha + s, self.forgetting * beta + n - s

    def state_dict(self) -> dict[str, NDArray[Any]]:
        """(P, 2) alpha and beta of the P prompts that were visited, and their texts as JSON."""
        return {
            "counts": np.array(list(self._counts.values()), dtype=np.float64).reshape(-1, 2),
            "prompts": np.frombuffer(json.dumps(list(self._counts)).encode(), dtype=np.uint8).copy(),
        }

    def load_state_dict(self, state: dict[str, NDArray[Any]]) -> None:
        prompts = kept_texts(state, "prompts")
        counts = kept_array(state, "counts", (len(prompts), 2))
        refuse_values("counts", (counts < 0) | (counts.sum(axis=1, keepdims=True) <= 0))
        self._counts = {prompt: (alpha, beta) for prompt, (alpha, beta) in zip(prompts, counts.tolist(), strict=True)}
