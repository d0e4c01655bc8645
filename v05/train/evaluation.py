"""What fresh rollouts say of the policy, the prior and the baselines. They count as no training, in rollouts as in time."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from v05.files import explained, replacing
from v05.prior.scores import auc, brier, cross_entropy
from v05.rollout import Completion, Request, RolloutEngine, generate
from v05.rollout.verifier import Verifier, verify_all
from v05.tasks import Prompt
from v05.train.config import RunConfig
from v05.train.distributed import World
from v05.train.metrics import OUTCOMES
from v05.train.presets import label_of

EVALUATION_SEED = 1 << 40  # apart from the seeds of training rollouts, and the same for every method
FINAL_SEED = 1 << 41  # of what is sampled at the end alone


def true_rewards(
    engine: RolloutEngine,
    verifier: Verifier,
    world: World,
    prompts: Sequence[Prompt],
    prompt_tokens: Sequence[tuple[int, ...]],
    samples: int,
    seed: int,
    greedy: bool = False,
) -> tuple[NDArray[np.float64], list[Completion]]:
    """(P, samples) verified rewards of fresh rollouts, and the rollouts. Ranks share them out by prompt.

    Args:
        prompts, prompt_tokens: P prompts and their token ids.
        seed: of the first rollout; those that follow count on from it.
        greedy: the likeliest tokens in place of sampled ones.
    """
    mine = world.block(len(prompts))
    slots = [(i, j) for i in range(mine.start, mine.stop) for j in range(samples)]
    completions = generate(engine, [Request(prompt_tokens[i], seed + i * samples + j, greedy) for i, j in slots])
    rewards = verify_all(verifier, [prompts[i] for i, _ in slots], [engine.decode(c) for c in completions])
    parts = world.gather((rewards, completions))
    matrix = np.array([reward for part, _ in parts for reward in part]).reshape(len(prompts), samples)
    return matrix, [completion for _, part in parts for completion in part]


def entropy_of(completions: Sequence[Completion]) -> float:
    """The policy's entropy a token, nats, as its own samples estimate it."""
    return -float(np.mean(np.concatenate([c.logprobs for c in completions])))


def prior_scores(predicted: NDArray[np.float64], rates: NDArray[np.float64]) -> dict[str, float]:
    """How well (P,) predictions fit (P,) success rates; NaN where a prediction is, as those of a prior without any outcome yet."""
    scores = {"auc": auc, "brier": brier, "cross_entropy": cross_entropy}
    known = not np.isnan(predicted).any()
    return {f"prior_{name}": score(predicted, rates) if known else float("nan") for name, score in scores.items()}


def baseline_error(baselines: Sequence[NDArray[np.float64]], truth: NDArray[np.float64]) -> float:
    """Squared error of baselines against the truth, averaged within groups and then over them.

    The truth's own sampling variance is subtracted, so that the figure is unbiased (and may dip below zero).

    Args:
        baselines: of each of P groups, the baseline of every rollout in it, reward units.
        truth: (P, samples) rewards of fresh rollouts of the same policy.
    """
    noise = truth.var(axis=1, ddof=1) / truth.shape[1]
    errors = [np.mean((group - mean) ** 2) for group, mean in zip(baselines, truth.mean(axis=1), strict=True)]
    return float(np.mean(errors - noise))


def write_outcomes(
    directory: Path, config: RunConfig, step: int, prompts: Sequence[str], rates: NDArray[np.float64], trials: int
) -> None:
    """Write what the policy came to on (P,) prompts to outcomes/STEP.jsonl, as `v05 fit-prior` reads it."""
    path = directory / OUTCOMES / f"{step:08d}.jsonl"
    policy = f"{label_of(config)}-seed{config.seed}@{step}"
    rows = [
        {"policy": policy, "prompt": p, "score": 2 * r - 1, "trials": trials} for p, r in zip(prompts, rates.tolist(), strict=True)
    ]
    with explained(path, "the run goes on from its checkpoint"), replacing(path) as scratch:
        scratch.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
