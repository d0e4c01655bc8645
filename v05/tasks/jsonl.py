"""Prompts and reference answers from a JSON-lines file (v05.tasks.rows), completions judged by v05.tasks.answers.

One object a line: {"prompt": ..., "answer": ...}. A held-out prompt stays held out however the file is ordered.
"""

from __future__ import annotations

from collections.abc import Iterator

from v05.tasks import JsonlConfig, Prompt, Split, in_epochs, split_of
from v05.tasks.answers import read_answer, verify_answer
from v05.tasks.formulas import readable
from v05.tasks.rows import TRAINING_FIELDS, read_rows

__all__ = ["JsonlTask", "read_answer", "verify_answer"]


class AnswerScorer:
    """Verifies the prompts of a `JsonlTask`. Once it is made, the process that compares formulas is running."""

    def __init__(self) -> None:
        readable("0")

    def verify(self, prompt: Prompt, completion: str) -> float:
        return verify_answer(prompt.item, completion)


class JsonlTask:
    """The task of a `JsonlConfig`. Raises ValueError that names the line of a malformed file."""

    may_stall = True

    def __init__(self, config: JsonlConfig) -> None:
        self._seed = config.seed
        self._of_split: dict[Split, list[Prompt]] = {"train": [], "heldout": []}
        for row in read_rows(config.path, TRAINING_FIELDS):
            prompt = Prompt(row.prompt, row.answer, row.reference, row.messages)
            self._of_split[split_of(prompt.text)].append(prompt)
        for split, prompts in self._of_split.items():
            if not prompts:
                raise ValueError(f"{config.path}: no {split} prompt among its lines; give more lines (a tenth is held out)")

    def prompts(self, split: Split, start: int = 0) -> Iterator[tuple[int, Prompt]]:
        return in_epochs(self._of_split[split], self._seed, start)

    def verify(self, prompt: Prompt, completion: str) -> float:
        return verify_answer(prompt.item, completion)
