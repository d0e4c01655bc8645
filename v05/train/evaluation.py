"""Evaluation: fresh rollouts that measure the policy, the prior and the baselines, and count neither as training rollouts nor as
training time."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from v05.estimator import Estimator
from v05.files import explained, replacing
from v05.prior.scores import auc, brier, cross_entropy
from v05.rollout import Completion, Request, RolloutEngine, generate
from v05.rollout.scheduler import RolloutBatch
from v05.rollout.verifier import Verifier, verify_all
from v05.tasks import Prompt
from v05.train.config import RunConfig
from v05.train.dapo import shaped_rewards
from v05.train.distributed import World
from v05.train.estimator import estimate_batch
from v05.train.metrics import OUTCOMES
from v05.train.presets import label_of
from v05.train.sampler import Sampler

# The seeds of evaluations do not meet those of training rollouts, and do not depend on the method.
EVALUATION_SEED = 1 << 40
FINAL_SEED = 1 << 41  # of the evaluation at the end of a run


class Evaluator:
    """Measures the policy, the prior and the baselines with fresh rollouts.

    None of these rollouts is trained on, observed by the prior, or counted as a training rollout.
    """

    def __init__(
        self, config: RunConfig, world: World, sampler: Sampler, engine: RolloutEngine, verifier: Verifier, heldout: list[Prompt]
    ) -> None:
        self._config = config
        self._world = world
        self._sampler = sampler
        self._engine = engine
        self._verifier = verifier
        self._heldout = heldout

    def true_rewards(
        self, prompts: Sequence[Prompt], samples: int, seed: int, greedy: bool = False
    ) -> tuple[NDArray[np.float64], list[Completion]]:
        """(P, samples) verified rewards of fresh rollouts, and the rollouts. Each rank samples a block of the prompts.

        Args:
            prompts: P prompts.
            seed: of the first rollout; the seeds of the others count up from it.
            greedy: take the likeliest token at every position instead of sampling.
        """
        mine = self._world.block(len(prompts))
        slots = [(i, j) for i in range(mine.start, mine.stop) for j in range(samples)]
        tokens = {i: self._sampler.tokens_of(prompts[i]) for i in range(mine.start, mine.stop)}
        completions = generate(self._engine, [Request(tokens[i], seed + i * samples + j, greedy) for i, j in slots])
        rewards = verify_all(self._verifier, [prompts[i] for i, _ in slots], [self._engine.decode(c) for c in completions])
        parts = self._world.gather((rewards, completions))
        matrix = np.array([reward for part, _ in parts for reward in part]).reshape(len(prompts), samples)
        return matrix, [completion for _, part in parts for completion in part]

    def heldout(self, prior: bool) -> tuple[dict[str, float], NDArray[np.float64]]:
        """The figures of an evaluation on the held-out prompts, and the (P, samples) rewards. The seeds never change.

        Args:
            prior: also score the prior's predictions. No prior ever observes held-out prompts.
        """
        rewards, completions = self.true_rewards(self._heldout, self._config.evaluation.samples, EVALUATION_SEED)
        scores = prior_scores(self._sampler.predict(self._heldout), rewards.mean(-1)) if prior else {}
        return {"accuracy": float(rewards.mean()), "entropy": entropy_of(completions), **scores}, rewards

    def final(self) -> dict[str, float]:
        """Greedy accuracy, mean@k and pass@k on the held-out prompts; empty if `final_samples` is 0.

        Together they tell a policy that solves more prompts from a policy that is only more certain of its answers.
        """
        k = self._config.evaluation.final_samples
        if k == 0:
            return {}
        greedy, _ = self.true_rewards(self._heldout, 1, FINAL_SEED, greedy=True)
        sampled, _ = self.true_rewards(self._heldout, k, FINAL_SEED)
        return {
            "greedy": float(greedy.mean()),
            "mean_at_k": float(sampled.mean()),
            "pass_at_k": float((sampled.max(-1) > 0).mean()),
            "k": k,
        }

    def probe(self, batch: RolloutBatch, rewards: NDArray[np.float64], estimator: Estimator, seed: int) -> dict[str, float] | None:
        """The squared error of the baselines of the batch's first groups, against many fresh rollouts of the same policy.

        The baseline is the number that was subtracted from a reward before any scaling. Under leave-one-out every rollout has its
        own.

        Args:
            batch: G groups, N rollouts.
            rewards: (N,) as trained on.
            estimator: of the run.
            seed: of the first fresh rollout.

        Returns:
            The error, reward units squared, and the number of prompts; None if no group has a rollout.
        """
        settings = self._config.evaluation
        probed = np.flatnonzero(np.diff(batch.offsets))[: settings.probe_prompts]
        if not len(probed):
            return None
        fresh, completions = self.true_rewards([batch.prompts[g] for g in probed], settings.probe_samples, seed)
        truth = shaped_rewards(fresh.ravel(), completions, self._config.overlong, self._config.policy.max_new_tokens)
        unscaled = replace(estimator, scale="none")
        baselines = rewards - estimate_batch(unscaled, batch, rewards, dtype=torch.float64).advantages.numpy()
        by_group = [baselines[batch.offsets[g] : batch.offsets[g + 1]] for g in probed]
        return {"prompts": len(probed), "baseline_mse": baseline_error(by_group, truth.reshape(fresh.shape))}


def entropy_of(completions: Sequence[Completion]) -> float:
    """The policy's entropy per token, in nats, estimated from its own samples."""
    return -float(np.mean(np.concatenate([c.logprobs for c in completions])))


def prior_scores(predicted: NDArray[np.float64], rates: NDArray[np.float64]) -> dict[str, float]:
    """Scores of (P,) predictions against (P,) success rates; NaN if any prediction is NaN, as before a prior's first outcome."""
    scores = {"auc": auc, "brier": brier, "cross_entropy": cross_entropy}
    known = not np.isnan(predicted).any()
    return {f"prior_{name}": score(predicted, rates) if known else float("nan") for name, score in scores.items()}


def baseline_error(baselines: Sequence[NDArray[np.float64]], truth: NDArray[np.float64]) -> float:
    """Squared error of baselines against the true success rates, averaged within groups and then over groups.

    The sampling variance of `truth` is subtracted, so that the result is unbiased; it may be slightly negative.

    Args:
        baselines: for each of P groups, the baseline of every rollout in it, reward units.
        truth: (P, samples) rewards of fresh rollouts of the same policy.
    """
    noise = truth.var(axis=1, ddof=1) / truth.shape[1]
    errors = [np.mean((group - mean) ** 2) for group, mean in zip(baselines, truth.mean(axis=1), strict=True)]
    return float(np.mean(errors - noise))


def write_outcomes(
    directory: Path, config: RunConfig, step: int, prompts: Sequence[str], rates: NDArray[np.float64], trials: int
) -> None:
    """Write the success rates (P,) of P prompts, of `trials` rollouts each, to outcomes/STEP.jsonl in the form that `v05 fit-prior`
    reads."""
    path = directory / OUTCOMES / f"{step:08d}.jsonl"
    policy = f"{label_of(config)}-seed{config.seed}@{step}"
    rows = [
        {"policy": policy, "prompt": p, "score": 2 * r - 1, "trials": trials} for p, r in zip(prompts, rates.tolist(), strict=True)
    ]
    with explained(path, "the run resumes from its checkpoint"), replacing(path) as scratch:
        scratch.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
