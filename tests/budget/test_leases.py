"""Leases, reports, failures and expiry: every rollout counts exactly once, whatever arrives when."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest

from helpers.allocator_model import run_to_end
from v05 import budget
from v05.budget import RolloutAllocator

NAN = math.nan


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
    allocator.report([a, a], [1.0, 0.0])  # reported twice in one batch
    allocator.report([a], [0.0])  # reported again in another batch
    allocator.fail([a])  # failed after its report
    assert allocator.counts()["duplicate"] == 3
    allocator.fail([b])
    allocator.report([b], [0.0])
    assert allocator.counts()["late"] == 1
    retry = allocator.lease(1).lease_id
    allocator.report([b], [0.0])  # the failed lease is reported while its retry is leased
    assert allocator.counts()["late"] == 2
    allocator.report([-1, -(2**63), 2**63 - 1, b + 2, 1000], [0.0] * 5)
    assert allocator.counts()["unknown"] == 5
    allocator.report(retry, [0.25])
    closed = allocator.drain()
    assert closed.rewards.tolist() == [1.0, 0.25]
    allocator.report([a, b, retry[0]], [0.0] * 3)  # after the drain the leases are forgotten
    assert allocator.counts() == {
        "open_groups": 0,
        "closed_groups": 0,
        "queued": 0,
        "leased": 0,
        "reported": 2,
        "failed": 1,
        "expired": 0,
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


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Callable[[float], None]:
    """Sets the time, in seconds."""
    now = [0.0]
    monkeypatch.setattr(budget, "_microseconds", lambda: int(now[0] * 1e6))

    def set_time(seconds: float) -> None:
        now[0] = seconds

    set_time(1e6)
    return set_time


def test_old_leases_expire(clock: Callable[[float], None]) -> None:
    allocator = RolloutAllocator(initial=2, rule="uniform")
    allocator.open([5, 6, 7], [NAN] * 3)
    clock(100)
    first = allocator.lease(3)
    clock(103)
    second = allocator.lease(2)
    clock(105)
    assert allocator.expire(5.001) == 0
    allocator.report(first.lease_id[:1], [1.0])
    assert allocator.expire(5) == 2
    assert allocator.counts()["expired"] == 2
    assert allocator.counts()["failed"] == 0
    allocator.report(first.lease_id, [0.0] * 3)  # the first is a duplicate, the other two are too late
    assert (allocator.counts()["late"], allocator.counts()["duplicate"]) == (2, 1)
    again = allocator.lease(2)
    assert again.group.tolist() == [5, 6]
    assert again.index.tolist() == [1, 0]
    assert again.seed.tolist() == first.seed[1:].tolist()
    assert not set(again.lease_id.tolist()) & set(first.lease_id.tolist())
    assert allocator.expire(math.inf) == 0
    assert allocator.expire(2) == 2  # the two leases of `second`
    allocator.report(again.lease_id, [0.5, 0.5])
    retries = allocator.lease(3)
    assert retries.seed[:2].tolist() == second.seed.tolist()
    allocator.report(retries.lease_id, [0.25] * 3)
    assert allocator.drain().rewards.tolist() == [1.0, 0.5, 0.5, 0.25, 0.25, 0.25]
    assert allocator.expire(0) == 0


def test_a_rollout_that_keeps_expiring_is_given_up(clock: Callable[[float], None]) -> None:
    allocator = RolloutAllocator(rule="uniform", initial=2, max_attempts=3)
    allocator.open([1], [0.5])
    leases = allocator.lease(2).lease_id
    allocator.report(leases[:1], [1.0])
    allocator.fail(leases[1:])  # a failure counts as an attempt, as an expiry does
    for _ in range(2):
        assert len(allocator.lease(9)) == 1
        assert allocator.expire(0) == 1
    assert allocator.done
    assert allocator.counts()["invalid"] == 1
    np.testing.assert_array_equal(allocator.drain().rewards, [1.0, NAN])


def test_expiry_lets_the_test_go_on(clock: Callable[[float], None]) -> None:
    """Expired rollouts that are given up let the budget rule ask for more. The same call of expire leaves the new ones alone."""
    allocator = RolloutAllocator(initial=1, maximum=3, max_attempts=1)
    allocator.open([1, 2], [NAN, NAN])
    allocator.lease(2)
    assert allocator.expire(0) == 2
    assert allocator.counts()["queued"] == 2
    assert allocator.lease(9).index.tolist() == [1, 1]


@pytest.mark.parametrize("older_than", [-1e-9, -math.inf, NAN])
def test_bad_expiry(older_than: float) -> None:
    with pytest.raises(ValueError, match=f"older_than={older_than:g} is not a number of seconds >= 0"):
        RolloutAllocator().expire(older_than)


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
    following = allocator.lease(9)  # the one valid reward and no prior: the rule asks for more
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
    assert len(closed.rewards) == size  # with a prior the rule stops at `initial`; without one it asks up to `maximum`
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
        with pytest.raises(ValueError, match="repeat"):  # the group is closed, but not drained
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
    allocator.open([1, 2, 3], [NAN] * 3)  # the refused calls left no id behind
    assert allocator.lease(99).group.tolist() == [90] * 4 + [1] * 4 + [2] * 4 + [3] * 4


def test_bounds_forgive_float32_rounding() -> None:
    """Bounds that trainers sum up in float32, such as 1.1 and -0.1, lie slightly outside. They count as bounds, as in the op."""
    low, high = float(np.float32(-0.1)), float(np.float32(1.0) + np.float32(0.1))
    assert low < -0.1
    assert high > 1.1
    allocator = RolloutAllocator(rule="uniform", initial=2, maximum=2, reward_range=(-0.1, 1.1))
    allocator.open([1], [high])
    allocator.report(allocator.lease(2).lease_id, [low, high])
    drained = allocator.drain()
    assert drained.rewards.tolist() == [-0.1, 1.1]
    assert drained.priors.tolist() == [1.1]


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
