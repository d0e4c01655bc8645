"""V0, the generalist value model (arXiv 2602.03584), is a prior that reads the policy's own history.

V0 infers a prompt's success rate from a context of other prompts and the policy's results on them. A frozen text backbone turns
prompts into features (`backbone`), optionally with a trained adapter (`adapter`). `features` turns these and the context into
inputs that mean the same for every backbone. An in-context head, trained on other policies' histories, predicts from them (`head`).
While a policy trains, only the calibration of the predictions is fitted.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.special import expit, logit

from v05.machine import cache_root
from v05.methods import Calibration
from v05.prior.calibration import LEAST_PRIOR, Calibrator
from v05.prior.v0.adapter import AdaptedBackbone, load_adapter
from v05.prior.v0.backbone import Backbone
from v05.prior.v0.context import Context, History, Past
from v05.prior.v0.head import LARGEST_CONTEXT, Head, load_head
from v05.prior.v0.surface import surface_features

CONTEXT_SIZE = 256  # as in the paper
CANDIDATES = 4  # a diverse context is chosen from the latest CANDIDATES * context_size prompts


class V0Prior:
    """The prior of a training run.

    Args:
        backbone: the model that turns prompts into features, with or without a trained adapter.
        head: the in-context classifier.
        context_size: the number of context rows. The context consists of the prompts seen last.
        diverse: half of the context is chosen for diversity: from the latest 4 `context_size` prompts, each next prompt is the one
            whose features are farthest from all chosen so far.

    Raises:
        ValueError: `context_size` is out of bounds.
    """

    def __init__(
        self,
        backbone: Backbone | AdaptedBackbone,
        head: Head,
        context_size: int = CONTEXT_SIZE,
        diverse: bool = False,
    ) -> None:
        if not 1 <= context_size <= LARGEST_CONTEXT:
            raise ValueError(f"context_size={context_size} is not between 1 and {LARGEST_CONTEXT}; the paper's is {CONTEXT_SIZE}")
        self._backbone, self._head = backbone, head
        self._context_size, self._diverse = context_size, diverse
        self.history = History()
        self.calibrator = Calibrator()
        self._context: Context | None = None  # None: to be chosen from the current history
        self._predicted: dict[str, float] = {}  # uncalibrated rates predicted since the last outcomes

    def predict(self, prompts: Sequence[str]) -> NDArray[np.float64]:
        """(G,) success rates. Before the first outcomes there is no context, so all are NaN, which means no prior."""
        if not prompts or not len(self.history):
            return np.full(len(prompts), np.nan)
        if self._context is None:
            self._context = self._choose()
        distinct = list(dict.fromkeys(prompts))
        raw = self.infer(self._context, distinct, self.history.past(distinct))
        self._predicted |= zip(distinct, raw.tolist(), strict=True)
        return self.calibrated(np.array([self._predicted[prompt] for prompt in prompts]))

    def observe(self, prompts: Sequence[str], successes: NDArray[np.float64], trials: NDArray[np.float64]) -> None:
        """Learn one step's outcomes. Prompts without a trial are skipped.

        Raises:
            ValueError: lengths differ, or successes are not between 0 and the trials. Nothing changes then.
        """
        successes, trials = np.asarray(successes, dtype=float), np.asarray(trials, dtype=float)
        if not (len(prompts),) == successes.shape == trials.shape:
            raise ValueError(
                f"{len(prompts)} prompts, successes shaped {successes.shape}, trials {trials.shape}; give one number per prompt"
            )
        known = np.flatnonzero(trials > 0)
        if not len(known):
            return
        prompts = [prompts[i] for i in known.tolist()]
        successes, trials = successes[known], trials[known]
        self.calibrator.observe(successes, trials, [self._predicted.get(prompt, np.nan) for prompt in prompts])
        self.calibrator.fit()
        self.history.add(prompts, successes / trials, trials)
        self._context, self._predicted = None, {}

    def infer(self, context: Context, prompts: Sequence[str], past: Past) -> NDArray[np.float64]:
        """(G,) uncalibrated success rates of G prompts, inferred from a context of N >= 1 rows and the G prompts' `past`."""
        if not len(context):
            raise ValueError("context is empty; V0 infers from outcomes of the policy, so call observe first")
        texts = [*context.prompts, *prompts]
        place = {prompt: i for i, prompt in enumerate(context.prompts)}
        same = np.array([place.get(prompt, -1) for prompt in prompts])
        with torch.no_grad():
            views = (self.meaning(texts), torch.from_numpy(surface_features(texts)))
            logits = self._head.infer(views, context, past, same)
        rates: NDArray[np.float64] = expit(logits.double().numpy())
        return rates

    def meaning(self, prompts: Sequence[str]) -> torch.Tensor:
        """(G, D) float64 features of what the prompts mean."""
        return torch.from_numpy(self._backbone.features(prompts)).double()

    def calibrated(self, raw: NDArray[np.float64]) -> NDArray[np.float64]:
        """(G,) calibrated success rates: the mean of the fitted mixture for each raw rate. Unchanged before the first fit."""
        fit = self.calibrator.calibration
        if fit == Calibration():
            return raw
        informed = expit(fit.alpha + fit.beta * logit(np.clip(raw, LEAST_PRIOR, 1 - LEAST_PRIOR)))
        rates: NDArray[np.float64] = (1 - fit.eps) * informed + fit.eps / 2
        return rates

    def state_dict(self) -> dict[str, NDArray[Any]]:
        """The state of the history and of the calibrator. Backbone and head never change."""
        parts = {"history": self.history.state_dict(), "calibration": self.calibrator.state_dict()}
        return {f"{part}.{name}": value for part, state in parts.items() for name, value in state.items()}

    def load_state_dict(self, state: dict[str, NDArray[Any]]) -> None:
        history, calibrator = History(), Calibrator()
        parts: dict[str, History | Calibrator] = {"history": history, "calibration": calibrator}
        for part, holder in parts.items():
            holder.load_state_dict({name.removeprefix(f"{part}."): v for name, v in state.items() if name.startswith(f"{part}.")})
        self.history, self.calibrator = history, calibrator
        self._context, self._predicted = None, {}

    def _choose(self) -> Context:
        if not self._diverse:
            return self.history.context(self._context_size)
        candidates = self.history.context(CANDIDATES * self._context_size)
        return candidates[farthest_first(self.meaning(candidates.prompts).numpy(), self._context_size)]


