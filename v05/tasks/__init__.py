"""Verifiable tasks: where prompts come from and what a completion is worth. One small file per source.

A task hands out prompts of a split by number, the same prompt for the same number, so a run's data position is one integer.
Training and held-out prompts are disjoint by construction: a prompt's split is a hash of its text.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal, Protocol

from pydantic import BaseModel, ConfigDict, Field

Split = Literal["train", "heldout"]
HELDOUT_SHARE = 0.1


@dataclass(frozen=True)
class Prompt:
    """What a policy is asked.

    Attributes:
        text: what the policy reads; also the prompt's identity across steps.
        answer: a right completion, for supervised warm starts.
        item: what the verifier needs, opaque to everyone else.
        messages: (role, content) of a chat. The policy then reads the chat, in its tokenizer's chat template. None for plain text.
    """

    text: str
    answer: str
    item: Any = field(compare=False, repr=False)
    messages: tuple[tuple[str, str], ...] | None = None


class Scorer(Protocol):
    """The verifier that scores completions."""

    def verify(self, prompt: Prompt, completion: str) -> float:
        """Reward 1.0 for a right completion, else 0.0. Never evaluates a completion, nor raises because of what it says.

        ChildProcessError: a process that the verifier needs does not run, which tells nothing about the completion.
        """
        ...


class Task(Scorer, Protocol):
    """A source of prompts and their verifier.

    Attributes:
        may_stall: whether a completion could keep the verifier busy for long, which a process of its own should guard against.
    """

    may_stall: bool

    def prompts(self, split: Split, start: int = 0) -> Iterator[tuple[int, Prompt]]:
        """Endless (number, prompt) of a split, from number `start` on; `number + 1` is where to resume."""
        ...


class Source(BaseModel):
    """One reasoning-gym dataset of a mix: its name, how often it is drawn, and its own settings."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)
    dataset: str
    weight: float = Field(default=1.0, gt=0)
    settings: dict[str, Any] = Field(default_factory=dict)


class ReasoningGymConfig(BaseModel):
    """A weighted mix of reasoning-gym datasets in one surface."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)
    kind: Literal["reasoning_gym"] = "reasoning_gym"
    mix: tuple[Source, ...] = Field(min_length=1)
    surface: Literal["question", "terse"] = "question"
    operand_width: int = Field(default=0, ge=0, description='digits that "terse" pads operands to')
    seed: int = 0


class JsonlConfig(BaseModel):
    """A JSON-lines file of prompts and answers."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)
    kind: Literal["jsonl"] = "jsonl"
    path: Path
    seed: int = 0


TaskConfig = Annotated[ReasoningGymConfig | JsonlConfig, Field(discriminator="kind")]


def make_task(config: ReasoningGymConfig | JsonlConfig) -> Task:
    """The task of its configuration; its source's package is imported only now."""
    if isinstance(config, ReasoningGymConfig):
        from v05.tasks.reasoning_gym import ReasoningGymTask

        return ReasoningGymTask(config)
    from v05.tasks.jsonl import JsonlTask

    return JsonlTask(config)


def make_scorer(config: ReasoningGymConfig | JsonlConfig) -> Scorer:
    """What verifies the prompts of a task, without its file, which may have changed since."""
    if isinstance(config, ReasoningGymConfig):
        return make_task(config)
    from v05.tasks.jsonl import AnswerScorer

    return AnswerScorer()


def split_of(text: str) -> Split:
    """The split a prompt belongs to, a hash of its text."""
    digest = hashlib.blake2b(text.encode(), digest_size=8).digest()
    return "heldout" if int.from_bytes(digest, "big") < HELDOUT_SHARE * 2**64 else "train"


def heldout_set(task: Task, size: int, start: int = 0, skip: int = 0, patience: int = 50) -> list[Prompt]:
    """The first `size` distinct held-out prompts from number `start` on, after `skip` others; fewer when `patience` times as many
    draws hold no more."""
    distinct: dict[str, Prompt] = {}
    for draw, (_, prompt) in enumerate(task.prompts("heldout", start)):
        distinct.setdefault(prompt.text, prompt)
        if len(distinct) == skip + size or draw >= patience * (skip + size):
            break
    return list(distinct.values())[skip:]
