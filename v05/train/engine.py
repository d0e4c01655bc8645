"""The engine and the verifier of a run, made from its configuration."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from v05.rollout import RolloutEngine
from v05.rollout.transformers_engine import TransformersEngine
from v05.rollout.verifier import InlineVerifier, Verifier, VerifierPool
from v05.tasks import Task, make_task
from v05.train.config import RunConfig


def make_engine(config: RunConfig, folder: Path, model: PreTrainedModel, tokenizer: Any) -> RolloutEngine:
    """The engine of a run: the embedded one samples from `model` itself, the others from the copy in `folder`."""
    return TransformersEngine(model, tokenizer, max_new_tokens=config.policy.max_new_tokens, capacity=config.sampling_batch)


def make_verifier(config: RunConfig, task: Task) -> Verifier:
    """The verifier of a run: inline, or a pool whose processes each make their own task."""
    settings = config.verifier
    if settings.workers == 0:
        return InlineVerifier(task)
    return VerifierPool(functools.partial(make_task, config.task), workers=settings.workers, time_limit=settings.time_limit)
