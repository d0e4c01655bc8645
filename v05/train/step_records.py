"""The records of a step: statistics and histograms of its groups, seconds per stage, and completions to read."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from v05.ops import AdvantageStats
from v05.prior.calibration import Calibrator
from v05.rollout import Completion
from v05.rollout.scheduler import RolloutBatch
from v05.train.records import TENTHS

SAMPLED_GROUPS, SAMPLED_COMPLETIONS = 8, 4  # groups, and completions of each, that are recorded after an evaluation
SAMPLED_CHARACTERS = 4000  # that are kept of each text


class Stopwatch:
    """Measures the seconds of consecutive stages of a step, starting when it is made."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._last = time.perf_counter()

    def lap(self, stage: str) -> None:
        """End the present stage, and name it."""
        now = time.perf_counter()
        self.seconds[stage] = now - self._last
        self._last = now


def mismatch(
    trainer_logprobs: Sequence[NDArray[np.float32]] | None, engine_logprobs: Sequence[NDArray[np.float32]], cap: float | None
) -> dict[str, float]:
    """Differences between the engine's and the trainer's policy over all tokens of all rollouts; NaN if they were not compared.

    `mismatch`: mean absolute difference of log-probabilities, in nats. `mismatch_ratio`: mean of the trainer's probability over the
    engine's, which is 1 in expectation. `capped_fraction`: share of tokens whose ratio is above `cap`.
    """
    if not trainer_logprobs:
        return dict.fromkeys(("mismatch", "mismatch_ratio", "capped_fraction"), float("nan"))
    difference = np.concatenate(trainer_logprobs) - np.concatenate(engine_logprobs)
    ratio = np.exp(difference)
    return {
        "mismatch": float(np.abs(difference).mean()),
        "mismatch_ratio": float(ratio.mean()),
        "capped_fraction": float((ratio > (cap or np.inf)).mean()),
    }


def group_figures(batch: RolloutBatch, stats: AdvantageStats, initial: int) -> dict[str, Any]:
    """Means and histograms over the groups of a step; NaN or None for quantities that the method does not have.

    `initial` is the number of rollouts that every group gets whatever its rewards.
    """
    sizes = np.diff(batch.offsets)
    weight, hallucination, prior = stats.weight, stats.hallucination, stats.prior
    return {
        "accuracy": float(np.mean(batch.rewards)) if len(batch.rewards) else float("nan"),
        "group_size": float(np.mean(sizes)) if batch.prompts else float("nan"),
        "prior_mean": float(np.mean(batch.priors)) if prior is not None else float("nan"),
        "prior_gap": float(torch.mean((stats.mean - prior) ** 2)) if prior is not None else float("nan"),
        "weight": float(weight.mean()) if weight is not None else float("nan"),
        "prior_rejected": rejected(stats),
        "hallucination": float(hallucination.mean()) if hallucination is not None else float("nan"),
        "group_sizes": np.bincount(sizes).tolist(),
        "weights": histogram(weight) if weight is not None else None,
        "hallucinations": histogram(hallucination) if hallucination is not None else None,
        "prior_outcomes": prior_outcomes(batch, initial) if prior is not None else None,
    }


def gradient_noise(batch: RolloutBatch, rewards: NDArray[np.float64], advantages: NDArray[np.float64], scaled: bool) -> float:
    """The second moment of one rollout's gradient over the mean energy: sum A^2 E / (c^2 sum E), reward units squared.

    A are advantages, and E energies as far as the engine knows them (v05.energy). c is the factor by which a method that divides by
    a scale stretches its advantages: their slope on the rewards within groups. NaN if the energies, or the slope, are 0.

    Args:
        batch: G groups, N rollouts.
        rewards, advantages: (N,), as trained on.
        scaled: whether the method divides its advantages by a scale.
    """
    energies = np.array([completion.energy for completion in batch.completions])
    stretch = 1.0
    if scaled:
        sizes = np.diff(batch.offsets)
        group = np.repeat(np.arange(len(sizes)), sizes)
        centred = rewards - (np.bincount(group, rewards, len(sizes)) / np.maximum(sizes, 1))[group]
        spread = float(centred @ centred)
        stretch = float(advantages @ centred) / spread if spread else 0.0
    total = energies.sum() * stretch**2
    return float(advantages**2 @ energies / total) if total else float("nan")


