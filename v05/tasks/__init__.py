"""Verifiable tasks: where prompts come from and what a completion is worth. One small file per source.

A task hands out prompts of a split by number, the same prompt for the same number, so a run's data position is one integer.
Training and held-out prompts are disjoint by construction: a prompt's split is a hash of its text.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

Split = Literal["train", "heldout"]
HELDOUT_SHARE = 0.1


@dataclass(frozen=True)
class Prompt:
    """What a policy is asked.

    Attributes:
        text: what the policy reads; also the prompt's identity across steps.
        answer: a right completion, for supervised warm starts.
        item: what the verifier needs, opaque to everyone else.
    """

    text: str
    answer: str
    item: Any = field(compare=False, repr=False)


class Task(Protocol):
    """A source of prompts and the verifier that scores completions."""

    def prompts(self, split: Split, start: int = 0) -> Iterator[tuple[int, Prompt]]:
        """Endless (number, prompt) of a split, from number `start` on; `number + 1` is where to resume."""
        ...

    def verify(self, prompt: Prompt, completion: str) -> float:
        """Reward 1.0 for a right completion, else 0.0. Never raises, whatever the completion."""
        ...


def split_of(text: str) -> Split:
    """The split a prompt belongs to, a hash of its text."""
    digest = hashlib.blake2b(text.encode(), digest_size=8).digest()
    return "heldout" if int.from_bytes(digest, "big") < HELDOUT_SHARE * 2**64 else "train"


def heldout_set(task: Task, size: int, patience: int = 50) -> list[Prompt]:
    """The first `size` distinct held-out prompts; fewer when `patience * size` draws hold no more."""
    distinct: dict[str, Prompt] = {}
    for draw, (_, prompt) in enumerate(task.prompts("heldout")):
        distinct.setdefault(prompt.text, prompt)
        if len(distinct) == size or draw >= patience * size:
            break
    return list(distinct.values())
