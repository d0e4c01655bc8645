"""How many rollouts a group gets: the rules against `v05.reference`."""

from __future__ import annotations

import math

import numpy as np
import pytest

from helpers.allocator_model import bernoulli, cost_of, gain, run_to_end, wanted
from v05.budget import Chunk, RolloutAllocator
from v05.methods import Calibration

NAN = math.nan
CALIBRATION = Calibration(alpha=0.3, beta=0.8, kappa=6.0, eps=0.15)
ENERGIES = Calibration(alpha=0.3, beta=0.8, kappa=6.0, eps=0.15, delta0=-0.3, delta1=1.4)


def sequential_size(
    rewards: np.ndarray,
    prior: float,
    *,
    initial: int = 4,
    maximum: int = 16,
    chunk: Chunk = 1,
    cost: float | None = None,
    rule: str = "osla",
    calibration: Calibration | None = None,
) -> int:
    """How many of `rewards` the rule takes for a group on its own."""
    cost = cost_of(rule, maximum, calibration) if cost is None else cost
    settings = {"rule": rule, "calibration": calibration, "cost": cost, "chunk": chunk}
    asked = initial
    while more := wanted(rewards[:asked], prior, room=maximum - asked, **settings):
        asked += more
    return asked


@pytest.mark.parametrize("invalid", [0.0, 0.2], ids=["all-valid", "some-invalid"])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"chunk": 3},
        {"chunk": 100},
        {"chunk": "look", "cost": 0.004},  # at the default cost, 1 / maximum**2, the gains of a mean of 1/2 would tie with the cost
        {"chunk": "look", "initial": 1, "maximum": 9, "cost": 0.02},
        {"initial": 1},
        {"initial": 8, "maximum": 8},
        {"initial": 2, "maximum": 12, "cost": 0.02},
        {"cost": 0.0},
    ],
    ids=lambda options: ",".join(f"{name}={value}" for name, value in options.items()) or "default",
)
@pytest.mark.parametrize(
    ("rule", "calibration"), [("osla", None), ("calibrated", CALIBRATION), ("variance", ENERGIES), ("variance", CALIBRATION)]
)
def test_a_group_takes_what_the_reference_takes(
    options: dict[str, float], invalid: float, rule: str, calibration: Calibration | None
) -> None:
    rewards, priors = bernoulli(400, invalid=invalid)
    if rule == "variance" and options.get("initial") != 1:  # at the default cost the rule asks for nothing after the first rollout
        options = {"cost": 0.0123} | options
    allocator = RolloutAllocator(rule=rule, calibration=calibration, **options)
    allocator.open(np.arange(400), priors)
    closed = run_to_end(allocator, lambda group, index: rewards[group, index])
    options = options | {"calibration": calibration, "rule": rule}
    expected = [sequential_size(row, prior, **options) for row, prior in zip(rewards, priors, strict=True)]
    assert np.diff(closed.offsets).tolist() == expected
    np.testing.assert_array_equal(closed.rewards, np.concatenate([row[:k] for row, k in zip(rewards, expected, strict=True)]))
    np.testing.assert_array_equal(closed.priors, priors)
    if options.keys() <= {"calibration", "rule"}:  # the rewards make the rule stop at different sizes
        assert {4, 7, 8, 16} <= set(expected)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"rule": "calibrated", "calibration": CALIBRATION},
        {"rule": "variance", "calibration": ENERGIES, "cost": 0.01},
        {"rule": "total", "total": 1000, "calibration": CALIBRATION},
        {"rule": "total", "total": 1000, "calibration": ENERGIES},
    ],
    ids=["osla", "calibrated", "variance", "total", "total-of-variance"],
)
def test_reward_range_scales_the_test(options: dict[str, object]) -> None:
    rewards, priors = bernoulli(200)
    sizes = []
    for lo, hi in [(0.0, 1.0), (-1.0, 1.0), (-3.0, 5.0)]:
        allocator = RolloutAllocator(reward_range=(lo, hi), **options)
        allocator.open(np.arange(200), lo + (hi - lo) * priors)
        closed = run_to_end(allocator, lambda group, index, lo=lo, hi=hi: lo + (hi - lo) * rewards[group, index])
        sizes.append(np.diff(closed.offsets).tolist())
    assert sizes[0] == sizes[1] == sizes[2]


