"""The allocator against the one-step look-ahead of `v05.reference`, its bookkeeping against a plain Python model."""

from __future__ import annotations

import math
import threading
from collections import Counter, deque
from collections.abc import Callable

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import settings
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from v05.budget import ClosedGroups, RolloutAllocator
from v05.reference import osla_take_more, shrinkage

NAN = math.nan
Verifier = Callable[[object, int], float]  # the reward of rollout (group, index)


def run_to_end(
    allocator: RolloutAllocator,
    verify: Verifier,
    rng: np.random.Generator | None = None,
    batch: int = 64,
) -> ClosedGroups:
    """Lease and report until done; with `rng`, rewards arrive in random order and random portions."""
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


def sequential_size(
    rewards: np.ndarray,
    prior: float,
    *,
    initial: int = 4,
    maximum: int = 16,
    chunk: int = 1,
    cost: float | None = None,
    reward_range: tuple[float, float] = (0.0, 1.0),
) -> int:
    """How many of `rewards` the rule takes, one group by itself."""
    lo, hi = reward_range
    asked = initial
    while asked < maximum:
        valid = rewards[:asked][~np.isnan(rewards[:asked])]
        mean = float(np.mean(valid)) if len(valid) else NAN
        bias = shrinkage(len(valid), (2 * mean - lo - hi) / (hi - lo), (2 * prior - lo - hi) / (hi - lo)).squared_bias
        if not osla_take_more(len(valid), bias, maximum, cost):
            break
        asked = min(asked + chunk, maximum)
    return asked


def bernoulli(groups: int, seed: int = 0, invalid: float = 0.0) -> tuple[np.ndarray, np.ndarray]:
    """Rewards (groups, 16) and priors (groups,), some of them NaN."""
    rng = np.random.default_rng(seed)
    rates = rng.beta(0.6, 0.6, groups)
    rewards = (rng.random((groups, 16)) < rates[:, None]).astype(np.float64)
    rewards[rng.random(rewards.shape) < invalid] = NAN
    priors = rng.choice([0.0, 0.1, 0.25, 0.5, 0.9, 1.0, NAN], groups)
    return rewards, priors


@pytest.mark.parametrize("invalid", [0.0, 0.2], ids=["all-valid", "some-invalid"])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"chunk": 3},
        {"chunk": 100},
        {"initial": 1},
        {"initial": 8, "maximum": 8},
        {"initial": 2, "maximum": 12, "cost": 0.02},
        {"cost": 0.0},
    ],
    ids=lambda options: ",".join(f"{name}={value}" for name, value in options.items()) or "default",
)
def test_osla_takes_what_the_reference_takes(options: dict[str, float], invalid: float) -> None:
    rewards, priors = bernoulli(400, invalid=invalid)
    allocator = RolloutAllocator(**options)
    allocator.open(np.arange(400), priors)
    closed = run_to_end(allocator, lambda group, index: rewards[group, index])
    expected = [sequential_size(row, prior, **options) for row, prior in zip(rewards, priors, strict=True)]
    assert np.diff(closed.offsets).tolist() == expected
    np.testing.assert_array_equal(closed.rewards, np.concatenate([row[:k] for row, k in zip(rewards, expected, strict=True)]))
    np.testing.assert_array_equal(closed.priors, priors)
    if options == {}:
        assert {4, 6, 7, 8, 16} <= set(expected)  # the draw exercises the rule


def test_reward_range_scales_the_test() -> None:
    rewards, priors = bernoulli(200)
    sizes = []
    for lo, hi in [(0.0, 1.0), (-1.0, 1.0), (-3.0, 5.0)]:
        allocator = RolloutAllocator(reward_range=(lo, hi))
        allocator.open(np.arange(200), lo + (hi - lo) * priors)
        closed = run_to_end(allocator, lambda group, index, lo=lo, hi=hi: lo + (hi - lo) * rewards[group, index])
        sizes.append(np.diff(closed.offsets).tolist())
    assert sizes[0] == sizes[1] == sizes[2]


@pytest.mark.parametrize("chunk", [1, 4])
def test_any_arrival_order_gives_the_same_allocation(chunk: int) -> None:
    rewards, priors = bernoulli(100, invalid=0.1)
    results = []
    for order in [None, *(np.random.default_rng(seed) for seed in range(4))]:
        allocator = RolloutAllocator(chunk=chunk)
        allocator.open(np.arange(100), priors)
        results.append(run_to_end(allocator, lambda group, index: rewards[group, index], order))
    for result in results[1:]:
        np.testing.assert_array_equal(result.group_ids, np.arange(100))
        np.testing.assert_array_equal(result.offsets, results[0].offsets)
        np.testing.assert_array_equal(result.rewards, results[0].rewards)


