"""Random sequences of calls on the allocator and on its plain Python model give the same leases, counts and groups."""

from __future__ import annotations

import math
from collections.abc import Sequence
from unittest import mock

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import settings
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from helpers.allocator_model import PlainAllocator
from v05 import budget
from v05.budget import Chunk, RolloutAllocator
from v05.methods import Calibration

NAN = math.nan
# Sums of these rewards are exact, and no two samples are equally far from a prior: gains are exactly equal or clearly different.
REWARDS = [0.0, 1.0, 1.0, 0.5, NAN]
PRIORS = [NAN, 0.052, 0.137, 0.391, 0.872]
CALIBRATION = Calibration(alpha=0.31, beta=0.83, kappa=6.0, eps=0.15)
ENERGIES = Calibration(alpha=0.31, beta=0.83, kappa=6.0, eps=0.15, delta0=-0.37, delta1=1.43)


class Pair:
    """Makes every call on both the allocator and the model. Lease ids are the allocator's."""

    def __init__(self, names: bool, options: dict[str, object]) -> None:
        self.name = str if names else int
        self.real = RolloutAllocator(**options)
        self.model = PlainAllocator(**options)
        self.now = 0  # microseconds
        self.lease_ids: dict[int, int] = {}  # allocator's to model's id; the latest where a restart issues an id again
        self.seeds: dict[tuple[int | str, int], int] = {}

    def open(self, ids: Sequence[int], prior: float) -> None:
        names = [self.name(i) for i in ids]
        priors = [prior] * len(names)
        try:
            self.model.open(names, priors)
        except ValueError as error:
            with pytest.raises(ValueError, match=f"^{str(error).split()[0]}"):
                self.real.open(names, priors)
        else:
            self.real.open(names, priors)

    def lease(self, n: int) -> None:
        with mock.patch.object(budget, "_microseconds", return_value=self.now):
            leases = self.real.lease(n)
        expected = self.model.lease(n, self.now)
        assert list(zip(leases.group.tolist(), leases.index.tolist(), strict=True)) == [lease[1:] for lease in expected]
        for lease_id, (model_id, *rollout), seed in zip(leases.lease_id.tolist(), expected, leases.seed.tolist(), strict=True):
            known = self.lease_ids.get(lease_id)  # an id is issued again only if a restart lost its lease
            assert known not in self.model.out
            assert known not in self.model.past
            assert self.seeds.setdefault(tuple(rollout), seed) == seed
            self.lease_ids[lease_id] = model_id

    def out(self) -> list[int]:
        return [lease_id for lease_id, model_id in self.lease_ids.items() if model_id in self.model.out]

    def report(self, lease_ids: Sequence[int], rewards: Sequence[float]) -> None:
        self.real.report(lease_ids, rewards)
        self.model.report([self.lease_ids.get(lease_id, -1) for lease_id in lease_ids], rewards)

    def fail(self, lease_ids: Sequence[int]) -> None:
        self.real.fail(lease_ids)
        self.model.fail([self.lease_ids.get(lease_id, -1) for lease_id in lease_ids])

    def expire(self, older_than: int) -> None:
        """Let leases expire that are older than this, in microseconds."""
        with mock.patch.object(budget, "_microseconds", return_value=self.now):
            assert self.real.expire(older_than / 1e6) == self.model.expire(older_than, self.now)

    def drain(self) -> None:
        closed = self.real.drain()
        expected = self.model.drain()
        assert closed.group_ids.tolist() == [name for name, _, _ in expected]
        np.testing.assert_array_equal(closed.priors, [prior for _, prior, _ in expected])
        for g, (_, _, rewards) in enumerate(expected):
            np.testing.assert_array_equal(closed.rewards[closed.offsets[g] : closed.offsets[g + 1]], rewards)

    def restart(self) -> None:
        blob = self.real.snapshot()
        self.real = RolloutAllocator.restore(blob)
        self.model.restart()
        assert self.real.snapshot() == blob

    def compare(self) -> None:
        assert self.real.counts() == self.model.counts()
        assert self.real.done == self.model.done


RULES: dict[str, dict[str, object]] = {
    "osla": {"rule": "osla"},
    "osla, free": {"rule": "osla", "cost": 0.0},
    "osla, dear": {"rule": "osla", "cost": 0.02},
    "uniform": {"rule": "uniform"},
    "calibrated": {"rule": "calibrated", "calibration": CALIBRATION, "cost": 0.0123},
    "variance": {"rule": "variance", "calibration": ENERGIES, "cost": 0.0123},
    "total": {"rule": "total", "total": 60},
    "total, calibrated": {"rule": "total", "total": 60, "calibration": CALIBRATION},
    "total, variance": {"rule": "total", "total": 60, "calibration": ENERGIES},
}


