"""The state of a run between two steps, and its conversion to and from a checkpoint."""

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
    """The progress of a run, for display.

    Attributes:
        rollouts, total: training rollouts so far, and of the whole run.
        evaluations: number of held-out evaluations after the one before training.
        accuracy: held-out accuracy at the last evaluation.
        rollouts_per_second: mean speed of training; NaN before the first step.
        group_size: running mean of rollouts per prompt.
        prior_rejected: share of the last step's groups whose prior was rejected; NaN for methods without a test.
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
    """The counters of a run between two steps. They are equal on every rank, except for `seconds`.

    Attributes:
        next_prompt: position in the task's training prompts at which the next step starts.
        group_size: running mean of rollouts per prompt.
        steps, groups: training steps taken, groups opened.
        rollouts, generated_tokens: spent on training, including discarded rollouts.
        seconds: training time.
        evaluations: number of held-out evaluations after the one before training, evenly spaced in rollouts.
        accuracy_before, accuracy: held-out accuracy before training, and at the last evaluation; None before the first evaluation.
        successes: successful rollouts of each held-out prompt; None if the policy has changed since its last evaluation.
        final: the measurements at the end of the run (greedy, mean_at_k, pass_at_k, k).
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
        """The progress to display. The run must have been evaluated at least once."""
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
    """The content of result.json for a finished run (v05.train.records)."""
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
        identity: digest of the run's identity (v05.train.identity), which must be equal on resumption.
        metrics_bytes: length of metrics.jsonl.
        policy: the tensors of `Learner.state_dict`.
        ahead: completions that were sampled ahead for the next step.
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
    """Restore learner, estimator and torch's random state from the checkpoint at `path`.

    Returns the rest of it: (state, length of metrics.jsonl in bytes, allocator, completions that were sampled ahead).

    Raises ValueError if the checkpoint belongs to another configuration; nothing is changed then.
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