def test_uniform_stays_at_initial() -> None:
    rewards, priors = bernoulli(50)
    allocator = RolloutAllocator(rule="uniform", initial=6)
    allocator.open(np.arange(50), priors)
    closed = run_to_end(allocator, lambda group, index: rewards[group, index])
    assert np.diff(closed.offsets).tolist() == [6] * 50


def test_extra_rollouts_are_leased_before_new_groups() -> None:
    allocator = RolloutAllocator(initial=2, chunk=2)
    allocator.open([7, 8, 9], [NAN, NAN, NAN])
    first = allocator.lease(3)
    assert first.group.tolist() == [7, 7, 8]
    allocator.report(first.lease_id[:2], [0.0, 1.0])
    following = allocator.lease(4)
    assert following.group.tolist() == [7, 7, 8, 9]
    assert following.index.tolist() == [2, 3, 1, 0]


def test_exactly_once() -> None:
    allocator = RolloutAllocator(rule="uniform", initial=2)
    allocator.open([1], [0.5])
    a, b = allocator.lease(2).lease_id
    allocator.report([a, a], [1.0, 0.0])  # twice in one batch
    allocator.report([a], [0.0])  # twice in two
    allocator.fail([a])  # failed after its report
    assert allocator.counts()["duplicate"] == 3
    allocator.fail([b])
    allocator.report([b], [0.0])
    assert allocator.counts()["late"] == 1
    retry = allocator.lease(1).lease_id
    allocator.report([b], [0.0])  # the failed lease, while its retry is out
    assert allocator.counts()["late"] == 2
    allocator.report([-1, -(2**63), 2**63 - 1, b + 2, 1000], [0.0] * 5)
    assert allocator.counts()["unknown"] == 5
    allocator.report(retry, [0.25])
    closed = allocator.drain()
    assert closed.rewards.tolist() == [1.0, 0.25]
    allocator.report([a, b, retry[0]], [0.0] * 3)  # drained: forgotten
    assert allocator.counts() == {
        "open_groups": 0,
        "closed_groups": 0,
        "queued": 0,
        "leased": 0,
        "reported": 2,
        "failed": 1,
        "invalid": 0,
        "duplicate": 3,
        "late": 5,
        "unknown": 5,
    }


def test_a_rollout_that_was_never_leased_is_unknown() -> None:
    allocator = RolloutAllocator(max_attempts=2)
    allocator.open([1, 2], [NAN, NAN])
    everything = allocator.lease(8).lease_id
    other = RolloutAllocator(max_attempts=2)
    other.open([1, 2], [NAN, NAN])
    other.report(everything, np.zeros(8))
    assert other.counts()["unknown"] == 8
    assert other.counts()["reported"] == 0


def test_retry_keeps_group_index_and_seed() -> None:
    allocator = RolloutAllocator(initial=2)
    allocator.open([5, 6], [0.5, 0.5])
    first = allocator.lease(2)
    allocator.fail(first.lease_id[1:])
    retry = allocator.lease(1)
    assert (retry.group[0], retry.index[0], retry.seed[0]) == (5, 1, first.seed[1])
    assert retry.lease_id[0] not in first.lease_id


@pytest.mark.parametrize("max_attempts", [1, 2, 3])
def test_attempts_run_out(max_attempts: int) -> None:
    allocator = RolloutAllocator(initial=2, maximum=4, max_attempts=max_attempts)
    allocator.open([1], [NAN])
    leases = allocator.lease(2)
    allocator.report(leases.lease_id[:1], [1.0])
    broken = leases.lease_id[1:]
    for attempt in range(max_attempts):
        assert allocator.counts()["failed"] == attempt
        allocator.fail(broken)
        broken = broken if attempt == max_attempts - 1 else allocator.lease(1).lease_id
    assert allocator.counts()["invalid"] == 1
    allocator.report(broken, [1.0])
    assert allocator.counts()["late"] == 1
    following = allocator.lease(9)  # one valid reward without a prior: the test goes on
    assert following.index.tolist() == [2]
    allocator.report(following.lease_id, [0.0])
    allocator.report(allocator.lease(9).lease_id, [0.0])
    assert allocator.done
    np.testing.assert_array_equal(allocator.drain().rewards, [1.0, NAN, 0.0, 0.0])


