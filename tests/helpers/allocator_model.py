"""The allocator's logic in plain Python. Tests compare `v05.budget` with it, and bench/allocator.py times `v05.budget` against it.

It uses dictionaries and deques instead of a window of bits, and formulas from `v05.reference`. Rewards lie in [0, 1].
"""

from __future__ import annotations

import heapq
import math
from collections import Counter, deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from v05 import reference
from v05.budget import Chunk, ClosedGroups, RolloutAllocator
from v05.methods import Calibration

NAN = math.nan


def cost_of(rule: str, maximum: int, calibration: Calibration | None) -> float:
    """The default cost of a rule: the gain that one more rollout must exceed."""
    if rule == "variance":
        assert calibration is not None
        return reference.fresh_prompt_gain(calibration)
    return 1 / maximum**2


def gain(rewards: Sequence[float], prior: float, calibration: Calibration | None, rule: str, further: int = 0) -> float:
    """The expected worth to a group of one more rollout, after `further` ones that leave its estimates unchanged. Invalid rewards
    are NaN.
    """
    valid = [reward for reward in rewards if not math.isnan(reward)]
    if calibration is not None:
        knows_energies = (calibration.delta0, calibration.delta1) != (0.0, 0.0)
        of_gradient = rule == "variance" or (rule == "total" and knows_energies)
        worth = reference.variance_gain if of_gradient else reference.calibrated_gain
        return worth(len(valid), math.fsum(valid), prior, calibration, further)
    mean = math.fsum(valid) / len(valid) if valid else NAN
    squared_bias = reference.shrinkage(len(valid), 2 * mean - 1, 2 * prior - 1).squared_bias
    return reference.osla_gain(len(valid) + further, squared_bias)


def wanted(
    rewards: Sequence[float],
    prior: float,
    *,
    rule: str,
    calibration: Calibration | None,
    cost: float,
    chunk: Chunk,
    room: int,
) -> int:
    """How many of `room` more rollouts a sequential rule adds at once; 0 if the group has enough."""
    enough = (n for n in range(room) if gain(rewards, prior, calibration, rule, n) <= cost)
    more = next(enough, room)
    return more if chunk == "look" else min(chunk, room) if more else 0


@dataclass
class Group:
    serial: int
    prior: float
    rewards: list[float | None]  # None: not reported yet
    failures: list[int]
    unsettled: int
    closed: bool = False
    drained: bool = False


