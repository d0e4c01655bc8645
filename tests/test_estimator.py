"""The estimator from a batch's first prompt to its outcomes: the op's advantages, unbiased ones on request, and what it learns."""

import itertools
from dataclasses import replace

import numpy as np
import pytest
import torch

from v05.estimator import Estimator
from v05.methods import METHODS, Calibration
from v05.ops import fused_advantage
from v05.path_counting import path_counting_advantages
from v05.prior.calibration import Calibrator

OTHER = Calibration(0.2, 0.9, 3.0, 0.2)
COUNTED = [name for name, method in METHODS.items() if method.counts_paths]


class Remembering:
    """Predicts 0.25 for every prompt, and records what it is taught."""

    def __init__(self):
        self.learnt = []

    def predict(self, prompts):
        return np.full(len(prompts), 0.25)

    def observe(self, prompts, successes, trials):
        self.learnt.append((list(prompts), successes.tolist(), trials.tolist()))


def sampled(estimator, sequences, rates, calibrations):
    """The rewards of each sequence up to where the estimator's own allocator stops."""
    groups = []
    for rewards, rate, calibration in zip(sequences, rates, calibrations, strict=True):
        allocator = estimator.allocator(calibration=calibration)
        allocator.open([0], estimator.in_reward_units(np.array([rate])))
        while not allocator.done:
            leases = allocator.lease(64)
            allocator.report(leases.lease_id, rewards[leases.index])
        groups.append(rewards[: allocator.drain().offsets[1]])
    return groups


@pytest.mark.parametrize("method", COUNTED)
@pytest.mark.parametrize("chunk", [1, "look"])
@pytest.mark.parametrize("p", [0.2, 0.7])
def test_the_gradient_is_unbiased_with_prompts_that_weigh_alike(method, chunk, p):
    """The exact mean gradient of a bandit over all sequences of rewards is the true one. It is computed as by a host's loss that
    averages over rollouts: each advantage times its score, over `initial` rollouts a group. Rows are shuffled.
    """
    settings = {"initial": 2, "maximum": 7, "cost": 0.02, "chunk": chunk, "reward_range": (-1.0, 1.0)}
    estimator = Estimator(method, **settings, unbiased=True, group_weighting="prompt")
    sequences = np.array(list(itertools.product((-1.0, 1.0), repeat=7)))
    rates = np.full(len(sequences), 0.3)
    for fit in (OTHER, Calibration()) if method == "calibrated" else (None,):
        fits = [fit] * len(sequences)
        groups = sampled(estimator, sequences, rates, fits)
        assert len(set(map(len, groups))) > 1
        rows = np.random.default_rng(0).permutation(sum(map(len, groups)))
        ids = np.repeat(np.arange(len(groups)), list(map(len, groups)))[rows]
        rewards = np.concatenate(groups)[rows]
        names = [str(g) for g in ids]
        found = estimator.advantages(rewards, rates, group_ids=names, calibrations=fits, dtype=torch.float64)
        assert found.counted.all()
        gradient = np.bincount(ids, found.advantages.numpy() * ((rewards + 1) / 2 - p), len(groups)) / estimator.initial
        probability = np.prod(np.where(sequences > 0, p, 1 - p), axis=1)
        assert probability @ gradient == pytest.approx(2 * p * (1 - p), rel=1e-9)  # the factor 2: rewards are -1 and 1


def test_each_group_is_counted_by_the_calibration_it_was_sampled_with():
    estimator = Estimator("calibrated", initial=2, maximum=8, unbiased=True)
    rewards = np.array([0.0, 1.0, 0.0, 1.0, 1.0, 0.0, 1.0, 0.0])
    fits = [OTHER, None, OTHER]
    groups = sampled(estimator, [rewards] * 3, [0.3] * 3, fits)
    offsets = np.concatenate([[0], np.cumsum(list(map(len, groups)))])
    found = estimator.advantages(
        np.concatenate(groups), np.full(3, 0.3), group_offsets=offsets, calibrations=fits, dtype=torch.float64
    )
    assert found.counted.all()
    for g, fit in enumerate(fits):
        alone = path_counting_advantages(
            groups[g], [0.3], [0, len(groups[g])], method="calibrated", initial=2, maximum=8, calibration=fit
        )
        assert torch.equal(found.advantages[offsets[g] : offsets[g + 1]], alone)


def test_groups_whose_paths_cannot_be_counted_have_the_advantages_of_the_op():
    estimator = Estimator("v05", initial=2, maximum=4, unbiased=True, leave_one_out=True)
    rewards, rates = np.array([0.0, 0.0, 0.0, 1.0, 0.0, 1.0, 1.0, 1.0, 1.0, 1.0]), np.full(4, 0.9)
    offsets, valid = [0, 4, 6, 8, 10], np.array([1, 1, 1, 1, 1, 0, 1, 1, 1, 1])
    whole = np.array([True, True, False, True])
    given = dict(group_offsets=offsets, dtype=torch.float64)
    found = estimator.advantages(rewards, rates, valid=valid, whole=whole, **given)
    assert found.counted.tolist() == [True, False, False, True]  # groups 1 and 2: a rejected rollout, and a group that is not whole
    op = fused_advantage(rewards, rates, valid=valid, leave_one_out=True, **given).advantages
    assert torch.equal(found.advantages[4:8], op[4:8])
    assert not torch.equal(found.advantages[:4], op[:4])
    graded = estimator.advantages(np.where(np.arange(10) == 3, 0.5, rewards), rates, **given)
    assert not graded.counted.any()
    early = estimator.advantages(rewards[:3], rates[:1], group_offsets=[0, 3], dtype=torch.float64)
    assert not early.counted.any()  # the rule would have asked for more: something else stopped the group


