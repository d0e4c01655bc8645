"""Verifiable tasks: the sources of prompts, and the verifiers that reward completions. Each source has its own file.

A task numbers the prompts of a split, and a number always gives the same prompt. So a run's position in the data is one integer.
Training and held-out prompts are disjoint, because a hash of a prompt's text decides its split.
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
    """A prompt for the policy, with its reference answer.

    Attributes:
        text: the text that the policy reads. It also identifies the prompt across steps.
        answer: a correct completion, for supervised warm starts.
        item: data for the verifier; other code does not read it.
        messages: the (role, content) pairs of a chat, or None for plain text. The policy then reads the chat in its tokenizer's
            chat template instead of `text`.
    """

    text: str
    answer: str
    item: Any = field(compare=False, repr=False)
    messages: tuple[tuple[str, str], ...] | None = None


class Scorer(Protocol):
    """A verifier that scores completions."""

    def verify(self, prompt: Prompt, completion: str) -> float:
        """The reward: 1.0 for a correct completion, else 0.0. It never executes a completion, and no completion makes it raise.

        Raises ChildProcessError if a process that the verifier needs does not run, whatever the completion.
        """
        ...


class Task(Scorer, Protocol):
    """A source of prompts and their verifier.

    Attributes:
        may_stall: whether a completion could keep the verifier busy for long. The verifier should then run in a separate process.
    """

    may_stall: bool

    def prompts(self, split: Split, start: int = 0) -> Iterator[tuple[int, Prompt]]:
        """An endless stream of (number, prompt) of a split, from number `start` on. Resume after a prompt at `number + 1`."""
        ...


class Source(BaseModel):
    """One reasoning-gym dataset of a mix: its name, its weight in sampling, and its own settings."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)
    dataset: str
    weight: float = Field(default=1.0, gt=0)
    settings: dict[str, Any] = Field(default_factory=dict)


class ReasoningGymConfig(BaseModel):
    """A weighted mix of reasoning-gym datasets.

    The surface determines how items are written and how completions are read:

    - "question": reasoning-gym's own wording; the completion must be the answer and nothing else.
    - "instruct": an `instruction` follows the question; the completion is prose that states its answer (v05.tasks.answers).
    - "terse": a few characters, for character-level policies.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)
    kind: Literal["reasoning_gym"] = "reasoning_gym"
    mix: tuple[Source, ...] = Field(min_length=1)
    surface: Literal["question", "instruct", "terse"] = "question"
    instruction: str = Field(
        default="Think step by step, and write the final answer after ####.",
        description='text that "instruct" appends to a question',
    )
    size: int | None = Field(
        default=None, ge=1, description="training prompts, which return in a new order every epoch; None draws new ones without end"
    )
    operand_width: int = Field(default=0, ge=0, description='number of digits that "terse" pads operands to')
    seed: int = 0


class JsonlConfig(BaseModel):
    """A JSON-lines file of prompts and answers."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)
    kind: Literal["jsonl"] = "jsonl"
    path: Path
    seed: int = 0


TaskConfig = Annotated[ReasoningGymConfig | JsonlConfig, Field(discriminator="kind")]


def make_task(config: ReasoningGymConfig | JsonlConfig) -> Task:
    """The task of a configuration. The package of its source is imported only here."""
    if isinstance(config, ReasoningGymConfig):
        from v05.tasks.reasoning_gym import ReasoningGymTask

        return ReasoningGymTask(config)
    from v05.tasks.jsonl import JsonlTask

    return JsonlTask(config)


def make_scorer(config: ReasoningGymConfig | JsonlConfig) -> Scorer:
    """The verifier of a task's prompts. It does not read a JSONL task's file, which may have changed since."""
    from v05.tasks.jsonl import AnswerScorer

    if isinstance(config, ReasoningGymConfig) and config.surface != "instruct":
        return make_task(config)
    answers = AnswerScorer()  # this also starts the process that compares formulas
    return make_task(config) if isinstance(config, ReasoningGymConfig) else answers


def split_of(text: str) -> Split:
    """The split of a prompt, decided by a hash of its text."""
    digest = hashlib.blake2b(text.encode(), digest_size=8).digest()
    return "heldout" if int.from_bytes(digest, "big") < HELDOUT_SHARE * 2**64 else "train"


def heldout_set(task: Task, size: int, start: int = 0, skip: int = 0, patience: int = 50) -> list[Prompt]:
    """The first `size` distinct held-out prompts from number `start` on, after skipping the first `skip` distinct ones.

    There are fewer if (`skip` + `size`) * `patience` draws do not yield enough.
    """
    return distinct_prompts(task.prompts("heldout", start), skip + size, patience)[skip:]


def distinct_prompts(drawn: Iterator[tuple[int, Prompt]], size: int, patience: int = 50) -> list[Prompt]:
    """The first `size` distinct prompts of a stream, or fewer if `size` * `patience` draws do not yield enough."""
    distinct: dict[str, Prompt] = {}
    for draw, (_, prompt) in enumerate(drawn):
        distinct.setdefault(prompt.text, prompt)
        if len(distinct) == size or draw >= patience * size:
            break
    return list(distinct.values())


def in_epochs(prompts: Sequence[Prompt], seed: int, start: int = 0) -> Iterator[tuple[int, Prompt]]:
    """An endless stream of (number, prompt) from number `start` on. Each pass over the prompts has its own random order."""
    number = start
    while True:
        epoch, position = divmod(number, len(prompts))
        order = random.Random(f"{seed}/{epoch}").sample(range(len(prompts)), len(prompts))
        for index in order[position:]:
            yield number, prompts[index]
            number += 1
