"""The continuous loop: lease rollouts, sample them, verify them, report them, until every group has stopped.

The engine is kept full. As soon as a rollout is verified its group is tested, and a group that needs more rollouts has them leased
ahead of new groups. Which rollouts a group gets is the allocator's decision alone, so it depends on no order of arrival. A rollout
that fails, or whose verification does, goes back to the allocator, which leases it again with the same seed or gives it up. Leases
that somebody lets expire meanwhile come back too, and find their rollouts leased again.

While the last groups are tested the engine has room. Requests may be given that it fills it with: the first rollouts of the coming
groups, which are then ready when their turn comes.
"""

from __future__ import annotations

import itertools
import time
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
from numpy.typing import NDArray

from v05.budget import RolloutAllocator
from v05.rollout import Completion, Failure, Request, RolloutEngine
from v05.rollout.verifier import Item, Verifier
from v05.tasks import Prompt

VERIFIER_GLANCE = 0.02  # seconds between looks at the verifier while the engine has nothing to give


@dataclass(frozen=True)
class RolloutBatch:
    """The finished rollouts of G prompts, N in all; those of prompt g are offsets[g] .. offsets[g+1] - 1, at least one.

    Attributes:
        prompts: G prompts.
        prompt_tokens: their token ids.
        priors: (G,) float64, what the prior predicted, reward units.
        offsets: (G+1,) int64.
        rewards: (N,) float64, the verifier's.
        completions: N completions.
        invalid: rollouts given up after repeated failures; they are not among the N.
        failures: what went wrong, a text an attempt.
        in_flight: mean number of rollouts in the engine when it was polled; NaN for an empty batch.
        generate_seconds, verify_seconds: wall-clock that the loop spent on the engine and on the verifier.
        ahead: the completions of the requests that were sampled ahead, None for one that failed. They are not among the N.
    """

    prompts: list[Prompt]
    prompt_tokens: list[tuple[int, ...]]
    priors: NDArray[np.float64]
    offsets: NDArray[np.int64]
    rewards: NDArray[np.float64]
    completions: list[Completion]
    invalid: int
    failures: list[str]
    in_flight: float
    generate_seconds: float
    verify_seconds: float
    ahead: list[Completion | None] = field(default_factory=list)


