"""Prompts and verifiers of reasoning-gym, a maintained generator of verifiable puzzles.

A mix draws from several of its datasets by weight. The surface determines how an item is written for the policy: as its question,
as its question with an instruction for a language model, or in a few characters for a character-level policy.
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import reasoning_gym

from v05.tasks import Prompt, ReasoningGymConfig, Split, distinct_prompts, in_epochs, split_of
from v05.tasks.answers import read_answer, verify_answer
from v05.tasks.scorers import COMPARED, STATED, refuse_unread, scorer_of

ENDLESS = 2**31 - 1  # size of a dataset; an item is generated from its index when it is needed
LISTED = {
    "gsm_symbolic": 99_991
}  # size of a dataset that makes a list for all items at the start; a prime, so that seeds start apart
LONGEST = 1_000_000  # characters; a longer completion gets the reward 0 without being read
UNSOLVED = "Integral("  # marks a reference answer whose antiderivative sympy did not find


@dataclass(frozen=True)
class Surface:
    """How an item is written for a policy and how completions are read.

    Attributes:
        write: returns the prompt's and the answer's text for an item and the task's configuration.
        read: returns the verifier's input for a completion.
        verify: returns whether an input is right for an item. None means the dataset's own verifier.
    """

    write: Callable[[dict[str, Any], ReasoningGymConfig], tuple[str, str]]
    read: Callable[[str], str] = str.strip
    verify: Callable[[dict[str, Any], str], bool] | None = None


def _write_question(item: dict[str, Any], config: ReasoningGymConfig) -> tuple[str, str]:
    return item["question"], str(item["answer"])


def _write_instruct(item: dict[str, Any], config: ReasoningGymConfig) -> tuple[str, str]:
    return f"{item['question'].strip()}\n{config.instruction}", str(item["answer"])


def _states_answer(item: dict[str, Any], completion: str) -> bool:
    return verify_answer(read_answer(item["answer"]), completion) == 1.0


def _write_sum(item: dict[str, Any], config: ReasoningGymConfig) -> tuple[str, str]:
    expression = item["metadata"]["expression"].replace(" ", "")
    return re.sub(r"\d+", lambda n: n[0].zfill(config.operand_width), expression) + "=", str(item["answer"])[::-1]


def _write_multiple(item: dict[str, Any], config: ReasoningGymConfig) -> tuple[str, str]:
    return ",".join(str(n).zfill(config.operand_width) for n in item["metadata"]["numbers"]) + "=", str(item["answer"])[::-1]


def _write_base(item: dict[str, Any], config: ReasoningGymConfig) -> tuple[str, str]:
    about = item["metadata"]
    return f"{about['source_repr']} {about['source_base']}>{about['target_base']}=", str(item["answer"])


def _write_backward(item: dict[str, Any], config: ReasoningGymConfig) -> tuple[str, str]:
    return item["metadata"]["word"] + "<", str(item["answer"])


AB = {"A#": "a", "#A": "A", "B#": "b", "#B": "B"}  # tokens of the A::B system as single characters


def _write_ab(item: dict[str, Any], config: ReasoningGymConfig) -> tuple[str, str]:
    (program,) = re.findall(r"^(?:[AB]#|#[AB])(?: (?:[AB]#|#[AB]))*$", item["question"], re.MULTILINE)
    return _short_ab(program) + ">", _short_ab(item["answer"])


def _short_ab(program: str) -> str:
    return "".join(AB[token] for token in program.split())


def _read_ab(completion: str) -> str:
    tokens = {short: token for token, short in AB.items()}
    return " ".join(tokens.get(letter, letter) for letter in completion.strip())


QUESTION = Surface(_write_question)
INSTRUCT = Surface(_write_instruct, verify=_states_answer)
# Operands are padded to one width and the answer is written least significant digit first, so that carries follow reading order.
SUM = Surface(_write_sum, lambda completion: completion[::-1])
TERSE = {
    "ab": Surface(_write_ab, _read_ab),
    "base_conversion": Surface(_write_base),
    "chain_sum": SUM,
    "lcm": Surface(_write_multiple, SUM.read),
    "products": SUM,
    "spell_backward": Surface(_write_backward),
}


def surface_of(config: ReasoningGymConfig, dataset: str) -> Surface:
    """The surface of a dataset. Raises ValueError if the configured surface does not support the dataset."""
    if config.surface == "question":
        return QUESTION
    if config.surface == "instruct":
        if dataset not in STATED:
            raise ValueError(
                f"task.surface='instruct' reads one number or word, but {dataset!r} has others; use 'question', or one of "
                f"{', '.join(sorted(STATED))}"
            )
        return INSTRUCT
    if dataset not in TERSE:
        raise ValueError(f"task.surface='terse' cannot write {dataset!r}; use 'question', or one of {', '.join(TERSE)}")
    return TERSE[dataset]


class ReasoningGymTask:
    """The task of a `ReasoningGymConfig`. Raises ValueError for a data set that cannot be used.

    Attributes:
        may_stall: whether a completion could keep a verifier busy for long. The verifiers of `COMPARED` cannot be kept busy, except
            by completions in prose.
    """

    def __init__(self, config: ReasoningGymConfig) -> None:
        self._surfaces = [surface_of(config, source.dataset) for source in config.mix]
        self._datasets, self._scorers = [], []
        for source in config.mix:
            refuse_unread(source.dataset)
            items = LISTED.get(source.dataset, ENDLESS)
            dataset = reasoning_gym.create_dataset(source.dataset, size=items, seed=config.seed, **source.settings)
            self._datasets.append(dataset)
            self._scorers.append(surface_of(config, source.dataset).verify or scorer_of(source.dataset, dataset))
        self.may_stall = config.surface == "instruct" or any(source.dataset not in COMPARED for source in config.mix)
        self._weights = [source.weight for source in config.mix]
        self._config = config

    def prompts(self, split: Split, start: int = 0) -> Iterator[tuple[int, Prompt]]:
        if split == "train" and self._config.size is not None:
            return in_epochs(self._returning, self._config.seed, start)
        return self._drawn(split, start)

    @cached_property
    def _returning(self) -> list[Prompt]:
        """The `size` training prompts. Raises ValueError if the mix has fewer."""
        size = self._config.size or 0
        prompts = distinct_prompts(self._drawn("train", 0), size)
        if len(prompts) < size:
            raise ValueError(f"task.size={size}, but the mix has only {len(prompts)} different training prompts; lower it")
        return prompts

    def _drawn(self, split: Split, start: int) -> Iterator[tuple[int, Prompt]]:
        number = start
        while True:
            prompt = self._prompt(number)
            if split_of(prompt.text) == split and UNSOLVED not in prompt.answer:
                yield number, prompt
            number += 1

    def _prompt(self, number: int) -> Prompt:
        (source,) = random.Random(f"{self._config.seed}/{number}").choices(range(len(self._datasets)), self._weights)
        item = self._datasets[source][number % len(self._datasets[source])]
        text, answer = self._surfaces[source].write(item, self._config)
        return Prompt(text, answer, (source, item))

    def verify(self, prompt: Prompt, completion: str) -> float:
        source, item = prompt.item
        if len(completion) > LONGEST:
            return 0.0
        try:
            return float(self._scorers[source](item, self._surfaces[source].read(completion)))
        except KeyboardInterrupt:
            raise
        except BaseException:  # some verifiers raise on invalid completions; that counts as wrong and must not end the run
            return 0.0