@pytest.mark.parametrize(("prior", "size"), [(NAN, 16), (0.5, 4)], ids=["no-prior", "prior"])
def test_a_group_without_a_valid_rollout_closes(prior: float, size: int) -> None:
    allocator = RolloutAllocator()
    allocator.open([1], [prior])
    closed = run_to_end(allocator, lambda group, index: NAN)
    assert len(closed.rewards) == size  # the prior stands, or there is nothing to stand on
    assert np.isnan(closed.rewards).all()
    assert allocator.counts()["invalid"] == size


def test_seeds_depend_on_the_rollout_alone() -> None:
    def seeds(ids: list[int] | list[str], batch: int, seed: int) -> dict[tuple[object, int], int]:
        allocator = RolloutAllocator(seed=seed, rule="uniform")
        allocator.open(ids, np.full(len(ids), NAN))
        result = {}
        while len(leases := allocator.lease(batch)):
            assert leases.seed.dtype == np.int64
            assert (leases.seed >= 0).all()
            result |= {
                (group, index): seed
                for group, index, seed in zip(leases.group, leases.index.tolist(), leases.seed.tolist(), strict=True)
            }
        return result

    ids = list(range(-50, 50))
    one = seeds(ids, 7, seed=0)
    assert one == seeds(ids[::-1], 64, seed=0)
    assert len(set(one.values())) == 400
    assert not set(one.values()) & set(seeds(ids, 7, seed=1).values())
    names = [f"prompt-{i}" for i in ids]
    assert seeds(names, 5, seed=3) == seeds(names[::-1], 9, seed=3)


def test_seeds_do_not_change_between_versions() -> None:
    allocator = RolloutAllocator(rule="uniform", initial=1, seed=17)
    allocator.open([42], [NAN])
    assert allocator.lease(1).seed.tolist() == [splitmix(splitmix(splitmix(17) ^ 42) ^ 0) >> 1]
    allocator = RolloutAllocator(rule="uniform", initial=2, seed=-1)
    allocator.open(["é"], [NAN])
    key = 0xCBF29CE484222325
    for byte in "é".encode():
        key = (key ^ byte) * 0x100000001B3 % 2**64
    assert allocator.lease(2).seed[1] == splitmix(splitmix(splitmix(2**64 - 1) ^ key) ^ 1) >> 1


def splitmix(x: int) -> int:
    x = (x + 0x9E3779B97F4A7C15) % 2**64
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
    x = (x ^ (x >> 27)) * 0x94D049BB133111EB % 2**64
    return x ^ (x >> 31)


@pytest.mark.parametrize("as_array", [list, np.array, lambda ids: np.array(ids, dtype=object)], ids=["list", "U", "object"])
def test_string_ids(as_array: Callable[[list[str]], list[str] | np.ndarray]) -> None:
    names = ["a", "", "ü-β", "x" * 100]
    allocator = RolloutAllocator(rule="uniform", initial=1)
    allocator.open(as_array(names), [0.1, 0.2, 0.3, 0.4])
    leases = allocator.lease(9)
    assert leases.group.tolist() == names
    assert leases.group.dtype == object
    allocator.report(leases.lease_id[::-1], [0.0, 0.25, 0.5, 1.0])
    closed = allocator.drain()
    assert closed.group_ids.tolist() == names
    assert closed.rewards.tolist() == [1.0, 0.5, 0.25, 0.0]
    allocator.open(closed.group_ids, closed.priors)  # drained ids can be used again
    assert len(allocator.lease(9)) == 4


def test_ids_are_free_once_drained_in_any_order() -> None:
    allocator = RolloutAllocator(rule="uniform", initial=1)
    rng = np.random.default_rng(0)
    ids = rng.permutation(1000) * 1024
    allocator.open(ids, np.full(1000, NAN))
    leases = allocator.lease(1000)
    out = dict(zip(leases.group.tolist(), leases.lease_id.tolist(), strict=True))
    for group in rng.permutation(ids).tolist():
        with pytest.raises(ValueError, match="repeat"):
            allocator.open([group], [NAN])
        allocator.report([out[group]], [1.0])
        with pytest.raises(ValueError, match="repeat"):  # closed, not drained
            allocator.open([group], [NAN])
        assert allocator.drain().group_ids.tolist() == [group]
        if group % 3 == 0:
            allocator.open([group], [NAN])
    again = allocator.lease(1000).group
    assert sorted(again) == sorted(group for group in ids if group % 3 == 0)


