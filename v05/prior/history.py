"""The default prior, learnt from the policy's own recent rollouts. It downloads nothing and takes milliseconds per step.

It combines two kinds of evidence. Prompts with similar text tend to have similar success rates, so an online logistic model over
hashed character n-grams predicts from the text. A prompt that was seen before also has outcomes of its own, discounted with age
because the policy changes. The text's prediction counts as `strength` rollouts against these outcomes.
"""

from __future__ import annotations

import json
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.sparse import csr_matrix, hstack
from scipy.special import expit
from sklearn.feature_extraction.text import HashingVectorizer

from v05.prior import kept_array, kept_texts, refuse_values

FEATURES = 2**14
LONGEST_NGRAM = 4


@dataclass
class _Past:
    """Outcomes of one prompt, discounted to step `step`."""

    successes: float
    trials: float
    step: int


class HistoryPrior:
    """Predicts success rates from text features and each prompt's own past outcomes.

    Args:
        learning_rate: AdaGrad learning rate of the logistic model.
        forgetting: factor per step on squared gradients and past outcomes. 0.98 remembers about 50 steps.
        strength: how many of a prompt's own past rollouts the text's prediction is worth.
        capacity: how many prompts' own outcomes are kept. The prompt that was not seen for longest is dropped first.
    """

    def __init__(
        self,
        learning_rate: float = 0.5,
        forgetting: float = 0.98,
        strength: float = 4.0,
        capacity: int = 1_000_000,
    ) -> None:
        self._learning_rate = learning_rate
        self._forgetting = forgetting
        self._strength = strength
        self._capacity = capacity
        self._features = HashingVectorizer(
            analyzer="char",
            ngram_range=(1, LONGEST_NGRAM),
            n_features=FEATURES,
            alternate_sign=False,
            lowercase=False,
            norm="l2",
        )
        self._weights = np.zeros(FEATURES + 1)
        self._squared_gradients = np.full(FEATURES + 1, 1e-8)
        self._past: OrderedDict[str, _Past] = OrderedDict()
        self._step = 0

    def predict(self, prompts: Sequence[str]) -> NDArray[np.float64]:
        if not prompts:
            return np.zeros(0)
        from_text = expit(self._design(prompts) @ self._weights)
        successes, trials = np.array([self._recall(prompt) for prompt in prompts]).T
        combined: NDArray[np.float64] = (successes + self._strength * from_text) / (trials + self._strength)
        return combined

    def observe(self, prompts: Sequence[str], successes: NDArray[np.float64], trials: NDArray[np.float64]) -> None:
        """Learn one step's outcomes. Prompts without a trial are skipped."""
        known = np.asarray(trials) > 0
        prompts = [prompt for prompt, keep in zip(prompts, known, strict=True) if keep]
        successes, trials = np.asarray(successes, dtype=float)[known], np.asarray(trials, dtype=float)[known]
        if not prompts:
            return
        self._step += 1
        self._learn_text(prompts, successes, trials)
        for prompt, s, n in zip(prompts, successes, trials, strict=True):
            old_successes, old_trials = self._recall(prompt)
            self._past[prompt] = _Past(old_successes + s, old_trials + n, self._step)
            self._past.move_to_end(prompt)
        while len(self._past) > self._capacity:
            self._past.popitem(last=False)

    def state_dict(self) -> dict[str, NDArray[Any]]:
        """Arrays of the text model, and (P,) outcomes, (P,) steps and the texts as JSON of the P kept prompts, oldest first."""
        past = self._past.values()
        return {
            "weights": self._weights.copy(),
            "squared_gradients": self._squared_gradients.copy(),
            "step": np.array(self._step),
            "past_successes": np.array([p.successes for p in past], dtype=np.float64),
            "past_trials": np.array([p.trials for p in past], dtype=np.float64),
            "past_steps": np.array([p.step for p in past], dtype=np.int64),
            "past_prompts": np.frombuffer(json.dumps(list(self._past)).encode(), dtype=np.uint8).copy(),
        }

    def load_state_dict(self, state: dict[str, NDArray[Any]]) -> None:
        weights, squared_gradients = (kept_array(state, name, (FEATURES + 1,)) for name in ("weights", "squared_gradients"))
        step = int(kept_array(state, "step", ()))
        prompts = kept_texts(state, "past_prompts")
        columns = [kept_array(state, f"past_{name}", (len(prompts),)) for name in ("successes", "trials", "steps")]
        successes, trials, steps = columns
        refuse_values("squared_gradients", squared_gradients <= 0)
        refuse_values("past_successes", (successes < 0) | (trials < 0))
        refuse_values("past_steps", (steps < 0) | (steps > step))
        self._weights, self._squared_gradients, self._step = weights.copy(), squared_gradients.copy(), step
        rows = zip(prompts, *(values.tolist() for values in columns), strict=True)
        self._past = OrderedDict((prompt, _Past(*values)) for prompt, *values in rows)

    def _learn_text(
        self, prompts: Sequence[str], successes: NDArray[np.float64], trials: NDArray[np.float64], passes: int = 3
    ) -> None:
        design = self._design(prompts)
        self._squared_gradients *= self._forgetting
        for _ in range(passes):
            residual = trials * expit(design @ self._weights) - successes
            gradient = design.T @ residual / trials.sum()
            self._squared_gradients += gradient**2
            self._weights -= self._learning_rate * gradient / np.sqrt(self._squared_gradients)

    def _design(self, prompts: Sequence[str]) -> csr_matrix:
        return hstack((self._features.transform(prompts), csr_matrix(np.ones((len(prompts), 1)))), format="csr")

    def _recall(self, prompt: str) -> tuple[float, float]:
        """(successes, trials) of the prompt's own past, discounted to the current step."""
        past = self._past.get(prompt)
        if past is None:
            return 0.0, 0.0
        discount = self._forgetting ** (self._step - past.step)
        return past.successes * discount, past.trials * discount