def test_tokens_get_what_their_rollout_gets():
    estimator = Estimator("v05", initial=2, maximum=4, unbiased=True, group_weighting="prompt")
    rewards, rates, offsets = torch.tensor([1.0, 0.0, 1.0, 1.0, 1.0, 1.0]), np.array([0.2, 0.9]), [0, 4, 6]
    mask = torch.tensor([[1, 1, 0], [1, 0, 0], [1, 1, 1], [0, 1, 0], [1, 1, 1], [1, 1, 1]])
    for choice in (estimator, replace(estimator, unbiased=False)):
        a_rollout = choice.advantages(rewards, rates, group_offsets=offsets).advantages
        tokens = choice.advantages(rewards, rates, group_offsets=offsets, response_mask=mask).advantages
        assert torch.equal(tokens, a_rollout[:, None] * mask)
    plain = replace(estimator, unbiased=False, group_weighting="rollout").advantages(rewards, rates, group_offsets=offsets)
    op = fused_advantage(rewards, rates, group_offsets=offsets)
    assert torch.equal(plain.advantages, op.advantages)
    assert torch.equal(a_rollout, op.advantages * torch.tensor([0.5] * 4 + [1.0] * 2))


def test_prior_and_calibration_learn_what_groups_came_to():
    prior, calibrator = Remembering(), Calibrator()
    estimator = Estimator("calibrated", prior, calibrator, reward_range=(-1.0, 1.0))
    prompts = [f"{i}" for i in range(100)]
    rates = estimator.open(prompts)
    assert rates.tolist() == [0.25] * 100
    assert estimator.in_reward_units(rates[:1]).tolist() == [-0.5]
    estimate = estimator.advantages(np.tile([1.0, 1.0, -1.0, 1.0], 100), rates, group_offsets=np.arange(0, 401, 4))
    before = estimator.calibration
    estimator.close(prompts, rates, *estimator.outcomes(estimate.stats), fit=False)
    assert prior.learnt == [(prompts, [3.0] * 100, [4.0] * 100)]
    assert estimator.calibration == before == Calibration()
    calibrator.fit()
    assert estimator.calibration != before
    again = replace(estimator, leave_one_out=True)
    assert again.calibration is estimator.calibration


@pytest.mark.parametrize("name", ["dr_grpo", "batch"])
def test_a_method_without_a_prior_neither_predicts_nor_learns(name):
    prior = Remembering()
    estimator = Estimator(name, prior)
    rates = estimator.open(["x"])
    assert np.isnan(rates).all()
    estimate = estimator.advantages([1.0, 0.0], rates, group_offsets=[0, 2])
    estimator.close(["x"], rates, *estimator.outcomes(estimate.stats))
    assert prior.learnt == []
    assert estimator.calibration is None
    assert estimator.allocator().lease(0) is not None  # a method without a prior gives every prompt `initial` rollouts


def test_paths_that_cannot_be_counted_are_refused():
    for given in ({"method": "grpo"}, {"method": "v05", "rule": "uniform"}, {"method": "prior"}):
        with pytest.raises(ValueError, match=r"unbiased=True with method='\w+', rule=.*; leave it out"):
            Estimator(**given, unbiased=True)
    with pytest.raises(ValueError, match="method='gpro' is unknown"):
        Estimator("gpro")


def test_energies_of_successes_and_failures_are_learnt():
    """A rollout that is left out does not count. A fractional reward counts as a fraction of a success."""
    prior, calibrator = Remembering(), Calibrator()
    estimator = Estimator("optimal", prior, calibrator, reward_range=(-1.0, 1.0))
    rewards, energy = [1.0, -1.0, 0.0, np.nan, 1.0], [2.0, 3.0, 4.0, 50.0, 5.0]
    given = dict(group_ids=["b", "b", "a", "a", "b"], valid=np.array([1, 1, 1, 1, 0]), energy=energy)
    rates = estimator.open(["x", "y"])
    estimate = estimator.advantages(rewards, rates, **given)
    assert estimate.energies.tolist() == [[2.0, 2.0], [3.0, 2.0]]
    estimator.close(["x", "y"], rates, *estimator.outcomes(estimate.stats), estimate.energies)
    assert calibrator.state_dict()["energies"].tolist() == estimate.energies.tolist()
    assert replace(estimator, method="calibrated").advantages(rewards, rates, **given).energies is None
    assert estimator.advantages(rewards, rates, **given | {"energy": None}).energies is None
