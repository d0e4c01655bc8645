"""The scheduler loop: lease rollouts, sample them, verify them and report them, until every group is closed.

The loop keeps the engine full. A group is tested as soon as its rollouts are verified, and if it needs more, those are leased ahead
of new groups. Only the allocator decides which rollouts a group gets, so the decision does not depend on the order of arrival. If
sampling or verification of a rollout fails, it goes back to the allocator, which leases it again with the same seed or closes it as
invalid. A lease may also expire while its rollout is under way; the rollout is then leased again, and the result of the old lease
is ignored.

The engine has room while the last groups are tested. The caller can give requests to fill it: the first rollouts of groups of the
next step, which are then ready when those groups are opened.
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

VERIFIER_GLANCE = 0.02  # seconds between polls of the verifier while the engine has no results


@dataclass(frozen=True)
class RolloutBatch:
    """The finished rollouts of G prompts, N in all. Prompt g has rollouts offsets[g] .. offsets[g+1] - 1, at least one.

    Attributes:
        prompts: G prompts.
        prompt_tokens: token ids of each prompt.
        priors: (G,) float64, predicted success rates, reward units.
        offsets: (G+1,) int64.
        rewards: (N,) float64, from the verifier.
        completions: N completions.
        invalid: number of rollouts given up after repeated failures; they are not among the N.
        failures: one error text per failed attempt.
        in_flight: mean number of rollouts in the engine when it was polled; NaN for an empty batch.
        generate_seconds, verify_seconds: wall-clock time that the loop spent on the engine and on the verifier.
        ahead: completions of the requests sampled ahead; None for a failed one. They are not among the N.
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
    """Sample and verify rollouts of `prompts` until the allocator has closed all their groups.

    At most `engine.capacity` rollouts are in the engine, and as many with the verifier; both are empty when this returns. With a
    reproducible engine, the rollouts of each poll are verified before the next poll, so the same seed gives bitwise equal batches.

    Args:
        allocator: decides the number of rollouts. Group `first_group + g` is opened for prompt g, so that group ids, and with them
            the seeds, are unique in a run.
        engine, verifier: must have nothing in flight.
        prompt_tokens: token ids of each prompt.
        priors: (G,) float64, predicted success rates, reward units.
        ready: completions that were sampled before, by place: (prompt, index in its group). Each is verified when the allocator
            leases its place, instead of being sampled.
        ahead: requests for groups of the next step. After the first reward, they are sampled whenever the allocator leaves room in
            the engine. All have ended when this returns.

    Raises:
        RuntimeError: no rollout succeeded; the message has the last failure.
    """
    allocator.open(np.arange(first_group, first_group + len(prompts)), priors)
    ready = ready or {}
    waiting = deque(range(len(ahead)))
    sampled_ahead: list[Completion | None] = [None] * len(ahead)
    early = 0  # number of requests of `ahead` in the engine
    sampling: dict[int, tuple[int, int]] = {}  # lease -> place: (prompt, index in its group)
    verifying: dict[int, tuple[int, int, Completion]] = {}
    # Place -> its latest lease; earlier leases have failed or expired, and their reports do not count.
    newest: dict[tuple[int, int], int] = {}
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
        raise RuntimeError(f"none of {len(closed.rewards)} rollouts succeeded; the last failure: {last}")
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
    """The groups of `batch` for which (G,) `keep` is True. Failures and seconds are kept unchanged."""
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
    """One batch of the groups of all batches, in order. Failures and seconds add up."""
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
