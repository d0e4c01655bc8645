"""Where a run stands between two steps, and how a checkpoint keeps all that its coming steps depend on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from v05.budget import RolloutAllocator
from v05.estimator import Estimator
from v05.rollout import Completion
from v05.train.checkpoint import Checkpoint, read_checkpoint
from v05.train.config import RunConfig
from v05.train.learner import Learner
from v05.train.overlap import packed, unpacked


@dataclass(frozen=True)
class Progress:
    """Where a run stands, to be shown.

    Attributes:
        rollouts, total: training rollouts spent and wanted.
        evaluations: of the held-out set after the first step.
        accuracy: held-out, last.
        rollouts_per_second: of training, on average; NaN before the first step.
        group_size: running mean of rollouts a prompt.
        prior_rejected: share of the last step's groups whose prior was rejected; NaN without one.
    """

    rollouts: int
    total: int
    evaluations: int
    accuracy: float
    rollouts_per_second: float
    group_size: float
    prior_rejected: float


@dataclass
class TrainerState:
    """What a run has come to between two steps, beside its tensors; the same on every rank, but for the seconds.

    Attributes:
        next_prompt: where in the task's training prompts the next step reads on.
        group_size: running mean of rollouts a prompt.
        steps, groups: optimiser steps taken, groups opened.
        rollouts, generated_tokens: spent on training, thrown away ones included.
        seconds: of training.
        evaluations: of the held-out set after the first step, at equal distances in rollouts.
        accuracy_before, accuracy: held-out, before the first step and last; None before the first evaluation.
        successes: of each held-out prompt, if the policy has not changed since it was evaluated.
    """

    next_prompt: int
    group_size: float
    steps: int = 0
    groups: int = 0
    rollouts: int = 0
    generated_tokens: int = 0
    seconds: float = 0.0
    evaluations: int = 0
    accuracy_before: float | None = None
    accuracy: float | None = None
    successes: list[int] | None = None
    final: dict[str, float] = field(default_factory=dict)

    def progress(self, total: int, prior_rejected: float) -> Progress:
        """The part of it that is shown; the run must have been evaluated once."""
        assert self.accuracy is not None
        return Progress(
            self.rollouts,
            total,
            self.evaluations,
            self.accuracy,
            self.rollouts / self.seconds if self.seconds else float("nan"),
            self.group_size,
            prior_rejected,
        )


def result_of(config: RunConfig, state: TrainerState) -> dict[str, Any]:
    """What result.json holds of a run that has ended (v05.train.records)."""
    return {
        "method": config.method,
        "seed": config.seed,
        "accuracy_before": state.accuracy_before,
        "accuracy_after": state.accuracy,
        "rollouts": state.rollouts,
        "steps": state.steps,
        "seconds": state.seconds,
        "heldout_samples": config.evaluation.samples,
        "heldout_successes": state.successes,
        **state.final,
    }


def snapshot(
    identity: str,
    state: TrainerState,
    metrics_bytes: int,
    policy: dict[str, dict[str, torch.Tensor]],
    estimator: Estimator,
    allocator: RolloutAllocator,
    ahead: Sequence[Completion | None],
) -> Checkpoint:
    """The checkpoint of a run.

    Args:
        identity: of its configuration (v05.train.identity), by which the run knows the checkpoint again.
        metrics_bytes: length of what it has recorded.
        policy: what `Learner.state_dict` gave.
        ahead: completions that were sampled for the coming step.
    """
    learnt = {
        part: {name: torch.from_numpy(value) for name, value in arrays.items()} for part, arrays in estimator.state_dict().items()
    }
    return Checkpoint(
        state={"config": identity, "metrics_bytes": metrics_bytes, "run": asdict(state)},
        tensors={**policy, **learnt, "ahead": packed(ahead), "random": {"torch": torch.get_rng_state()}},
        allocator=allocator.snapshot(),
    )


def restore(
    path: Path, identity: str, learner: Learner, estimator: Estimator
) -> tuple[TrainerState, int, RolloutAllocator, list[Completion | None]]:
    """Give learner, estimator and torch's random numbers what the checkpoint at `path` holds; returns the rest of `snapshot`: the
    state, the length of the metrics in bytes, the allocator, and the completions that were sampled ahead.

    ValueError if the checkpoint is of another configuration. Nothing has changed then.
    """
    checkpoint = read_checkpoint(path)
    if checkpoint.state["config"] != identity:
        raise ValueError(f"{path} belongs to another configuration; give another directory")
    learner.load_state_dict(checkpoint.tensors)
    estimator.load_state_dict(
        {part: {name: value.numpy() for name, value in tensors.items()} for part, tensors in checkpoint.tensors.items()}
    )
    torch.set_rng_state(checkpoint.tensors["random"]["torch"])
    allocator = RolloutAllocator.restore(checkpoint.allocator)
    ahead = unpacked(checkpoint.tensors["ahead"]) if "ahead" in checkpoint.tensors else []
    return TrainerState(**checkpoint.state["run"]), checkpoint.state["metrics_bytes"], allocator, ahead
