"""Verifiable tasks: where prompts come from and what a completion is worth. One small file per source.

A task hands out prompts of a split by number, the same prompt for the same number, so a run's data position is one integer.
Training and held-out prompts are disjoint by construction: a prompt's split is a hash of its text.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterator, Sequence
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
    """A weighted mix of reasoning-gym datasets in one surface.

    The surface is how an item is written and read: "question" as reasoning-gym words it, for a completion that is the answer and
    nothing else; "instruct" with an `instruction` after the question, for a completion in prose that states its answer
    (v05.tasks.answers); "terse" in a few characters.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)
    kind: Literal["reasoning_gym"] = "reasoning_gym"
    mix: tuple[Source, ...] = Field(min_length=1)
    surface: Literal["question", "instruct", "terse"] = "question"
    instruction: str = Field(
        default="Think step by step, and write the final answer after ####.", description='that "instruct" appends to a question'
    )
    size: int | None = Field(
        default=None, ge=1, description="training prompts, which then return in another order; None is new ones without end"
    )
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
    from v05.tasks.jsonl import AnswerScorer

    if isinstance(config, ReasoningGymConfig) and config.surface != "instruct":
        return make_task(config)
    answers = AnswerScorer()  # and with it the process that compares formulas
    return make_task(config) if isinstance(config, ReasoningGymConfig) else answers


def split_of(text: str) -> Split:
    """The split a prompt belongs to, a hash of its text."""
    digest = hashlib.blake2b(text.encode(), digest_size=8).digest()
    return "heldout" if int.from_bytes(digest, "big") < HELDOUT_SHARE * 2**64 else "train"


def heldout_set(task: Task, size: int, start: int = 0, skip: int = 0, patience: int = 50) -> list[Prompt]:
    """The first `size` distinct held-out prompts from number `start` on, after `skip` others; fewer when `patience` times as many
    draws hold no more."""
    return distinct_prompts(task.prompts("heldout", start), skip + size, patience)[skip:]


def distinct_prompts(drawn: Iterator[tuple[int, Prompt]], size: int, patience: int = 50) -> list[Prompt]:
    """The first `size` distinct prompts of those that are drawn; fewer when `patience` times as many draws hold no more."""
    distinct: dict[str, Prompt] = {}
    for draw, (_, prompt) in enumerate(drawn):
        distinct.setdefault(prompt.text, prompt)
        if len(distinct) == size or draw >= patience * size:
            break
    return list(distinct.values())


def in_epochs(prompts: Sequence[Prompt], seed: int, start: int = 0) -> Iterator[tuple[int, Prompt]]:
    """Endless (number, prompt) from number `start` on: each pass over the prompts in an order of its own."""
    number = start
    while True:
        epoch, position = divmod(number, len(prompts))
        order = random.Random(f"{seed}/{epoch}").sample(range(len(prompts)), len(prompts))
        for index in order[position:]:
            yield number, prompts[index]
            number += 1
