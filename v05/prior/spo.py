"""The tracker of SPO (Single-stream Policy Optimization, arXiv 2509.13232) predicts a prompt's success rate from its own visits.

A visit sets the prompt's alpha to rho alpha + successes and its beta to rho beta + failures. The prediction is alpha / (alpha +
beta). With one rollout per visit, the tracker remembers about 1 / (1 - rho) visits.

Departures from the paper, as far as its authors' code (volcengine/verl, recipe/spo) shows the original:

- rho is fixed. In SPO it is 2^(-D / 0.06), clipped to [0.875, 0.96], where D is the mean absolute change of the token
  log-probabilities of the prompt's last completion since that visit. To know D, a trainer would have to keep the last completion of
  every prompt and score it again at the next visit. The default here is the lower bound, which predicted as well on the prompts of
  docs/training.md.
- SPO starts with alpha + beta = 1 / (1 - 0.875) = 8, filled by rollouts of each prompt before training. Here alpha = beta = 1/2 at
  the start, as in the authors' code without such rollouts. Outcomes that are observed before training count as one visit.
- Only the tracker is implemented. SPO also divides advantages by the batch's standard deviation and samples prompts in proportion
  to sqrt(p (1 - p)).
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
    """Predicts success rates from each prompt's own past outcomes, and 1/2 for a prompt without any.

    Args:
        forgetting: rho, the factor on a prompt's past outcomes at each of its visits.
    """

    def __init__(self, forgetting: float = 0.875) -> None:
        self.forgetting = forgetting
        self._counts: dict[str, tuple[float, float]] = {}  # alpha and beta

    def predict(self, prompts: Sequence[str]) -> NDArray[np.float64]:
        alpha, beta = np.array([self._counts.get(prompt, (START, START)) for prompt in prompts]).reshape(-1, 2).T
        rates: NDArray[np.float64] = alpha / (alpha + beta)
        return rates

    def observe(self, prompts: Sequence[str], successes: NDArray[np.float64], trials: NDArray[np.float64]) -> None:
        """Learn one visit of each prompt. Prompts without a trial are skipped."""
        for prompt, s, n in zip(prompts, np.asarray(successes).tolist(), np.asarray(trials).tolist(), strict=True):
            if n > 0:
                alpha, beta = self._counts.get(prompt, (START, START))
                self._counts[prompt] = self.forgetting * alpha + s, self.forgetting * beta + n - s

    def state_dict(self) -> dict[str, NDArray[Any]]:
        """(P, 2) alpha and beta of the P visited prompts, and the prompts' texts as JSON."""
        return {
            "counts": np.array(list(self._counts.values()), dtype=np.float64).reshape(-1, 2),
            "prompts": np.frombuffer(json.dumps(list(self._counts)).encode(), dtype=np.uint8).copy(),
        }

    def load_state_dict(self, state: dict[str, NDArray[Any]]) -> None:
        prompts = kept_texts(state, "prompts")
        counts = kept_array(state, "counts", (len(prompts), 2))
        refuse_values("counts", (counts < 0) | (counts.sum(axis=1, keepdims=True) <= 0))
        self._counts = {prompt: (alpha, beta) for prompt, (alpha, beta) in zip(prompts, counts.tolist(), strict=True)}