def test_empty_calls() -> None:
    allocator = RolloutAllocator()
    assert allocator.done
    allocator.open([], [])
    allocator.report([], [])
    allocator.fail([])
    assert len(allocator.lease(5)) == 0
    closed = allocator.drain()
    assert len(closed) == 0
    assert closed.offsets.tolist() == [0]
    allocator.open(["strings still welcome"], [NAN])
    assert not allocator.done
    assert len(allocator.lease(0)) == 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rule": "best"}, "rule='best' is unknown; choose one of osla, uniform"),
        ({"initial": 0}, "initial=0 is not positive"),
        ({"initial": 8, "maximum": 4}, "maximum=4 is not between initial=8 and 65535"),
        ({"maximum": 65536}, "maximum=65536 is not between initial=4 and 65535"),
        ({"chunk": 0}, "chunk=0 is not positive"),
        ({"cost": -0.5}, "cost=-0.5 is not a finite number >= 0"),
        ({"cost": NAN}, "cost=nan is not"),
        ({"cost": math.inf}, "cost=inf is not"),
        ({"reward_range": (1.0, 1.0)}, r"reward_range=\(1, 1\) is not a finite range"),
        ({"reward_range": (0.0, NAN)}, "reward_range"),
        ({"reward_range": (0.0, math.inf)}, "reward_range"),
        ({"max_attempts": 0}, "max_attempts=0 is not between 1 and"),
    ],
    ids=str,
)
def test_bad_options(options: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        RolloutAllocator(**options)


@pytest.mark.parametrize(
    ("group_ids", "priors", "message"),
    [
        ([1, 2], [0.5], "group_ids has 2 rows and priors 1"),
        ([1, 2, 1, 3, 2], [0.5] * 5, r"group_ids repeat an id.* in rows 2, 4 \(the first is 1\)"),
        ([1, 90], [0.5] * 2, r"not drained yet, in row 1 \(the first is 90\)"),
        ([1, 2], [0.5, math.inf], r"priors outside reward_range=\(0, 1\) in row 1 \(the first is inf\)"),
        ([1, 2, 3], [-0.1, 0.5, 1.5], r"priors outside reward_range=\(0, 1\) in rows 0, 2 \(the first is -0.1\)"),
        (list(range(20)), [2.0] * 20, "rows 0, 1, 2, 3, 4, 5, 6, 7 and 12 more"),
        ([1.0, 2.0], [0.5] * 2, "group_ids has dtype float64"),
        (np.array([1, 2], dtype=np.uint64), [0.5] * 2, "group_ids has dtype uint64"),
        ([[1, 2]], [0.5] * 2, r"group_ids has shape \(1, 2\)"),
        ([1, 2], ["a", "b"], "priors has dtype <U1"),
        ([1, 2], [0.5, 1j], "priors has dtype complex128"),
        (["a", "b"], [0.5] * 2, "mix integers and strings"),
        (["a", 2], [0.5] * 2, "mix strings and other types"),
        ("ab", [0.5] * 2, "group_ids='ab' is one string"),
    ],
)
def test_bad_open_changes_nothing(group_ids: object, priors: object, message: str) -> None:
    allocator = RolloutAllocator()
    allocator.open([90], [0.5])
    before = allocator.counts()
    with pytest.raises(ValueError, match=message):
        allocator.open(group_ids, priors)
    assert allocator.counts() == before
    allocator.open([1, 2, 3], [NAN] * 3)  # none of the refused ids stuck
    assert allocator.lease(99).group.tolist() == [90] * 4 + [1] * 4 + [2] * 4 + [3] * 4


def test_bad_report_applies_nothing() -> None:
    allocator = RolloutAllocator()
    allocator.open([1], [0.5])
    leases = allocator.lease(4).lease_id
    with pytest.raises(ValueError, match=r"rewards outside reward_range=\(0, 1\) in row 2 \(the first is 1.00001\)"):
        allocator.report(leases, [0.0, 1.0, 1.00001, 0.0])
    with pytest.raises(ValueError, match=r"rewards .* in row 0 \(the first is -inf\)"):
        allocator.report(leases[:1], [-math.inf])
    with pytest.raises(ValueError, match="lease_ids has 4 rows and rewards 1"):
        allocator.report(leases, [1.0])
    with pytest.raises(ValueError, match="lease_ids has dtype float64"):
        allocator.report(leases.astype(np.float64), [1.0] * 4)
    with pytest.raises(ValueError, match="lease_ids has dtype float64"):
        allocator.fail([1.5])
    with pytest.raises(ValueError, match="n=-1 is negative"):
        allocator.lease(-1)
    assert allocator.counts()["leased"] == 4
    assert allocator.counts()["reported"] == 0


def test_threads() -> None:
    groups = 500
    rewards, priors = bernoulli(groups)
    allocator = RolloutAllocator()
    allocator.open(np.arange(groups), priors)
    seen: list[tuple[int, int, int]] = []
    errors: list[BaseException] = []

    def work(seed: int) -> None:
        rng = np.random.default_rng(seed)
        try:
            while not allocator.done:
                leases = allocator.lease(int(rng.integers(1, 40)))
                broken = rng.random(len(leases)) < 0.02
                kept = leases.lease_id[~broken]
                allocator.report(kept, rewards[leases.group, leases.index][~broken])
                allocator.report(kept[:1], np.ones(len(kept[:1])))
                allocator.fail(leases.lease_id[broken])
                seen.extend(zip(leases.lease_id.tolist(), leases.group.tolist(), leases.index.tolist(), strict=True))
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors
    closed = allocator.drain()
    counts = allocator.counts()
    assert len(seen) == len({lease_id for lease_id, _, _ in seen}) == counts["reported"] + counts["failed"]
    rewards_with_gaps = rewards.copy()
    attempts = Counter((group, index) for _, group, index in seen)
    for g, (start, stop) in enumerate(zip(closed.offsets[:-1], closed.offsets[1:], strict=True)):
        row = closed.rewards[start:stop]
        rewards_with_gaps[g, : len(row)][np.isnan(row)] = NAN  # a rollout that failed three times
        np.testing.assert_array_equal(row, rewards_with_gaps[g, : len(row)])
        assert all(1 <= attempts[g, index] <= 3 for index in range(len(row)))
        assert len(row) == sequential_size(rewards_with_gaps[g], priors[g])


class AllocatorMachine(RuleBasedStateMachine):
    """The allocator beside dictionaries and a list, over random sequences of calls."""

    @initialize(
        initial=st.integers(1, 4),
        room=st.integers(0, 5),
        chunk=st.integers(1, 3),
        max_attempts=st.integers(1, 3),
        cost=st.sampled_from([None, 0.0, 0.02]),
    )
    def start(self, initial: int, room: int, chunk: int, max_attempts: int, cost: float | None) -> None:
        self.options = {"initial": initial, "maximum": initial + room, "chunk": chunk, "cost": cost}
        self.max_attempts = max_attempts
        self.allocator = RolloutAllocator(**self.options, max_attempts=max_attempts)
        self.groups: dict[int, float] = {}  # id -> prior, in open order
        self.rewards: dict[int, list[float | None]] = {}  # None: not settled
        self.closed: set[int] = set()
        self.extra: deque[tuple[int, int]] = deque()
        self.fresh: deque[tuple[int, int]] = deque()
        self.out: dict[int, tuple[int, int]] = {}
        self.reported: dict[int, int] = {}  # lease -> group, until it is drained
        self.failed: set[int] = set()
        self.failures: Counter[tuple[int, int]] = Counter()
        self.seeds: dict[tuple[int, int], int] = {}
        self.count: Counter[str] = Counter()

    def settle(self, group: int, index: int, reward: float) -> None:
        rewards = self.rewards[group]
        rewards[index] = reward
        self.count["invalid"] += math.isnan(reward)
        if None in rewards:
            return
        padded = np.array(rewards + [0.0] * self.options["maximum"], dtype=np.float64)
        options = self.options | {"initial": len(rewards)}
        size = sequential_size(padded, self.groups[group], **options)
        size = min(size, len(rewards) + self.options["chunk"])  # one test at a time
        if size == len(rewards):
            self.closed.add(group)
        self.extra += [(group, new) for new in range(len(rewards), size)]
        rewards += [None] * (size - len(rewards))

    @rule(ids=st.lists(st.integers(-3, 20), max_size=4), prior=st.sampled_from([NAN, 0.0, 0.3, 1.0]))
    def open(self, ids: list[int], prior: float) -> None:
        if len(set(ids)) < len(ids) or set(ids) & set(self.groups):
            with pytest.raises(ValueError, match="group_ids"):
                self.allocator.open(ids, [prior] * len(ids))
            return
        self.allocator.open(ids, [prior] * len(ids))
        for group in ids:
            self.groups[group] = prior
            self.rewards[group] = [None] * self.options["initial"]
            self.fresh += [(group, index) for index in range(self.options["initial"])]

    @rule(n=st.integers(0, 12))
    def lease(self, n: int) -> None:
        leases = self.allocator.lease(n)
        expected = [(self.extra or self.fresh).popleft() for _ in range(min(n, len(self.extra) + len(self.fresh)))]
        assert list(zip(leases.group.tolist(), leases.index.tolist(), strict=True)) == expected
        for lease_id, rollout, seed in zip(leases.lease_id.tolist(), expected, leases.seed.tolist(), strict=True):
            assert lease_id not in self.out
            assert lease_id not in self.reported
            assert lease_id not in self.failed
            assert self.seeds.setdefault(rollout, seed) == seed
            self.out[lease_id] = rollout

    @precondition(lambda self: self.out)
    @rule(data=st.data())
    def report(self, data: st.DataObject) -> None:
        lease_ids = data.draw(st.lists(st.sampled_from(sorted(self.out)), max_size=12))
        rewards = [data.draw(st.sampled_from([0.0, 1.0, 1.0, 0.5, NAN])) for _ in lease_ids]
        self.allocator.report(lease_ids, rewards)
        for lease_id, reward in zip(lease_ids, rewards, strict=True):
            if lease_id in self.reported:
                self.count["duplicate"] += 1
                continue
            group, index = self.out.pop(lease_id)
            self.reported[lease_id] = group
            self.count["reported"] += 1
            self.settle(group, index, reward)

    @precondition(lambda self: self.out)
    @rule(data=st.data())
    def fail(self, data: st.DataObject) -> None:
        lease_id = data.draw(st.sampled_from(sorted(self.out)))
        self.allocator.fail([lease_id])
        group, index = self.out.pop(lease_id)
        self.failed.add(lease_id)
        self.failures[group, index] += 1
        self.count["failed"] += 1
        if self.failures[group, index] == self.max_attempts:
            self.settle(group, index, NAN)
        else:
            self.extra.append((group, index))

    @rule(lease_id=st.integers(-2, 2**40))
    def report_any_id(self, lease_id: int) -> None:
        lease_ids = [*self.failed, *self.reported, lease_id + 2**40]
        self.allocator.report(lease_ids, np.zeros(len(lease_ids)))
        self.allocator.fail(lease_ids)
        self.count["late"] += 2 * len(self.failed)
        self.count["duplicate"] += 2 * len(self.reported)
        self.count["unknown"] += 2

    @rule()
    def drain(self) -> None:
        closed = self.allocator.drain()
        expected = [group for group in self.groups if group in self.closed]
        assert closed.group_ids.tolist() == expected
        for g, group in enumerate(expected):
            rewards = closed.rewards[closed.offsets[g] : closed.offsets[g + 1]]
            np.testing.assert_array_equal(rewards, self.rewards.pop(group))
            np.testing.assert_array_equal(closed.priors[g], self.groups.pop(group))
            for index in range(len(rewards)):
                self.failures.pop((group, index), None)
        self.failed |= {lease_id for lease_id, group in self.reported.items() if group in self.closed}
        self.reported = {lease_id: group for lease_id, group in self.reported.items() if group not in self.closed}
        self.closed.clear()

    @invariant()
    def counts_agree(self) -> None:
        assert self.allocator.done == (len(self.groups) == len(self.closed))
        assert self.allocator.counts() == {
            "open_groups": len(self.groups) - len(self.closed),
            "closed_groups": len(self.closed),
            "queued": len(self.extra) + len(self.fresh),
            "leased": len(self.out),
            **{name: self.count[name] for name in ("reported", "failed", "invalid", "duplicate", "late", "unknown")},
        }


class TestAllocatorMachine(AllocatorMachine.TestCase):
    settings = settings(max_examples=150, stateful_step_count=40, deadline=None)
