"""Overlap of steps: sampling the first rollouts of the next step while the last groups of this step are tested
(`RunConfig.overlap`).

A sequential test asks for few rollouts towards the end of a step, so the engine has room then. Rollouts that are sampled ahead come
from the policy before its update, and are off-policy by one update. The loss takes the probability ratio to the policy that sampled
them, and its clipping bounds their weight.
"""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from v05.budget import RolloutAllocator
from v05.rollout import Completion, Request
from v05.tasks import Prompt


class PromptQueue:
    """A task's prompts in order. The next prompts can be looked at before they are drawn."""

    def __init__(self, prompts: Iterator[tuple[int, Prompt]]) -> None:
        self._prompts = prompts
        self._seen: deque[tuple[int, Prompt]] = deque()

    def look(self, count: int) -> list[tuple[int, Prompt]]:
        """The next `count` prompts, which stay in the queue."""
        self._seen.extend(itertools.islice(self._prompts, max(0, count - len(self._seen))))
        return list(itertools.islice(self._seen, count))

    def draw(self, count: int) -> list[tuple[int, Prompt]]:
        """The next `count` prompts, which leave the queue."""
        drawn = self.look(count)
        for _ in drawn:
            self._seen.popleft()
        return drawn


def requests_ahead(prompt_tokens: Sequence[tuple[int, ...]], first_group: int, initial: int, seed: int) -> list[Request]:
    """The first `initial` requests per prompt, in order, that an allocator with this seed will make for groups first_group, ..."""
    allocator = RolloutAllocator(rule="uniform", initial=initial, maximum=initial, seed=seed)
    allocator.open(np.arange(first_group, first_group + len(prompt_tokens)), np.full(len(prompt_tokens), np.nan))
    leases = allocator.lease(initial * len(prompt_tokens))
    seeds = dict(zip(zip(leases.group.tolist(), leases.index.tolist(), strict=True), leases.seed.tolist(), strict=True))
    return [Request(tokens, seeds[first_group + g, i]) for g, tokens in enumerate(prompt_tokens) for i in range(initial)]


def places(completions: Sequence[Completion | None], initial: int) -> dict[tuple[int, int], Completion]:
    """The completions of `requests_ahead` by their place: (prompt, index in the group). Failed ones (None) are left out."""
    return {divmod(i, initial): completion for i, completion in enumerate(completions) if completion is not None}


def packed(completions: Sequence[Completion | None]) -> dict[str, torch.Tensor]:
    """Completions as tensors for a checkpoint. A length of -1 stands for None. All completions must be from the same engine."""
    known = [completion for completion in completions if completion is not None]
    arrays: dict[str, list[NDArray[Any]]] = {"tokens": [c.tokens for c in known], "logprobs": [c.logprobs for c in known]}
    squares = [c.sum_pi_squared for c in known if c.sum_pi_squared is not None]
    if squares:
        arrays["sum_pi_squared"] = squares
    lengths = [-1 if completion is None else len(completion.tokens) for completion in completions]
    return {
        "lengths": torch.tensor(lengths, dtype=torch.int64, device="cpu"),
        "finished": torch.tensor([c.finished for c in known], dtype=torch.bool, device="cpu"),
        **{name: torch.from_numpy(np.concatenate(rows)) for name, rows in arrays.items() if rows},
    }


def unpacked(tensors: Mapping[str, torch.Tensor]) -> list[Completion | None]:
    """The completions that `packed` turned into these tensors."""
    lengths = tensors["lengths"].tolist()
    rows = {
        name: iter(np.split(tensors[name].numpy(), np.cumsum([n for n in lengths if n >= 0])[:-1]))
        for name in ("tokens", "logprobs", "sum_pi_squared")
        if name in tensors
    }
    finished = iter(tensors["finished"].tolist())
    return [
        None
        if length < 0
        else Completion(
            tokens=next(rows["tokens"]),
            logprobs=next(rows["logprobs"]),
            finished=next(finished),
            sum_pi_squared=next(rows["sum_pi_squared"]) if "sum_pi_squared" in rows else None,
        )
        for length in lengths
    ]
