"""Prompts and reference answers from a JSON-lines file, verified mathematically by math-verify.

One object a line: {"prompt": ..., "answer": ...}. A held-out prompt stays held out however the file is ordered.
"""

from __future__ import annotations

import json
import random
import threading
from collections.abc import Iterator
from typing import Any

from math_verify import parse, verify

from v05.tasks import JsonlConfig, Prompt, Split, split_of


def _text(value: object) -> str:
    if not isinstance(value, str | int | float):
        raise TypeError(f"{value!r} is neither text nor a number")
    return str(value)


def read_answer(text: str) -> list[Any]:
    """A reference answer as math-verify understands it; empty where it does not. Bare LaTeX is read as a formula: math-verify by
    itself finds mathematics in prose, and would take "2x+1" for 2."""
    read: list[Any] = parse(text if "\\boxed" in text or text.count("$") > 1 else f"${text}$")
    return read


def verify_answer(answer: list[Any], completion: str) -> float:
    """1.0 if a completion's final answer equals one that `read_answer` gave, else 0.0. Never raises, whatever the completion."""
    # math-verify limits its time by a signal, which only the main thread can take.
    limit = {} if threading.current_thread() is threading.main_thread() else {"timeout": None}
    try:
        parsed = parse(completion, **{f"parsing_{name}": value for name, value in limit.items()})
        return float(verify(answer, parsed, **{f"{name}_seconds": value for name, value in limit.items()}))
    except Exception:  # a completion that cannot be parsed is wrong
        return 0.0


class JsonlTask:
    """The task of a `JsonlConfig`. Raises ValueError that names the line of a malformed file."""

    def __init__(self, config: JsonlConfig) -> None:
        self._seed = config.seed
        self._of_split: dict[Split, list[Prompt]] = {"train": [], "heldout": []}
        for number, line in enumerate(config.path.read_text(encoding="utf-8").split("\n"), start=1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
                prompt = Prompt(_text(row["prompt"]), _text(row["answer"]), read_answer(_text(row["answer"])))
            except (json.JSONDecodeError, KeyError, TypeError) as error:
                raise ValueError(
                    f'{config.path}, line {number}: {error!r}; give one {{"prompt": ..., "answer": ...}} object a line'
                ) from None
            if not verify(prompt.item, prompt.item):
                raise ValueError(
                    f"{config.path}, line {number}: math-verify cannot read the answer {prompt.answer!r}; give a number or formula"
                )
            self._of_split[split_of(prompt.text)].append(prompt)
        for split, prompts in self._of_split.items():
            if not prompts:
                raise ValueError(f"{config.path}: no {split} prompt among its lines; give more lines (a tenth is held out)")

    def prompts(self, split: Split, start: int = 0) -> Iterator[tuple[int, Prompt]]:
        prompts = self._of_split[split]
        number = start
        while True:  # each pass over the file in its own order
            epoch, position = divmod(number, len(prompts))
            order = random.Random(f"{self._seed}/{epoch}").sample(range(len(prompts)), len(prompts))
            for index in order[position:]:
                yield number, prompts[index]
                number += 1

    def verify(self, prompt: Prompt, completion: str) -> float:
        return verify_answer(prompt.item, completion)
