"""Methods that leave a rollout's own reward out of its baseline have an unbiased policy gradient. All actions of a softmax policy
are enumerated.
"""

import itertools
import math

import numpy as np
import pytest
import torch

from v05.methods import METHODS, Calibration
from v05.ops import fused_advantage

CALIBRATION = Calibration(0.3, 0.8, 6.0, 0.2, 0.4, 2.0)
REWARDS = np.array([1.0, 0.0, 0.25])  # rewards of the three actions
POLICIES = np.array([[0.5, 0.3, 0.2], [0.1, 0.6, 0.3]])  # action probabilities of the two prompts
SIZES = (2, 3)  # rollouts of each prompt
# As published, OPO, OTB and group means include the rollout's own reward. In js the shrinkage depends on it.
BIASED = ("js",)
UNBIASED = [name for name, method in METHODS.items() if (method.leave_one_out or name in ("none", "prior")) and name not in BIASED]


@pytest.mark.parametrize("name", [*UNBIASED, "otb", "opo", "dr_grpo", "v05", "ebpo"])
def test_leave_one_out_is_unbiased(name):
    prompts = np.repeat([0, 1], SIZES)
    given = dict(method=name, leave_one_out=name != "prior", calibration=CALIBRATION, dtype=torch.float64)
    prior = [0.7, 0.2] if METHODS[name].needs_prior else None
    found, wanted = np.zeros((2, 3)), np.zeros((2, 3))
    for actions in itertools.product(range(3), repeat=len(prompts)):
        taken = np.array(actions)
        probability = math.prod(POLICIES[prompts, taken])
        scores = np.eye(3)[taken] - POLICIES[prompts]
        energy = (scores**2).sum(axis=1)
        out = fused_advantage(REWARDS[taken], prior, group_ids=prompts, num_groups=2, energy=energy, **given)
        np.add.at(found, prompts, probability * out.advantages.numpy()[:, None] * scores)
        np.add.at(wanted, prompts, probability * REWARDS[taken][:, None] * scores)
    np.testing.assert_allclose(found, wanted, rtol=1e-9, atol=1e-12)
    assert np.abs(wanted).min() > 1e-3


def test_the_energy_of_a_batch_tells_the_baseline_of_least_second_moment():
    """The baseline of batch_energy is the best constant. With known success rates and energies, no baseline per prompt is better
    than that of `optimal`.
    """
    rng = np.random.default_rng(0)
    prompts = rng.integers(0, 2, 200_000)
    rates = np.array([0.8, 0.3])
    rewards = (rng.random(len(prompts)) < rates[prompts]).astype(float)
    calibration = Calibration(0.0, 1.0, 1e12, 1e-12, -0.5, 1.0)  # trusts the prior completely
    ratio = np.exp(-0.5 + np.log(1 - rates))
    energy = np.where(rewards == 1, ratio[prompts], 1.0) * rng.exponential(size=len(prompts))
    one_each = dict(group_offsets=np.arange(len(prompts) + 1), energy=energy, calibration=calibration, dtype=torch.float64)

    def second_moment(advantages):
        return float((advantages**2 * energy).mean())

    constant = second_moment(fused_advantage(rewards, method="batch_energy", **one_each).advantages.numpy())
    optimal = second_moment(fused_advantage(rewards, rates[prompts], method="optimal", **one_each).advantages.numpy())
    for shift in (-0.05, 0.05):
        best = np.average(rewards, weights=energy)
        assert constant < second_moment(rewards - best - shift)
        of_prompt = rewards - fused_advantage(rewards, rates[prompts], method="optimal", **one_each).advantages.numpy()
        assert optimal < second_moment(rewards - of_prompt - shift)
    assert optimal < 0.97 * constant
    for other in ("none", "batch"):
        assert constant < second_moment(fused_advantage(rewards, method=other, **one_each).advantages.numpy())
    right = second_moment(rewards - rates[prompts])
    assert optimal < 0.95 * right