def rejected(stats: AdvantageStats) -> float:
    """Share of groups whose prior the test rejected, or (calibrated) whose prior hallucinates with probability above 1/2; NaN for
    other methods."""
    if stats.weight is not None:
        return float((stats.weight > 0).double().mean())
    return float((stats.hallucination > 0.5).double().mean()) if stats.hallucination is not None else float("nan")


def histogram(shares: torch.Tensor) -> list[int]:
    """Number of groups in each tenth of [0, 1] by their (G,) shares, [0, 0.1) first. NaN is left out."""
    counts: list[int] = np.bincount(tenth(shares[~shares.isnan()].numpy()), minlength=TENTHS).tolist()
    return counts


def prior_outcomes(batch: RolloutBatch, initial: int) -> list[list[float]]:
    """(groups, sum of priors, sum of outcomes) for each tenth of the prior. The sums can be added over steps.

    A group's outcome is the mean of its first `initial` rewards, because later rollouts depend on the first rewards.
    """
    sizes = np.diff(batch.offsets)
    group_of = np.repeat(np.arange(len(sizes)), sizes)
    first = np.arange(len(group_of)) - batch.offsets[group_of] < initial
    outcomes = np.bincount(group_of[first], batch.rewards[first], len(sizes)) / np.minimum(sizes, initial)
    known = ~np.isnan(batch.priors)
    bins = tenth(batch.priors[known])
    columns = (None, batch.priors[known], outcomes[known])
    sums: list[list[float]] = np.stack([np.bincount(bins, values, TENTHS) for values in columns], axis=1).tolist()
    return sums


def tenth(shares: NDArray[np.float64]) -> NDArray[np.int64]:
    """The tenth of [0, 1], 0 to 9, that each share falls into."""
    return np.minimum((shares * TENTHS).astype(np.int64), TENTHS - 1)


def calibration_figures(calibrator: Calibrator | None) -> dict[str, float]:
    """The calibration that the next step will use, and the number of failed fits; empty for methods without calibration."""
    if calibrator is None:
        return {}
    numbers = {f"calibration_{name}": value for name, value in asdict(calibrator.calibration).items()}
    return numbers | {"failed_fits": calibrator.failed_fits}


def sampled_groups(
    batch: RolloutBatch, stats: AdvantageStats, advantages: Sequence[float], decode: Callable[[Completion], str]
) -> Iterator[dict[str, Any]]:
    """Records of the step's first groups and their first completions. Long texts are shortened: at most 200,000 characters in
    all."""
    for g, prompt in enumerate(batch.prompts[:SAMPLED_GROUPS]):
        start, end = batch.offsets[g : g + 2].tolist()
        completions = [
            {"text": shortened(decode(batch.completions[i])), "reward": float(batch.rewards[i]), "advantage": advantages[i]}
            for i in range(start, min(end, start + SAMPLED_COMPLETIONS))
        ]
        yield {
            "prompt": shortened(prompt.text),
            "answer": shortened(prompt.answer),
            "size": end - start,
            "mean": float(stats.mean[g]),
            "prior": float(batch.priors[g]),
            "baseline": float(stats.baseline[g]),
            "completions": completions,
        }


def shortened(text: str) -> str:
    """The text; of a long one, its beginning and its end."""
    half = SAMPLED_CHARACTERS // 2
    left_out = len(text) - 2 * half
    return text if left_out <= 0 else f"{text[:half]} [... {left_out} characters ...] {text[-half:]}"
