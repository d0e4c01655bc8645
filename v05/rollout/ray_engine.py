"""An engine of several actors on a Ray cluster, each with an engine of its own inside.

At each sync, weights are put into the object store once, and every actor reads them from there. If an actor dies, or hangs and is
killed, its rollouts return as failures, and the allocator leases them again with the same seeds. A new actor with the same weights
takes its place.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch

from v05.messages import printable
from v05.rollout import Completion, Failure, Request, RolloutEngine, decode, refuse_update_in_flight

FAILED_STARTS = 3  # actors in a row that fail to start before the engine raises
PATIENCE = 600.0  # seconds to wait for a first actor to start, and for an actor to load new weights


class RayEngine:
    """`actors` engines on the cluster that Ray is connected to; without one, Ray is started on this machine.

    Args:
        make_engine: makes the engine inside an actor; must be picklable.
        tokenizer: the policy's tokenizer, for `decode`.
        actors: number of actors.
        options: Ray's options of the actors, such as num_cpus, num_gpus, resources and scheduling_strategy.
        time_limit: seconds that a rollout may take, including its wait inside the actor. An actor that takes longer is killed.

    Raises:
        ImportError: Ray is not installed; the message names the extra.
        RuntimeError: no actor starts. Any method may raise this.
    """

    reproducible = False

    def __init__(
        self,
        make_engine: Callable[[], RolloutEngine],
        tokenizer: Any,
        *,
        actors: int,
        options: dict[str, Any] | None = None,
        time_limit: float = 600.0,
    ) -> None:
        try:
            import ray
            import ray.exceptions  # fails if "ray" is only a folder of that name
        except ImportError as error:
            raise ImportError("the Ray engine needs the package 'ray'; install it with: pip install 'v05[ray]'") from error
        if not ray.is_initialized():
            ray.init(log_to_driver=False)
        self._ray = ray
        self._tokenizer = tokenizer
        self._time_limit = time_limit
        self._failed_starts = 0
        self._weights: Any = None  # reference to the weights of the last sync in the object store
        actor_class = ray.remote(_Actor).options(max_restarts=0, **(options or {}))
        self._start: Callable[[], _Remote] = lambda: _Remote(actor_class.remote(make_engine, self._weights))
        self._actors = [self._start() for _ in range(actors)]
        self.capacity = actors * int(self._working()[0].capacity)

    def decode(self, completion: Completion) -> str:
        return decode(self._tokenizer, completion)

    def submit(self, keys: Sequence[int], requests: Sequence[Request]) -> None:
        """Give each rollout to the actor that has the fewest. Actors that are still starting get none."""
        shares: dict[_Remote, list[tuple[int, Request]]] = {actor: [] for actor in self._working()}
        due = time.monotonic() + self._time_limit
        for key, request in zip(keys, requests, strict=True):
            actor = min(shares, key=lambda actor: len(actor.due))
            actor.due[key] = due
            shares[actor].append((key, request))
        for actor, share in shares.items():
            if share:
                actor.handle.submit.remote(*zip(*share, strict=True))

    def poll(self, timeout: float | None = None) -> list[tuple[int, Completion | Failure]]:
        busy = [actor for actor in self._actors if actor.due]
        if not busy:
            return []
        for actor in busy:
            actor.polling = actor.polling or actor.handle.poll.remote()
        patience = max(0.0, min(min(actor.due.values()) for actor in busy) - time.monotonic())
        patience = patience if timeout is None else min(patience, timeout)
        answered, _ = self._ray.wait([actor.polling for actor in busy], num_returns=1, timeout=patience)
        results: list[tuple[int, Completion | Failure]] = []
        for actor in busy:
            if actor.polling in answered:
                results += self._take(actor)
            elif min(actor.due.values()) <= time.monotonic():
                results += self._lose(actor, f"it did not finish a rollout in {self._time_limit:g} seconds")
        return results

    def update_weights(self, state: Iterable[tuple[str, torch.Tensor]]) -> None:
        refuse_update_in_flight(any(actor.due for actor in self._actors))
        self._weights = self._ray.put({name: tensor.detach().cpu() for name, tensor in state})
        syncs = {actor: actor.handle.update_weights.remote(self._weights) for actor in self._actors}
        for actor in self._working():
            try:
                if actor in syncs:  # else the actor was started after the sync, from these weights
                    self._ray.get(syncs[actor], timeout=PATIENCE)
            except (self._ray.exceptions.RayActorError, self._ray.exceptions.GetTimeoutError):
                self._replace(actor)

    def close(self) -> None:
        for actor in self._actors:
            self._ray.kill(actor.handle)

    def _working(self) -> list[_Remote]:
        """The actors that have started. Waits until there is at least one."""
        deadline = time.monotonic() + PATIENCE
        while True:
            coming = {actor.coming_up: actor for actor in self._actors if actor.capacity == 0}
            wanted, patience = len(coming), 0.0
            if len(coming) == len(self._actors):
                wanted, patience = 1, max(0.0, deadline - time.monotonic())
            ready, _ = self._ray.wait(list(coming), num_returns=wanted, timeout=patience) if coming else ([], [])
            for started in ready:
                try:
                    coming[started].capacity = self._ray.get(started)
                    self._failed_starts = 0
                except self._ray.exceptions.RayError as error:
                    self._failed_starts += 1
                    if self._failed_starts == FAILED_STARTS:
                        raise RuntimeError(
                            f"{FAILED_STARTS} rollout actors in a row failed to start; the last error: {error}"
                        ) from error
                    self._replace(coming[started])
            working = [actor for actor in self._actors if actor.capacity]
            if working:
                return working
            if time.monotonic() >= deadline:
                raise RuntimeError(
                    f"no rollout actor started within {PATIENCE:.0f} seconds; check the cluster has the resources it needs"
                )

    def _take(self, actor: _Remote) -> list[tuple[int, Completion | Failure]]:
        """The results of an actor's poll; if the actor was lost, failures for all its rollouts."""
        answer, actor.polling = actor.polling, None
        try:
            results: list[tuple[int, Completion | Failure]] = self._ray.get(answer)
        except self._ray.exceptions.RayError as error:
            return self._lose(actor, printable(str(error)))
        if not results:
            return self._lose(actor, "it has none of its rollouts")
        keys = [key for key, _ in results]
        if len(set(keys)) < len(keys) or not actor.due.keys() >= set(keys):
            return self._lose(actor, f"it answered for the rollouts {keys}, and had {sorted(actor.due)}")
        for key in keys:
            del actor.due[key]
        return results

    def _lose(self, actor: _Remote, why: str) -> list[tuple[int, Completion | Failure]]:
        """Replace an actor. Returns failures for all its rollouts."""
        self._replace(actor)
        return [(key, Failure(f"a rollout actor was lost: {why}")) for key in sorted(actor.due)]

    def _replace(self, actor: _Remote) -> None:
        self._ray.kill(actor.handle)
        self._actors[self._actors.index(actor)] = self._start()


class _Remote:
    """The engine's view of an actor.

    `due` maps the keys of its rollouts in flight to their deadlines, `polling` is the pending answer of its `poll`, and `capacity`
    is 0 until the actor has started.
    """

    def __init__(self, handle: Any) -> None:
        self.handle = handle
        self.coming_up = handle.capacity.remote()
        self.capacity = 0
        self.due: dict[int, float] = {}
        self.polling: Any = None


class _Actor:
    """An engine in a process on the cluster. Ray runs its calls one at a time, in the order in which they were made."""

    def __init__(self, make_engine: Callable[[], RolloutEngine], weights: Mapping[str, torch.Tensor] | None) -> None:
        self._engine = make_engine()
        if weights is not None:
            self.update_weights(weights)

    def capacity(self) -> int:
        return self._engine.capacity

    def submit(self, keys: Sequence[int], requests: Sequence[Request]) -> None:
        self._engine.submit(keys, requests)

    def poll(self) -> list[tuple[int, Completion | Failure]]:
        return self._engine.poll()

    def update_weights(self, weights: Mapping[str, torch.Tensor]) -> None:
        self._engine.update_weights(weights.items())