def collect(
    allocator: RolloutAllocator,
    engine: RolloutEngine,
    verifier: Verifier,
    prompts: Sequence[Prompt],
    prompt_tokens: Sequence[tuple[int, ...]],
    priors: NDArray[np.float64],
    *,
    first_group: int,
    ready: Mapping[tuple[int, int], Completion] | None = None,
    ahead: Sequence[Request] = (),
) -> RolloutBatch:
    """Sample and verify rollouts of `prompts` until the allocator has stopped all their groups.

    In flight are at most `engine.capacity` rollouts in the engine, and that many more with the verifier; none is when it returns.
    With a reproducible engine each poll's rollouts are verified before the next poll, so that the same seed gives the same batches
    bitwise.

    Args:
        allocator: decides how many; group `first_group + g` is opened for prompt g, so ids stay unique (and seeds fresh) in a run.
        engine, verifier: with nothing in flight.
        prompt_tokens: token ids of each prompt.
        priors: (G,) reward units.
        ready: completions that were sampled before, by their place: (prompt, index in its group). They are verified when the
            allocator leases their place, and not sampled again.
        ahead: requests of groups to come. They are sampled once, from the first reward on, where the allocator leaves the engine
            room; all have ended when this returns.

    Raises:
        RuntimeError: not one rollout came through; with the last failure's text.
    """
    allocator.open(np.arange(first_group, first_group + len(prompts)), priors)
    ready = ready or {}
    waiting = deque(range(len(ahead)))
    sampled_ahead: list[Completion | None] = [None] * len(ahead)
    early = 0  # of `ahead`, in the engine
    sampling: dict[int, tuple[int, int]] = {}  # lease -> place: (prompt, index in its group)
    verifying: dict[int, tuple[int, int, Completion]] = {}
    newest: dict[tuple[int, int], int] = {}  # place -> its last lease, whose report counts: those before have failed or expired
    done: dict[tuple[int, int], Completion] = {}
    failures: list[str] = []
    in_flight: list[int] = []
    generate_seconds = verify_seconds = 0.0
    rewarded = False
    while not allocator.done or sampling or verifying or waiting or early:
        started = time.perf_counter()
        room = engine.capacity - len(sampling) - early
        leases = allocator.lease(min(room, room + engine.capacity - len(verifying)))
        groups = (np.asarray(leases.group) - first_group).tolist()
        keys = leases.lease_id.tolist()
        places = list(zip(groups, leases.index.tolist(), strict=True))
        newest.update(zip(places, keys, strict=True))
        completed = [(key, place, ready[place]) for key, place in zip(keys, places, strict=True) if place in ready]
        requests = {
            key: Request(prompt_tokens[place[0]], seed)
            for key, place, seed in zip(keys, places, leases.seed.tolist(), strict=True)
            if place not in ready
        }
        sampling.update((key, place) for key, place in zip(keys, places, strict=True) if key in requests)
        if rewarded or allocator.done:
            for i in [waiting.popleft() for _ in range(min(len(waiting), room - len(requests)))]:
                requests[-1 - i] = ahead[i]  # leases have no negative keys
                early += 1
        if requests:
            engine.submit(list(requests), list(requests.values()))
        in_flight.append(len(sampling) + early)
        failed = []
        for key, result in engine.poll(VERIFIER_GLANCE if verifying or completed else None) if sampling or early else ():
            if key < 0:
                early -= 1
                sampled_ahead[-1 - key] = None if isinstance(result, Failure) else result
                continue
            place = sampling.pop(key)
            if isinstance(result, Failure):
                failed.append((key, result))
            else:
                completed.append((key, place, result))
        verifying.update((key, (*place, completion)) for key, place, completion in completed)
        items = [Item(key, prompts[place[0]], engine.decode(completion)) for key, place, completion in completed]
        generated = time.perf_counter()

        verifier.submit(items)
        verified = verifier.poll(wait=not (sampling or early))
        while engine.reproducible and len(verified) < len(items):
            verified += verifier.poll(wait=True)
        rewards = {}
        for key, reward in sorted(verified, key=lambda pair: pair[0]):
            g, index, completion = verifying.pop(key)
            if isinstance(reward, Failure):
                failed.append((key, reward))
            else:
                rewards[key] = reward
                if newest[g, index] == key:
                    done[g, index] = completion
        allocator.report(list(rewards), list(rewards.values()))
        rewarded = rewarded or bool(rewards)
        allocator.fail([key for key, _ in failed])
        failures += [failure.error for _, failure in failed]
        generate_seconds += generated - started
        verify_seconds += time.perf_counter() - generated

    closed = allocator.drain()
    valid = ~np.isnan(closed.rewards)
    if len(prompts) and not valid.any():
        last = failures[-1] if failures else "their leases expired"
        raise RuntimeError(f"none of {len(closed.rewards)} rollouts came through; the last failure: {last}")
    slots = np.repeat(np.arange(len(prompts)), np.diff(closed.offsets))
    indices = np.arange(len(slots)) - closed.offsets[slots]
    batch = RolloutBatch(
        prompts=list(prompts),
        prompt_tokens=list(prompt_tokens),
        priors=closed.priors,
        offsets=np.concatenate(([0], np.cumsum(valid)))[closed.offsets],
        rewards=closed.rewards[valid],
        completions=[done[place] for place in zip(slots[valid].tolist(), indices[valid].tolist(), strict=True)],
        invalid=int((~valid).sum()),
        failures=failures,
        in_flight=float(np.mean(in_flight)) if in_flight else float("nan"),
        generate_seconds=generate_seconds,
        verify_seconds=verify_seconds,
        ahead=sampled_ahead,
    )
    return select(batch, np.diff(batch.offsets) > 0)


def select(batch: RolloutBatch, keep: NDArray[np.bool_]) -> RolloutBatch:
    """The groups of `batch` where (G,) `keep` is set. What was spent, failures and seconds, stays."""
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
    """The groups of all batches, in order; failures and seconds add up."""
    sizes = np.concatenate([np.diff(batch.offsets) for batch in batches])
    return RolloutBatch(
        prompts=[prompt for batch in batches for prompt in batch.prompts],
        prompt_tokens=[tokens for batch in batches for tokens in batch.prompt_tokens],
        priors=np.concatenate([batch.priors for batch in batches]),
        offsets=np.concatenate(([0], np.cumsum(sizes))),
        rewards=np.concatenate([batch.rewards for batch in batches]),
        completions=[completion for batch in batches for completion in batch.completions],
        invalid=sum(batch.invalid for batch in batches),
        failures=[failure for batch in batches for failure in batch.failures],
        in_flight=float(np.mean([batch.in_flight for batch in batches])),
        generate_seconds=sum(batch.generate_seconds for batch in batches),
        verify_seconds=sum(batch.verify_seconds for batch in batches),
        ahead=[completion for batch in batches for completion in batch.ahead],
    )
