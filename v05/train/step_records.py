"""What a step records: figures and histograms of its groups, the seconds of its stages, and completions to read."""

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

SAMPLED_GROUPS, SAMPLED_COMPLETIONS = 8, 4  # of a step that follows an evaluation: completions to read
SAMPLED_CHARACTERS = 4000  # of each text


class Stopwatch:
    """Seconds of the stages of a step, one after the other from now on."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._last = time.perf_counter()

    def lap(self, stage: str) -> None:
        """The stage ends here."""
        now = time.perf_counter()
        self.seconds[stage] = now - self._last
        self._last = now


def mismatch(
    trainer_logprobs: Sequence[NDArray[np.float32]] | None, engine_logprobs: Sequence[NDArray[np.float32]], cap: float | None
) -> dict[str, float]:
    """How far the engine's policy is from the trainer's, over all tokens of all rollouts; NaN where that was not looked at.

    `mismatch`: mean absolute difference of log-probabilities, nats. `mismatch_ratio`: mean of the trainer's probability / the
    engine's, 1 in expectation. `capped_fraction`: of tokens whose ratio is above `cap`.
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
    """What the groups of a step came to, in the mean and as histograms; NaN or None for what the method has not.

    `initial` is how many rollouts every group gets whatever its rewards.
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

    Energies are what the engine knows of them (v05.energy). c is by how much a method that divides by a scale stretches its
    advantages: their slope on the rewards within groups. NaN where there is no energy, or nothing to take that slope from.

    Args:
        batch: G groups, N rollouts.
        rewards, advantages: (N,), as trained on.
        scaled: the method divides its advantages.
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
    """Share of the groups whose prior the test rejected, or (calibrated) more probably hallucinates than not; NaN for others."""
    if stats.weight is not None:
        return float((stats.weight > 0).double().mean())
    return float((stats.hallucination > 0.5).double().mean()) if stats.hallucination is not None else float("nan")


def histogram(shares: torch.Tensor) -> list[int]:
    """Groups in each of ten equal bins of their (G,) shares, [0, 0.1) first."""
    counts: list[int] = np.bincount(tenth(shares[~shares.isnan()].numpy()), minlength=TENTHS).tolist()
    return counts


def prior_outcomes(batch: RolloutBatch, initial: int) -> list[list[float]]:
    """(groups, sum of priors, sum of outcomes) in each of ten equal bins of the prior; what happened to them adds up over steps.

    A group's outcome is the mean of its first `initial` rewards: those that came later did because of the first.
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
    """Which of ten equal bins of [0, 1] each share falls into."""
    return np.minimum((shares * TENTHS).astype(np.int64), TENTHS - 1)


def calibration_figures(calibrator: Calibrator | None) -> dict[str, float]:
    """What the coming step trusts the prior by, and how many fits have failed; nothing for methods that do not ask."""
    if calibrator is None:
        return {}
    numbers = {f"calibration_{name}": value for name, value in asdict(calibrator.calibration).items()}
    return numbers | {"failed_fits": calibrator.failed_fits}


def sampled_groups(
    batch: RolloutBatch, stats: AdvantageStats, advantages: Sequence[float], decode: Callable[[Completion], str]
) -> Iterator[dict[str, Any]]:
    """The step's first groups with their first completions to read, long texts cut: at most 200,000 characters in all."""
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
    """The text, or where it is long its beginning and its end."""
    half = SAMPLED_CHARACTERS // 2
    left_out = len(text) - 2 * half
    return text if left_out <= 0 else f"{text[:half]} [... {left_out} characters ...] {text[-half:]}"