@pytest.mark.parametrize(
    ("rule", "options"),
    [
        ("osla", {}),
        ("osla", {"reward_range": (-3.0, 5.0), "cost": 0.001}),
        ("calibrated", {"calibration": CALIBRATION, "cost": 0.007}),
        ("variance", {"calibration": ENERGIES, "cost": 0.01}),
    ],
)
def test_it_would_ask_for_what_it_then_asks_for(rule: str, options: dict[str, object]) -> None:
    """Checked for all sizes, numbers of successes and priors. Looking ahead asks for more exactly where one by one does, but for
    more at once.
    """
    low, high = options.get("reward_range", (0.0, 1.0))
    states = [(k, x, v) for k in range(1, 13) for x in range(k + 1) for v in (NAN, 0.0, 0.2, 0.6, 1.0)]
    counts, successes, shares = (np.array(column) for column in zip(*states, strict=True))
    priors = low + (high - low) * shares
    cost = options.get("cost", 1 / 144)
    asked = {}
    for chunk in (1, 5, "look"):
        allocator = RolloutAllocator(rule=rule, initial=1, maximum=12, chunk=chunk, **options)
        asked[chunk] = allocator.would_ask(counts, successes, priors)
        allocator.open(np.arange(len(states)), priors, counts)
        leases = allocator.lease(counts.sum())
        allocator.report(leases.lease_id, np.where(leases.index < successes[leases.group], high, low))
        np.testing.assert_array_equal(np.bincount(allocator.lease(12 * len(states)).group, minlength=len(states)), asked[chunk])
        settings = {"rule": rule, "calibration": options.get("calibration"), "cost": cost, "chunk": chunk}
        expected = [wanted([1.0] * x + [0.0] * (k - x), v, room=12 - k, **settings) for k, x, v in states]
        assert asked[chunk].tolist() == expected
    np.testing.assert_array_equal(asked["look"] > 0, asked[1] > 0)
    assert {2, 3, 4} <= set(asked["look"].tolist())
    assert len(RolloutAllocator().would_ask([], [], [])) == 0


@pytest.mark.parametrize(
    "options",
    [{}, {"rule": "calibrated", "calibration": CALIBRATION}, {"rule": "variance", "calibration": ENERGIES, "cost": 0.0051}],
    ids=["osla", "calibrated", "variance"],
)
def test_looking_ahead_takes_fewer_rounds_and_no_fewer_rollouts(options: dict[str, object]) -> None:
    """Looking ahead tests a group at some of the sizes at which one by one tests it, so it cannot stop sooner."""
    rewards, priors = bernoulli(400)
    sizes, rounds = {}, {}
    for chunk in (1, "look"):
        allocator = RolloutAllocator(chunk=chunk, **options)
        allocator.open(np.arange(400), priors)
        rounds[chunk] = 0
        while not allocator.done:
            leases = allocator.lease(400 * 16)
            allocator.report(leases.lease_id, rewards[leases.group, leases.index])
            rounds[chunk] += 1
        sizes[chunk] = np.diff(allocator.drain().offsets)
    assert (sizes["look"] >= sizes[1]).all()
    assert sizes["look"].mean() < 1.25 * sizes[1].mean()
    assert rounds["look"] < rounds[1]


