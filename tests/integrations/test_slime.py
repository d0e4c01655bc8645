"""slime's hooks, called with objects that have the attributes of its Sample and arguments (source of release 0.4.0). slime itself
is not run.
"""

import enum
import math
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from helpers.host_situations import TOLERANCE, FixedPrior, situations
from v05.integrations import slime
from v05.integrations.groups import PromptPriors
from v05.integrations.settings import Settings

LOSES_ROWS = ("padding",)  # slime has no padding rows


class Status(enum.Enum):
    COMPLETED = "completed"
    ABORTED = "aborted"


@dataclass
class Sample:
    group_index: int | None
    reward: float | dict[str, float] | None
    prompt: Any = ""
    rollout_id: int | None = None
    remove_sample: bool = False
    status: Status = Status.COMPLETED
    response_length: int = 0
    loss_mask: list[int] | None = None
    rollout_log_probs: list[float] | None = None
    metadata: dict[str, Any] = field(default_factory=dict)

    def get_reward_value(self, args):
        return self.reward if not args.reward_key else self.reward[args.reward_key]


@pytest.fixture
def prior(monkeypatch):
    prior = FixedPrior()
    monkeypatch.setattr(slime, "PRIORS", PromptPriors(prior))
    return prior


def arguments(**v05):
    return SimpleNamespace(reward_key=None, use_rollout_logprobs=False, v05=v05)


@pytest.mark.parametrize("case", situations(*LOSES_ROWS))
def test_situations(case, prior):
    prior.rates = case.priors
    rollouts = [None] * len(case.rewards) if case.trajectories is None else case.trajectories
    samples = [
        Sample(ord(group), reward, group, rollout, loss_mask=None if case.lengths is None else mask)
        for group, reward, rollout, mask in zip(case.groups, case.rewards, rollouts, case.mask.tolist(), strict=True)
    ]
    args = arguments(method=case.method, leave_one_out=case.leave_one_out, reward_range=list(case.reward_range))
    raw, advantages = slime.custom_reward_post_process(args, samples)
    assert advantages == pytest.approx(case.expected, abs=TOLERANCE)
    # slime logs the verifier's rewards, and its dynamic sampling filter reads them: they stay unchanged.
    np.testing.assert_array_equal(raw, case.rewards)
    assert [sample.reward for sample in samples] == raw


def test_aborted_removed_and_unscored_samples_are_left_out(prior):
    samples = [Sample(0, 1.0), Sample(0, 0.0), Sample(0, None), Sample(0, 1.0, status=Status.ABORTED)]
    samples.append(Sample(0, 0.0, remove_sample=True))
    samples.append(Sample(0, 1.0, loss_mask=[0, 0]))
    samples.append(Sample(0, 1.0, loss_mask=[]))
    _, advantages = slime.custom_reward_post_process(arguments(method="dr_grpo"), samples)
    assert advantages == [0.5, -0.5, 0.0, 0.0, 0.0, 0.0, 0.0]
    assert prior.learnt == {}  # with a method without a prior, the prior learns nothing
    slime.custom_reward_post_process(arguments(method="v05"), samples)
    assert prior.learnt == {"": (1.0, 2.0)}


def test_a_split_over_ranks_changes_nothing(prior):
    """slime splits the hook's result over ranks, in any way that suits the lengths. Each rank expands its own part to tokens."""
    samples = [Sample(group, reward) for group, reward in zip([0, 1] * 3, [1.0, 0.0, 0.0, 0.0, 1.0, 1.0], strict=True)]
    _, advantages = slime.custom_reward_post_process(arguments(), samples)
    for rank in (0, 1):
        rows = range(rank, 6, 2)
        data = {"rewards": [advantages[i] for i in rows], "log_probs": [torch.zeros(i + 1, dtype=torch.bfloat16) for i in rows]}
        slime.custom_advantage(arguments(), data)
        for i, tokens in zip(rows, data["advantages"], strict=True):
            assert tokens.tolist() == pytest.approx([advantages[i]] * (i + 1))
            assert tokens.dtype == torch.float32
        assert data["returns"] is data["advantages"]


def test_rewards_by_key_and_the_prior_that_learns(prior):
    samples = [
        Sample(7, {"acc": 1.0, "format": 0.0}, [{"role": "user", "content": "2+2="}]),
        Sample(7, {"acc": 0.0, "format": 1.0}),
    ]
    samples[1].prompt = samples[0].prompt
    args = arguments()
    args.reward_key = "acc"
    raw, advantages = slime.custom_reward_post_process(args, samples)
    assert raw == [1.0, 0.0]
    assert advantages == [0.5, -0.5]
    assert prior.learnt == {"2+2=": (1.0, 2.0)}


def test_a_sample_without_a_rollout_id_is_a_trajectory_of_its_own(prior):
    samples = [Sample(0, 1.0), Sample(0, 0.0, rollout_id=5), Sample(0, 0.0, rollout_id=5), Sample(0, 0.0)]
    _, advantages = slime.custom_reward_post_process(arguments(method="dr_grpo"), samples)
    assert advantages == pytest.approx([2 / 3, -1 / 3, -1 / 3, -1 / 3])


def test_what_is_missing_is_named(prior):
    with pytest.raises(ValueError, match="group_index: None for sample 1"):
        slime.custom_reward_post_process(arguments(), [Sample(0, 1.0), Sample(None, 1.0)])
    with pytest.raises(ValueError, match="reward_key: sample 1 has the rewards acc, format; name one with --reward-key"):
        slime.custom_reward_post_process(arguments(), [Sample(0, 1.0), Sample(0, {"acc": 1.0, "format": 0.0})])
    with pytest.raises(ValueError, match=r"v05.metod='v05' is not a setting"):
        slime.custom_reward_post_process(arguments(metod="v05"), [Sample(0, 1.0)])
    with pytest.raises(ValueError, match="reward_range"):
        slime.custom_reward_post_process(arguments(), [Sample(0, -1.0), Sample(0, math.nan)])


def test_log_probabilities_of_the_engine_tell_energies(prior):
    """Only tokens that are trained on count. If one sample has no log-probabilities, no energies are learnt."""
    samples = [Sample(0, 1.0, rollout_log_probs=[-0.1, -5.0], loss_mask=[1, 0]), Sample(0, 0.0, rollout_log_probs=[-2.0])]
    slime.custom_reward_post_process(arguments(method="optimal"), samples)
    energies = slime.PRIORS.settle(Settings("optimal")).calibrator.state_dict()["energies"]
    assert energies[:, 0] == pytest.approx([2 * (1 - np.exp(-0.1)) ** 2, 2 * (1 - np.exp(-2.0)) ** 2])
    samples = [Sample(1, 1.0, rollout_log_probs=[-0.1]), Sample(1, 0.0)]
    slime.custom_reward_post_process(arguments(method="optimal"), samples)
    assert slime.PRIORS.settle(Settings("optimal")).calibrator.state_dict()["energies"][:, 1].tolist() == [0.0, 0.0]


@pytest.mark.parametrize("known", [True, False], ids=["log-probabilities", "none"])
def test_lengths_are_what_opo_weighs_by(prior, known):
    """opo weighs by the number of tokens that are trained on, whether or not energies are known."""
    samples = [
        Sample(0, 1.0, response_length=4, loss_mask=[1, 0, 0, 0], rollout_log_probs=[-3.0] * 4 if known else None),
        Sample(0, 0.0, response_length=3, rollout_log_probs=[-0.1] * 3 if known else None),
    ]
    _, advantages = slime.custom_reward_post_process(arguments(method="opo"), samples)
    assert advantages == pytest.approx([0.75, -0.25])
