"""Path counting is exactly unbiased over all sequences of rewards, each stopped by the allocator itself."""

import itertools

import numpy as np
import pytest

from v05.budget import RolloutAllocator
from v05.methods import Calibration
from v05.ops import fused_advantage
from v05.path_counting import path_counting_advantages

CALIBRATION = Calibration(0.2, 0.9, 3.0, 0.2, -0.2, 1.3)


def stopped(rule, prior, initial, maximum, cost, chunk, high=1.0):
    """All sequences of `maximum` rewards, and where the allocator stopped each."""
    rewards = np.array(list(itertools.product((0.0, high), repeat=maximum)))
    calibration = None if rule == "osla" else CALIBRATION
    allocator = RolloutAllocator(
        rule=rule,
        initial=initial,
        maximum=maximum,
        cost=cost,
        chunk=chunk,
        calibration=calibration,
        reward_range=(0.0, high),
    )
    allocator.open(np.arange(len(rewards)), np.full(len(rewards), prior))
    while not allocator.done:
        leases = allocator.lease(1 << 20)
        allocator.report(leases.lease_id, rewards[leases.group, leases.index])
    return rewards, allocator.drain()


def expected_gradient(advantages, offsets, rewards, p):
    """The exact mean gradient, over all sequences, of a bandit with success probability p. The true gradient is p (1 - p)."""
    outcomes = rewards / rewards.max()
    probability = np.prod(np.where(outcomes == 1, p, 1 - p), axis=1)
    scores = np.concatenate([row[:size] - p for row, size in zip(outcomes, np.diff(offsets), strict=True)])
    return probability @ (np.add.reduceat(advantages * scores, offsets[:-1]) / np.diff(offsets))


@pytest.mark.parametrize("p", [0.1, 0.5, 0.8])
@pytest.mark.parametrize(
    ("initial", "maximum", "chunk", "prior"),
    [
        (1, 6, 1, 0.3),
        (1, 6, 1, 0.9),
        (2, 9, 1, 0.3),
        (2, 9, 1, np.nan),
        (3, 9, 2, 0.9),
        (2, 9, 4, 0.3),
        (4, 4, 1, 0.9),
        (1, 7, "look", 0.3),
        (1, 9, "look", 0.9),
        (2, 9, "look", 0.3),
        (2, 9, "look", np.nan),
        (3, 10, "look", 0.05),
    ],
)
@pytest.mark.parametrize("rule", ["osla", "calibrated", "variance"])
def test_the_gradient_is_unbiased(rule, initial, maximum, chunk, prior, p):
    method = {"osla": "v05", "calibrated": "calibrated", "variance": "optimal"}[rule]
    rewards, closed = stopped(rule, prior, initial, maximum, 0.02, chunk)
    settings = {"initial": initial, "maximum": maximum, "cost": 0.02, "chunk": chunk}
    settings["calibration"] = None if rule == "osla" else CALIBRATION
    advantages = path_counting_advantages(closed.rewards, closed.priors, closed.offsets, method=method, **settings).numpy()
    assert expected_gradient(advantages, closed.offsets, rewards, p) == pytest.approx(p * (1 - p), rel=1e-9)


def test_leave_one_out_is_biased_where_groups_stop_early():
    rewards, closed = stopped("calibrated", 0.3, 2, 9, 0.02, 1)
    settings = {"method": "calibrated", "calibration": CALIBRATION, "leave_one_out": True}
    advantages = fused_advantage(closed.rewards, closed.priors, group_offsets=closed.offsets, **settings).advantages.numpy()
    assert abs(expected_gradient(advantages, closed.offsets, rewards, 0.1) / 0.09 - 1) > 0.1


def test_a_group_that_did_not_go_on_has_leave_one_out_advantages():
    rewards = [1.0, 0.0, 1.0, 1.0]
    settings = {"method": "calibrated", "calibration": CALIBRATION}
    found = path_counting_advantages(rewards, [0.7], [0, 4], initial=4, maximum=4, **settings)
    expected = fused_advantage(np.array(rewards), [0.7], group_offsets=[0, 4], leave_one_out=True, **settings).advantages
    assert found.numpy() == pytest.approx(expected.numpy(), rel=1e-6)


def test_no_group_has_no_advantages():
    assert path_counting_advantages([], [], [0], method="v05", initial=4, maximum=16).shape == (0,)


def test_reward_units_are_kept():
    small, large = (stopped("calibrated", 0.3 * high, 2, 6, 0.02, 1, high)[1] for high in (1.0, 10.0))
    settings = {"method": "calibrated", "initial": 2, "maximum": 6, "cost": 0.02, "calibration": CALIBRATION}
    of_small = path_counting_advantages(small.rewards, small.priors, small.offsets, **settings)
    of_large = path_counting_advantages(large.rewards, large.priors, large.offsets, reward_range=(0.0, 10.0), **settings)
    assert of_large.numpy() == pytest.approx(10 * of_small.numpy())


@pytest.mark.parametrize(
    ("rewards", "changed", "message"),
    [
        ([0.5, 1.0], {}, r"rewards\[0\]=0.5 is neither 0.0 nor 1.0"),
        ([1.0, 1.0], {"method": "grpo"}, "method='grpo' has no stopping rule"),
        ([1.0], {}, "group 0: the rule does not stop at 1 rollouts with 1 successes"),
        ([1.0, 0.0], {"cost": 1e-9}, "group 0: the rule does not stop at 2 rollouts with 1 successes; give initial"),
        ([1.0] * 5, {}, "group 0: the rule does not stop at 5 rollouts"),
        ([1.0, 0.0], {"initial": 0}, "initial=0 is not positive"),
    ],
)
def test_mistakes_are_named(rewards, changed, message):
    settings = {"method": "calibrated", "initial": 2, "maximum": 4, "cost": 0.5, "calibration": CALIBRATION, **changed}
    with pytest.raises(ValueError, match=message):
        path_counting_advantages(rewards, [0.5], [0, len(rewards)], **settings)


@pytest.mark.parametrize(
    ("prior", "offsets", "message"),
    [
        ([0.5], [0, 2, 4], r"prior has shape \(1,\), but group_offsets has 2 groups; give one prior a group"),
        ([0.5, 0.5, 0.5], [0, 2, 4], r"prior has shape \(3,\)"),
        (0.5, [0, 4], r"prior has shape \(\)"),
        ([0.5, 1.5], [0, 2, 4], r"prior\[1\]=1.5 is outside reward_range=\(0.0, 1.0\)"),
        ([0.5], [0, 2], r"group_offsets=\[0, 2\] do not rise from 0 to the length of rewards, shaped \(4,\)"),
        ([0.5, 0.5], [0, 2, 6], r"group_offsets=\[0, 2, 6\] do not rise"),
        ([0.5], [2, 4], r"group_offsets=\[2, 4\] do not rise"),
        ([0.5, 0.5, 0.5], [0, 4, 2, 4], r"group_offsets=\[0, 4, 2, 4\] do not rise"),
        ([], [0], r"group_offsets=\[0\] do not rise"),
    ],
)
def test_shapes_that_do_not_fit_are_named(prior, offsets, message):
    with pytest.raises(ValueError, match=message):
        path_counting_advantages([1.0, 0.0, 1.0, 0.0], prior, offsets, method="calibrated", initial=2, maximum=4, cost=0.5)