class PlainAllocator:
    """The methods of `RolloutAllocator` over lists. Lease ids count up. `restart` stands for a snapshot and its restoration."""

    def __init__(
        self,
        *,
        rule: str = "osla",
        initial: int = 4,
        maximum: int = 16,
        cost: float | None = None,
        total: int | None = None,
        chunk: Chunk = 1,
        calibration: Calibration | None = None,
        max_attempts: int = 3,
    ) -> None:
        self.rule, self.initial, self.maximum, self.total, self.chunk = rule, initial, maximum, total, chunk
        self.cost = cost_of(rule, maximum, calibration) if cost is None else cost
        self.calibration = calibration
        self.max_attempts = max_attempts
        self.groups: dict[int | str, Group] = {}  # in open order, until drained
        self.by_serial: dict[int, int | str] = {}
        self.fresh: deque[tuple[int | str, int]] = deque()
        self.extra: deque[tuple[int | str, int]] = deque()
        self.candidates: list[tuple[float, int]] = []  # heap of (-gain, serial)
        self.spent = 0
        self.opened = 0
        self.next_lease = 0
        self.out: dict[int, tuple[int | str, int, float]] = {}
        self.past: dict[int, Group | None] = {}  # the group of each settled lease; None: failed or expired
        self.count: Counter[str] = Counter()

    def open(self, group_ids: Sequence[int | str], priors: Sequence[float]) -> None:
        if len(set(group_ids)) < len(group_ids) or not self.groups.keys().isdisjoint(group_ids):
            raise ValueError("group_ids repeat")
        spent = self.spent if self.count["open_groups"] else 0
        if self.total is not None and spent + len(group_ids) * self.initial > self.total:
            raise ValueError("group_ids need more than is left of total")
        for group, prior in zip(group_ids, priors, strict=True):
            self.groups[group] = Group(self.opened, prior, [None] * self.initial, [0] * self.initial, self.initial)
            self.by_serial[self.opened] = group
            self.opened += 1
            self.fresh += [(group, index) for index in range(self.initial)]
        self.count["open_groups"] += len(group_ids)
        if group_ids:
            self.spent = spent + len(group_ids) * self.initial
            self.close_candidates_if_spent()

    def lease(self, n: int, now: float = 0.0) -> list[tuple[int, int | str, int]]:
        """(lease id, group, index) of at most n rollouts."""
        leases = []
        while len(leases) < n:
            if not self.extra and not self.fresh and self.candidates:
                group = self.by_serial[heapq.heappop(self.candidates)[1]]
                more = min(self.chunk, self.maximum - len(self.groups[group].rewards), self.total - self.spent)
                self.spent += more
                self.ask_more(group, more)
                self.close_candidates_if_spent()
            queue = self.extra or self.fresh
            if not queue:
                break
            group, index = queue.popleft()
            self.out[self.next_lease] = (group, index, now)
            leases.append((self.next_lease, group, index))
            self.next_lease += 1
        return leases

    def report(self, lease_ids: Sequence[int], rewards: Sequence[float]) -> None:
        for lease_id, reward in zip(lease_ids, rewards, strict=True):
            if lease_id not in self.out:
                self.count_stray(lease_id)
                continue
            group, index, _ = self.out.pop(lease_id)
            self.past[lease_id] = self.groups[group]
            self.count["reported"] += 1
            self.settle(group, index, reward)

    def fail(self, lease_ids: Sequence[int], counter: str = "failed") -> None:
        for lease_id in lease_ids:
            if lease_id not in self.out:
                self.count_stray(lease_id)
                continue
            group, index, _ = self.out.pop(lease_id)
            self.past[lease_id] = None
            self.count[counter] += 1
            failures = self.groups[group].failures
            failures[index] += 1
            if failures[index] == self.max_attempts:
                self.settle(group, index, NAN)
            else:
                self.extra.append((group, index))

    def expire(self, older_than: float, now: float) -> int:
        expired = self.in_open_order([lease_id for lease_id, (_, _, since) in self.out.items() if now - since >= older_than])
        self.fail(expired, "expired")
        return len(expired)

    @property
    def done(self) -> bool:
        return self.count["open_groups"] == 0

    def counts(self) -> dict[str, int]:
        closed = sum(group.closed for group in self.groups.values())
        now = {"closed_groups": closed, "queued": len(self.extra) + len(self.fresh), "leased": len(self.out)}
        since = ("open_groups", "reported", "failed", "expired", "invalid", "duplicate", "late", "unknown")
        return now | {name: self.count[name] for name in since}

    def drain(self) -> list[tuple[int | str, float, list[float | None]]]:
        """(group, prior, rewards) of the closed groups."""
        drained = [(name, group.prior, group.rewards) for name, group in self.groups.items() if group.closed]
        for name, _, _ in drained:
            group = self.groups.pop(name)
            group.drained = True
            del self.by_serial[group.serial]
        return drained

    def restart(self) -> None:
        lost = self.in_open_order(list(self.out))
        self.extra.extendleft(reversed([self.out[lease_id][:2] for lease_id in lost]))
        self.out.clear()

    def in_open_order(self, lease_ids: list[int]) -> list[int]:
        return sorted(lease_ids, key=lambda lease_id: (self.groups[self.out[lease_id][0]].serial, self.out[lease_id][1]))

    def count_stray(self, lease_id: int) -> None:
        if lease_id not in self.past:
            self.count["unknown"] += 1
            return
        reported_to = self.past[lease_id]
        self.count["late" if reported_to is None or reported_to.drained else "duplicate"] += 1

    def settle(self, name: int | str, index: int, reward: float) -> None:
        group = self.groups[name]
        group.rewards[index] = reward
        group.unsettled -= 1
        self.count["invalid"] += math.isnan(reward)
        if group.unsettled:
            return
        room = self.maximum - len(group.rewards)
        if room == 0 or self.rule == "uniform" or (self.rule == "total" and self.spent == self.total):
            self.close(group)
        elif self.rule == "total":
            # Rounding makes gains tie that are equal in exact arithmetic.
            heapq.heappush(
                self.candidates, (-round(gain(group.rewards, group.prior, self.calibration, self.rule), 12), group.serial)
            )
        elif more := wanted(
            group.rewards,
            group.prior,
            rule=self.rule,
            calibration=self.calibration,
            cost=self.cost,
            chunk=self.chunk,
            room=room,
        ):
            self.ask_more(name, more)
        else:
            self.close(group)

    def ask_more(self, name: int | str, more: int) -> None:
        group = self.groups[name]
        self.extra += [(name, len(group.rewards) + i) for i in range(more)]
        group.rewards += [None] * more
        group.failures += [0] * more
        group.unsettled = more

    def close(self, group: Group) -> None:
        group.closed = True
        self.count["open_groups"] -= 1

    def close_candidates_if_spent(self) -> None:
        if self.spent == self.total:
            for _, serial in self.candidates:
                self.close(self.groups[self.by_serial[serial]])
            self.candidates.clear()


Verifier = Callable[[object, int], float]  # the reward of rollout (group, index)


def run_to_end(
    allocator: RolloutAllocator,
    verify: Verifier,
    rng: np.random.Generator | None = None,
    batch: int = 64,
) -> ClosedGroups:
    """Lease and report until the allocator is done. With `rng`, rewards arrive in random order and in random portions."""
    pending: list[tuple[int, float]] = []
    while not allocator.done:
        leases = allocator.lease(batch if rng is None else int(rng.integers(1, batch)))
        pending += [
            (lease_id, verify(group, index))
            for lease_id, group, index in zip(leases.lease_id, leases.group, leases.index, strict=True)
        ]
        if rng is not None:
            rng.shuffle(pending)
        portion = len(pending) if rng is None else int(rng.integers(0, len(pending) + 1))
        arrived, pending = pending[:portion], pending[portion:]
        allocator.report([lease_id for lease_id, _ in arrived], [reward for _, reward in arrived])
    return allocator.drain()


def bernoulli(groups: int, seed: int = 0, invalid: float = 0.0) -> tuple[np.ndarray, np.ndarray]:
    """Rewards (groups, 16) and priors (groups,), some of them NaN."""
    rng = np.random.default_rng(seed)
    rates = rng.beta(0.6, 0.6, groups)
    rewards = (rng.random((groups, 16)) < rates[:, None]).astype(np.float64)
    rewards[rng.random(rewards.shape) < invalid] = NAN
    priors = rng.choice([0.0, 0.1, 0.25, 0.5, 0.9, 1.0, NAN], groups)
    return rewards, priors
