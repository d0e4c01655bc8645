"""Prompts and reference answers from a JSON-lines file (v05.tasks.rows). v05.tasks.answers verifies completions.

Each line is one object: {"prompt": ..., "answer": ...}. The order of the lines does not change which prompts are held out.
"""

from __future__ import annotations

from collections.abc import Iterator

from v05.tasks import JsonlConfig, Prompt, Split, in_epochs, split_of
from v05.tasks.answers import read_answer, verify_answer
from v05.tasks.formulas import readable
from v05.tasks.rows import TRAINING_FIELDS, read_rows

__all__ = ["JsonlTask", "read_answer", "verify_answer"]


class AnswerScorer:
    """Verifies completions of a `JsonlTask`'s prompts. Its constructor starts the process that compares formulas."""

    def __init__(self) -> None:
        readable("0")

    def verify(self, prompt: Prompt, completion: str) -> float:
        return verify_answer(prompt.item, completion)


class JsonlTask:
    """The task of a `JsonlConfig`. Raises ValueError, which names the line, if the file is malformed."""

    may_stall = True

    def __init__(self, config: JsonlConfig) -> None:
        self._seed = config.seed
        self._of_split: dict[Split, list[Prompt]] = {"train": [], "heldout": []}
        for row in read_rows(config.path, TRAINING_FIELDS):
            prompt = Prompt(row.prompt, row.answer, row.reference, row.messages)
            self._of_split[split_of(prompt.text)].append(prompt)
        for split, prompts in self._of_split.items():
            if not prompts:
                raise ValueError(f"{config.path}: no {split} prompt in the file; give more lines (a tenth is held out)")

    def prompts(self, split: Split, start: int = 0) -> Iterator[tuple[int, Prompt]]:
        return in_epochs(self._of_split[split], self._seed, start)

    def verify(self, prompt: Prompt, completion: str) -> float:
        return verify_answer(prompt.item, completion)
