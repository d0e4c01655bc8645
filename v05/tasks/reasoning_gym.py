"""Prompts and verifiers of reasoning-gym, a maintained generator of verifiable puzzles.

A mix draws from several of its datasets by weight. The surface says how an item is written for the policy: as its question, or,
for a character-level policy, as a bare sum.
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import reasoning_gym

from v05.tasks import Prompt, ReasoningGymConfig, Split, split_of

ENDLESS = 2**31 - 1  # items of a dataset; each is generated from its index when asked for


@dataclass(frozen=True)
class Surface:
    """How an item is written for a policy and read back.

    `write`: item, operand width -> prompt text, answer text. `read`: completion -> what the verifier is given.
    """

    write: Callable[[dict[str, Any], int], tuple[str, str]]
    read: Callable[[str], str]


def _write_question(item: dict[str, Any], operand_width: int) -> tuple[str, str]:
    return item["question"], str(item["answer"])


def _write_sum(item: dict[str, Any], operand_width: int) -> tuple[str, str]:
    expression = item["metadata"]["expression"].replace(" ", "")
    return re.sub(r"\d+", lambda n: n[0].zfill(operand_width), expression) + "=", str(item["answer"])[::-1]


SURFACES = {
    "question": Surface(_write_question, str.strip),
    # Operands padded to one width, the answer least-significant digit first: carries then run in reading order.
    "sum": Surface(_write_sum, lambda completion: completion[::-1]),
}


class ReasoningGymTask:
    """The task of a `ReasoningGymConfig`."""

    def __init__(self, config: ReasoningGymConfig) -> None:
        self._surface = SURFACES[config.surface]
        self._datasets = [
            reasoning_gym.create_dataset(source.dataset, size=ENDLESS, seed=config.seed, **source.settings) for source in config.mix
        ]
        self._weights = [source.weight for source in config.mix]
        self._operand_width = config.operand_width
        self._seed = config.seed

    def prompts(self, split: Split, start: int = 0) -> Iterator[tuple[int, Prompt]]:
        number = start
        while True:
            prompt = self._prompt(number)
            if split_of(prompt.text) == split:
                yield number, prompt
            number += 1

    def _prompt(self, number: int) -> Prompt:
        (source,) = random.Random(f"{self._seed}/{number}").choices(range(len(self._datasets)), self._weights)
        item = self._datasets[source][number]
        text, answer = self._surface.write(item, self._operand_width)
        return Prompt(text, answer, (source, item))

    def verify(self, prompt: Prompt, completion: str) -> float:
        source, item = prompt.item
        try:
            score = self._datasets[source].score_answer(self._surface.read(completion), item)
        except Exception:  # some verifiers raise on junk, which is then simply wrong
            return 0.0
        return float(score == 1.0)  # partial credit is no success
