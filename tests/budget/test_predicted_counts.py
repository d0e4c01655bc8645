"""V0's budget before any rollout: the counts are those of a plain greedy search, and a group is tested after its count."""

import itertools

import numpy as np
import pytest

from v05.budget import RolloutAllocator, predicted_counts


def utility(count, rate):
    return count * (1 - rate) * (1 - (1 - rate) ** (count - 1))


def greedy(rates, total, lowest, highest):
    counts = [lowest] * len(rates)
    for _ in range(total - sum(counts)):
        gains = [utility(b + 1, p) - utility(b, p) if b < highest else -1.0 for b, p in zip(counts, rates, strict=True)]
        if max(gains) <= 0:
            break
        counts[int(np.argmax(gains))] += 1
    return counts


@pytest.mark.parametrize("seed", range(20))
def test_counts_are_those_of_a_plain_greedy_search(seed):
    rng = np.random.default_rng(seed)
    rates = rng.choice([0.0, 0.02, 0.3, 0.5, 0.9, 1.0, *rng.uniform(size=8)], size=rng.integers(1, 30))
    lowest, highest = int(rng.integers(1, 4)), int(rng.integers(4, 40))
    total = int(rng.integers(lowest * len(rates), (highest + 3) * len(rates)))
    assert predicted_counts(rates, total, lowest, highest).tolist() == greedy(rates, total, lowest, highest)


def test_greedy_is_best_where_worth_grows_ever_more_slowly():
    rates = np.array([0.6, 0.75, 0.9])  # the worth of these grows ever more slowly from two rollouts on
    best = max(
        (counts for counts in itertools.product(range(2, 9), repeat=3) if sum(counts) == 12),
        key=lambda counts: sum(utility(b, p) for b, p in zip(counts, rates, strict=True)),
    )
    assert predicted_counts(rates, 12, 2, 8).tolist() == list(best)


def test_bounds_hold_and_no_prediction_is_an_even_chance():
    counts = predicted_counts([0.01, 0.5, np.nan, 1.0], 400)
    assert counts.sum() <= 400
    assert counts.min() >= 2
    assert counts.max() <= 128
    assert counts[1] - counts[2] in (0, 1)
    assert counts[3] == 2  # a prompt that is always solved teaches nothing
    assert predicted_counts([0.3, 0.4], 10_000).tolist() == [128, 128]
    assert predicted_counts(np.zeros(0), 0).shape == (0,)


def run(allocator, reward):
    while not allocator.done:
        leases = allocator.lease(7)
        allocator.report(leases.lease_id, [reward(g, i) for g, i in zip(leases.group.tolist(), leases.index.tolist(), strict=True)])
    return allocator.drain()


def test_groups_are_tested_after_their_own_counts():
    allocator = RolloutAllocator(rule="osla", initial=2, maximum=16)
    allocator.open([1, 2, 3], [0.0, 0.9, 0.5], [2, 5, 9])
    closed = run(allocator, lambda group, index: 1.0 if group > 1 else 0.0)
    sizes = np.diff(closed.offsets).tolist()
    assert sizes[:2] == [2, 5]  # rewards agree with the prior
    assert sizes[2] > 9  # rewards disagree with the prior


def test_counts_survive_snapshots_expiry_and_a_total():
    allocator = RolloutAllocator(rule="total", initial=2, maximum=16, total=30)
    allocator.open(["a", "b"], [0.5, 0.5], [3, 12])
    assert allocator.counts()["queued"] == 15
    allocator.lease(4)  # these are above `initial`: no initial rollout is leased
    assert allocator.expire(0.0) == 4
    again = RolloutAllocator.restore(allocator.snapshot())
    assert again.counts()["queued"] == 15
    closed = run(again, lambda group, index: float(index % 2))
    assert closed.offsets[-1] == 30
    with pytest.raises(ValueError, match="of total=30 are left"):
        RolloutAllocator(rule="total", initial=2, total=30).open([1, 2], [0.5, 0.5], [16, 15])


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: predicted_counts([0.5, 1.2], 10), r"rates\[1\]=1.2 is outside \[0, 1\]"),
        (lambda: predicted_counts([0.5, 1.2], 10, 2, 2), r"rates\[1\]=1.2 is outside \[0, 1\]"),
        (lambda: predicted_counts([0.5, 0.5], 3), "total=3 does not hold lowest=2 rollouts for each of 2 groups"),
        (lambda: predicted_counts([0.5], 3, 3, 2), "lowest=3 and highest=2 are not"),
        (lambda: RolloutAllocator().open([1], [0.5], [3]), "counts holds 3, which is not between initial=4 and maximum=16"),
        (lambda: RolloutAllocator().open([1], [0.5], [4, 4]), "counts has 2 rows and group_ids 1"),
        (lambda: RolloutAllocator().open([1], [0.5], [4.5]), "counts has dtype float64"),
    ],
)
def test_bad_input_is_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()
