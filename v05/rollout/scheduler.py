"""The sequential loop: lease rollouts, sample them, verify them, report them, until every group has stopped.

A group that needs more rollouts has them leased ahead of new groups, so extra rollouts ride in the next batch beside the first
rollouts of later prompts. Which rollouts a group gets is the allocator's decision alone.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from v05.budget import RolloutAllocator
from v05.rollout import Completion, Request, RolloutEngine
from v05.tasks import Prompt, Task


@dataclass(frozen=True)
class RolloutBatch:
    """The finished rollouts of G prompts, N in all; those of prompt g are offsets[g] .. offsets[g+1] - 1.

    Attributes:
        prompts: G prompts.
        prompt_tokens: their token ids.
        priors: (G,) float64, what the prior predicted, reward units.
        offsets: (G+1,) int64.
        rewards: (N,) float64, the verifier's.
        completions: N completions.
        rounds: generation calls, one after another.
        generate_seconds, verify_seconds: wall-clock by stage.
    """

    prompts: list[Prompt]
    prompt_tokens: list[tuple[int, ...]]
    priors: NDArray[np.float64]
    offsets: NDArray[np.int64]
    rewards: NDArray[np.float64]
    completions: list[Completion]
    rounds: int
    generate_seconds: float
    verify_seconds: float


def collect(
    allocator: RolloutAllocator,
    engine: RolloutEngine,
    task: Task,
    prompts: Sequence[Prompt],
    prompt_tokens: Sequence[tuple[int, ...]],
    priors: NDArray[np.float64],
    *,
    first_group: int,
    batch_size: int,
) -> RolloutBatch:
    """Sample and verify rollouts of `prompts` until the allocator has stopped all their groups.

    Args:
        allocator: decides how many; group `first_group + g` is opened for prompt g, so ids stay unique (and seeds fresh) in a run.
        prompt_tokens: token ids of each prompt.
        priors: (G,) reward units.
        batch_size: rollouts leased at a time.
    """
    allocator.open(np.arange(first_group, first_group + len(prompts)), priors)
    done: dict[tuple[int, int], Completion] = {}
    rounds = 0
    generate_seconds = verify_seconds = 0.0
    while not allocator.done:
        leases = allocator.lease(batch_size)
        slots = np.asarray(leases.group) - first_group
        started = time.perf_counter()
        completions = engine.generate([Request(prompt_tokens[g], int(seed)) for g, seed in zip(slots, leases.seed, strict=True)])
        generated = time.perf_counter()
        rewards = [task.verify(prompts[g], engine.decode(completion)) for g, completion in zip(slots, completions, strict=True)]
        generate_seconds += generated - started
        verify_seconds += time.perf_counter() - generated
        rounds += 1
        done.update(zip(zip(slots.tolist(), leases.index.tolist(), strict=True), completions, strict=True))
        allocator.report(leases.lease_id, np.asarray(rewards))

    closed = allocator.drain()
    sizes = np.diff(closed.offsets)
    return RolloutBatch(
        prompts=list(prompts),
        prompt_tokens=list(prompt_tokens),
        priors=closed.priors,
        offsets=closed.offsets,
        rewards=closed.rewards,
        completions=[done[g, i] for g, size in enumerate(sizes) for i in range(size)],
        rounds=rounds,
        generate_seconds=generate_seconds,
        verify_seconds=verify_seconds,
    )


def select(batch: RolloutBatch, keep: NDArray[np.bool_]) -> RolloutBatch:
    """The groups of `batch` where (G,) `keep` is set. Rounds and seconds stay: they were spent."""
    sizes = np.diff(batch.offsets)
    rows = np.repeat(keep, sizes)
    return replace(
        batch,
        prompts=list(itertools.compress(batch.prompts, keep)),
        prompt_tokens=list(itertools.compress(batch.prompt_tokens, keep)),
        priors=batch.priors[keep],
        offsets=np.concatenate(([0], np.cumsum(sizes[keep]))),
        rewards=batch.rewards[rows],
        completions=list(itertools.compress(batch.completions, rows)),
    )


def join(batches: Sequence[RolloutBatch]) -> RolloutBatch:
    """The groups of all batches, in order; rounds and seconds add up."""
    sizes = np.concatenate([np.diff(batch.offsets) for batch in batches])
    return RolloutBatch(
        prompts=[prompt for batch in batches for prompt in batch.prompts],
        prompt_tokens=[tokens for batch in batches for tokens in batch.prompt_tokens],
        priors=np.concatenate([batch.priors for batch in batches]),
        offsets=np.concatenate(([0], np.cumsum(sizes))),
        rewards=np.concatenate([batch.rewards for batch in batches]),
        completions=[completion for batch in batches for completion in batch.completions],
        rounds=sum(batch.rounds for batch in batches),
        generate_seconds=sum(batch.generate_seconds for batch in batches),
        verify_seconds=sum(batch.verify_seconds for batch in batches),
    )