@pytest.mark.parametrize(
    ("rule", "given", "message"),
    [
        ("osla", ([17], [0], [0.5]), "row 0 has counts 17 and successes 0; give 1 <= counts <= maximum=16 and"),
        ("osla", ([4, 0], [0, 0], [0.5, 0.5]), "row 1 has counts 0 and successes 0"),
        ("osla", ([4], [5], [0.5]), "row 0 has counts 4 and successes 5"),
        ("osla", ([4], [-1], [0.5]), "row 0 has counts 4 and successes -1"),
        ("osla", ([4], [1], [1.5]), r"priors outside reward_range=\(0, 1\) in row 0"),
        ("osla", ([4, 5], [1], [0.5, 0.5]), "counts has 2 rows, successes 1 and priors 2; give one of each"),
        ("uniform", ([4], [1], [0.5]), "rules 'uniform' and 'total' do not decide by a group's own rewards"),
    ],
)
def test_it_would_not_be_asked(rule: str, given: tuple[list[float], ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        RolloutAllocator(rule=rule).would_ask(*given)


@pytest.mark.parametrize("chunk", [1, 4, "look"])
@pytest.mark.parametrize("rule", ["osla", "calibrated", "variance", "uniform"])
def test_any_arrival_order_gives_the_same_allocation(rule: str, chunk: Chunk) -> None:
    rewards, priors = bernoulli(100, invalid=0.1)
    results = []
    for order in [None, *(np.random.default_rng(seed) for seed in range(4))]:
        options = {"calibrated": {"calibration": CALIBRATION}, "variance": {"calibration": ENERGIES, "cost": 0.01}}.get(rule, {})
        allocator = RolloutAllocator(rule=rule, chunk=chunk, **options)
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


def greedy(rewards: np.ndarray, priors: np.ndarray, total: int, calibration: Calibration | None) -> list[int]:
    """Sizes if the next rollout always goes to the group with the largest gain. Rounding makes gains tie that are equal in exact
    arithmetic.
    """
    sizes = [4] * len(priors)
    for _ in range(total - sum(sizes)):
        gains = [
            -1.0 if k == 16 else round(gain(row[:k], prior, calibration, "total"), 12)
            for row, prior, k in zip(rewards, priors, sizes, strict=True)
        ]
        sizes[int(np.argmax(gains))] += 1
    return sizes


@pytest.mark.parametrize("invalid", [0.0, 0.2], ids=["all-valid", "some-invalid"])
@pytest.mark.parametrize("calibration", [None, CALIBRATION, ENERGIES], ids=["osla", "calibrated", "variance"])
def test_total_goes_to_the_largest_gain(calibration: Calibration | None, invalid: float) -> None:
    rewards, priors = bernoulli(30, seed=1, invalid=invalid)
    allocator = RolloutAllocator(rule="total", total=200, calibration=calibration)
    allocator.open(np.arange(30), priors)
    first = allocator.lease(1000)
    allocator.report(first.lease_id, rewards[first.group, first.index])
    closed = run_to_end(allocator, lambda group, index: rewards[group, index], batch=1)
    assert np.diff(closed.offsets).tolist() == greedy(rewards, priors, 200, calibration)
    assert len(closed.rewards) == 200


@pytest.mark.parametrize("chunk", [1, 5])
@pytest.mark.parametrize("total", [400, 401, 777, 1600, 5000])
def test_total_is_spent_to_the_last_rollout(total: int, chunk: int) -> None:
    rewards, priors = bernoulli(100, invalid=0.1)
    allocator = RolloutAllocator(rule="total", total=total, chunk=chunk)
    for round_, order in enumerate([None, np.random.default_rng(0)]):  # the second round has a total of its own
        allocator.open(np.arange(100), priors)
        closed = run_to_end(allocator, lambda group, index: rewards[group, index], order, batch=7)
        assert len(closed.rewards) == min(total, 1600)
        assert allocator.counts()["reported"] == (round_ + 1) * min(total, 1600)
        assert np.diff(closed.offsets).min() >= 4


def test_total_does_not_count_retries() -> None:
    allocator = RolloutAllocator(rule="total", initial=1, total=3)
    allocator.open([1, 2], [NAN, 0.5])
    first = allocator.lease(9).lease_id
    allocator.fail(first)
    again = allocator.lease(9)
    allocator.report(again.lease_id, [0.0, 0.5])
    assert allocator.counts()["queued"] == 0
    assert not allocator.done
    third = allocator.lease(9)
    assert third.group.tolist() == [1]  # group 1 has no prior: gain 1/2; group 2 agrees with its prior: gain 0
    assert allocator.counts()["closed_groups"] == 1  # the total leaves nothing for group 2
    allocator.report(third.lease_id, [1.0])
    assert allocator.done


def test_total_refuses_groups_that_it_does_not_hold() -> None:
    allocator = RolloutAllocator(rule="total", total=10)
    message = "group_ids has {} rows, which take {} initial rollouts, and {} of total=10 are left"
    with pytest.raises(ValueError, match=message.format(3, 12, 10)):
        allocator.open([1, 2, 3], [NAN] * 3)
    allocator.open([1], [NAN])
    with pytest.raises(ValueError, match=message.format(2, 8, 6)):
        allocator.open([2, 3], [NAN] * 2)
    first = allocator.lease(4)
    allocator.report(first.lease_id, np.zeros(4))
    assert allocator.lease(1).group.tolist() == [1]
    allocator.open([2], [NAN])  # group 2 joins the round, which then holds 4 + 1 + 4
    with pytest.raises(ValueError, match=message.format(1, 4, 1)):
        allocator.open([3], [NAN])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rule": "best"}, "rule='best' is unknown; choose one of osla, uniform, calibrated, variance, total"),
        ({"initial": 0}, "initial=0 is not positive"),
        ({"initial": 8, "maximum": 4}, "maximum=4 is not between initial=8 and 65535"),
        ({"maximum": 65536}, "maximum=65536 is not between initial=4 and 65535"),
        ({"chunk": 0}, "chunk=0 is not positive"),
        ({"chunk": "ahead"}, "chunk='ahead'; give an integer or 'look'"),
        ({"chunk": "look", "rule": "total", "total": 100}, "chunk='look' has no meaning for rule 'total'"),
        ({"cost": -0.5}, "cost=-0.5 is not a finite number >= 0"),
        ({"cost": NAN}, "cost=nan is not"),
        ({"cost": math.inf}, "cost=inf is not"),
        ({"reward_range": (1.0, 1.0)}, r"reward_range=\(1, 1\) is not a finite range"),
        ({"reward_range": (0.0, NAN)}, "reward_range"),
        ({"reward_range": (0.0, math.inf)}, "reward_range"),
        ({"max_attempts": 0}, "max_attempts=0 is not between 1 and"),
        ({"initial": 1, "maximum": -(2**63)}, "maximum=-9223372036854775808 is not between"),
        ({"rule": "calibrated"}, "calibration=None; rules 'calibrated' and 'variance' need a Calibration"),
        ({"rule": "variance"}, "calibration=None; rules 'calibrated' and 'variance' need a Calibration"),
        ({"calibration": CALIBRATION}, "calibration is given; only rules 'calibrated', 'variance' and 'total' read it"),
        ({"rule": "total"}, "total=None; rule='total' needs the number of rollouts"),
        ({"total": 100}, "total is given; only rule='total' takes it"),
        ({"rule": "total", "total": 3}, "total=3 does not hold the initial=4 rollouts of a group"),
        ({"rule": "total", "total": 100, "cost": 0.1}, "cost=0.1 has no meaning for rules 'uniform' and 'total'"),
        ({"rule": "uniform", "cost": 0.1}, "cost=0.1 has no meaning"),
    ],
    ids=str,
)
def test_bad_options(options: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        RolloutAllocator(**options)