class AllocatorMachine(RuleBasedStateMachine):
    """Finds failing sequences of calls, and shortens them."""

    @initialize(
        names=st.booleans(),
        budget_rule=st.sampled_from(sorted(RULES)),
        initial=st.integers(1, 4),
        room=st.integers(0, 5),
        chunk=st.integers(1, 3) | st.just("look"),
        max_attempts=st.integers(1, 3),
    )
    def start(self, names: bool, budget_rule: str, initial: int, room: int, chunk: Chunk, max_attempts: int) -> None:
        chunk = 1 if chunk == "look" and budget_rule.startswith("total") else chunk
        options = {"initial": initial, "maximum": initial + room, "chunk": chunk, "max_attempts": max_attempts}
        self.pair = Pair(names, options | RULES[budget_rule])

    @rule(ids=st.lists(st.integers(-3, 20), max_size=4), prior=st.sampled_from(PRIORS))
    def open(self, ids: list[int], prior: float) -> None:
        self.pair.open(ids, prior)

    @rule(n=st.integers(0, 12))
    def lease(self, n: int) -> None:
        self.pair.lease(n)

    @rule(data=st.data())
    def report(self, data: st.DataObject) -> None:
        lease_ids = data.draw(st.lists(st.sampled_from([*self.pair.out(), -1]), max_size=12))
        self.pair.report(lease_ids, [data.draw(st.sampled_from(REWARDS)) for _ in lease_ids])

    @rule(data=st.data())
    def fail(self, data: st.DataObject) -> None:
        self.pair.fail(data.draw(st.lists(st.sampled_from([*self.pair.out(), -1]), max_size=3)))

    @rule(stray=st.integers(-(2**63), -1) | st.integers(2**61, 2**63 - 1), reward=st.sampled_from(REWARDS))
    def report_all_ids_that_are_not_out(self, stray: int, reward: float) -> None:
        strays = [*(self.pair.lease_ids.keys() - set(self.pair.out())), stray]
        self.pair.report(strays, [reward] * len(strays))
        self.pair.fail(strays)

    @rule(wait=st.integers(0, 5), older_than=st.integers(0, 10))
    def expire(self, wait: int, older_than: int) -> None:
        self.pair.now += wait
        self.pair.expire(older_than)

    @rule()
    def drain(self) -> None:
        self.pair.drain()

    @rule()
    def restart(self) -> None:
        self.pair.restart()

    @invariant()
    def agree(self) -> None:
        self.pair.compare()


class TestAllocatorMachine(AllocatorMachine.TestCase):
    settings = settings(max_examples=150, stateful_step_count=40, deadline=None)


LONG, SHORT = 15_000, 2_500  # operations


@pytest.mark.parametrize(
    ("budget_rule", "chunk", "length"),
    [
        ("osla", 2, LONG),
        *((name, 2, SHORT) for name in RULES if name != "osla"),
        *((name, "look", SHORT) for name in ("osla", "calibrated", "variance")),
    ],
)
def test_a_long_run(budget_rule: str, chunk: Chunk, length: int) -> None:
    """Operations on one allocator, restored from snapshots on the way. What goes wrong only after thousands of leases does not
    depend on the rule, which only decides: one rule is run at length, the others long enough to decide on hundreds of groups.
    """
    rng = np.random.default_rng(0)
    pair = Pair(names=False, options=RULES[budget_rule] | {"chunk": chunk})
    recent: list[int] = []
    operations = (
        ["open"] * 5
        + ["lease"] * 15
        + ["report"] * 17
        + ["fail"] * 3
        + ["expire"] * 2
        + ["drain"] * 4
        + ["restart"]
        + ["stray"] * 4
    )
    for operation in rng.choice(operations, size=length):
        out = pair.out()
        some = rng.choice(out, size=min(len(out), int(rng.integers(0, 20))), replace=False).tolist() if out else []
        pair.now += int(rng.integers(0, 3))
        if operation == "open" and len(pair.model.groups) < 60:
            pair.open(rng.integers(0, 100, size=rng.integers(0, 6)).tolist(), float(rng.choice(PRIORS)))
        elif operation == "lease":
            pair.lease(int(rng.integers(0, 20)))
            recent = list(pair.lease_ids)[-200:]
            pair.lease_ids = {lease_id: pair.lease_ids[lease_id] for lease_id in {*out, *pair.out(), *recent}}
        elif operation == "report":
            pair.report(some, rng.choice(REWARDS, size=len(some)).tolist())
        elif operation == "fail":
            pair.fail(some[:3])
        elif operation == "expire":
            pair.expire(int(rng.integers(0, 60)))
        elif operation == "drain":
            pair.drain()
        elif operation == "restart":
            pair.restart()
        elif recent:
            strays = rng.choice(recent, size=5).tolist()  # some are leased, some are not, some repeat
            pair.report(strays, rng.choice(REWARDS, size=5).tolist())
        pair.compare()
    counts = pair.model.counts()
    assert min(counts[name] for name in ("reported", "failed", "expired", "invalid", "duplicate", "late")) >= length // 180