def load_v0(backbone: Path | None, adapter: Path | None = None, context_size: int = CONTEXT_SIZE, diverse: bool = False) -> V0Prior:
    """V0 with the head that ships with the package.

    `backbone` is a model folder (None: the sentence model of the extra `value`), `adapter` the file of a trained adapter. Features
    are cached in $V05_CACHE or ~/.cache/v05. Raises ValueError if backbone, adapter or head cannot be loaded.
    """
    base = Backbone(backbone, cache_root())
    reader = base if adapter is None else AdaptedBackbone(base, load_adapter(adapter, base))
    return V0Prior(reader, load_head(), context_size, diverse)


def farthest_first(features: NDArray[np.float64], size: int) -> NDArray[np.int64]:
    """Sorted indices of at most `size` rows: the first half in order, then repeatedly the row farthest from all chosen rows."""
    chosen = list(range(min((size + 1) // 2, len(features))))
    norms = (features**2).sum(1)
    distance = np.full(len(features), np.inf)
    for count in range(min(size, len(features))):
        if count >= len(chosen):
            chosen.append(int(distance.argmax()))
        new = features[chosen[count]]
        distance = np.minimum(distance, norms - 2 * features @ new + new @ new)
        distance[chosen[count]] = -np.inf
    return np.array(sorted(chosen), dtype=np.int64)
