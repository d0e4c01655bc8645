"""The estimators in SkyRL's registry, against its own; `make test-integrations` installs it where Python is 3.12."""

import asyncio
import inspect
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from helpers.host_situations import TOLERANCE, FixedPrior, situations
from v05.integrations.groups import PromptPriors

ppo_utils = pytest.importorskip("skyrl.backends.skyrl_train.utils.ppo_utils", exc_type=ImportError)
pytestmark = [pytest.mark.host, pytest.mark.filterwarnings("default")]


@pytest.fixture
def skyrl(monkeypatch):
    """The integration with an empty registry of its own and a prior that the test sets."""
    from v05.integrations import skyrl

    monkeypatch.setattr(ppo_utils.AdvantageEstimatorRegistry, "_functions", dict(ppo_utils.AdvantageEstimatorRegistry._functions))
    monkeypatch.setattr(skyrl, "PRIORS", PromptPriors(FixedPrior()))
    return skyrl


def advantages(estimator, token_rewards, mask, ids, normalize=True, config=None):
    """What SkyRL's trainer makes of a batch."""
    result, returns = ppo_utils.compute_advantages_and_returns(
        token_level_rewards=token_rewards,
        response_mask=mask,
        index=np.array(ids, dtype=object),
        adv_estimator=estimator,
        config=config,
        grpo_norm_by_std=normalize,
    )
    assert torch.equal(result, returns)
    return result


def test_the_door_has_the_shape_it_was_written_for():
    assert list(inspect.signature(ppo_utils.register_advantage_estimator).parameters) == ["name"]
    given = inspect.signature(ppo_utils.compute_grpo_outcome_advantage).parameters
    assert list(given)[:3] == ["token_level_rewards", "response_mask", "index"]


@pytest.mark.parametrize(
    ("ours", "theirs", "normalize"), [("v05_grpo", "grpo", True), ("v05_grpo", "grpo", False), ("v05_rloo", "rloo", True)]
)
def test_parity(skyrl, ours, theirs, normalize):
    skyrl.register()
    generator = torch.Generator().manual_seed(0)
    ids = [f"uid{g}" for g in range(40) for _ in range(2 + g % 7)]
    mask = (torch.arange(8) < 1 + torch.randint(8, (len(ids), 1), generator=generator)).float()
    rewards = torch.randint(2, (len(ids), 1), generator=generator).float() * torch.nn.functional.one_hot(mask.sum(1).long() - 1, 8)
    torch.testing.assert_close(
        advantages(ours, rewards, mask, ids, normalize),
        advantages(theirs, rewards.clone(), mask, ids, normalize),
        rtol=0,
        atol=1e-5,
    )


@pytest.mark.parametrize("case", situations("trajectory"))
def test_situations(skyrl, case):
    skyrl.register(reward_range=case.reward_range, leave_one_out=case.leave_one_out)
    skyrl.PRIORS.prior.rates = case.priors
    groups = [group for group in case.ids if group != "pad0"]
    skyrl.PRIORS.open(groups, groups)
    estimator = {"v05": "v05", "grpo": "v05_grpo", "dr_grpo": "v05_grpo"}[case.method]
    result = advantages(estimator, case.token_rewards, case.mask, case.ids, normalize=case.method == "grpo")
    torch.testing.assert_close(result, case.expected_tokens, rtol=0, atol=TOLERANCE)


class Echo:
    async def generate(self, batch):
        return {"response_ids": [[1]] * len(batch["prompts"])}


def test_the_generator_predicts_on_the_way(skyrl):
    """Training prompts open their groups under the ids that SkyRL will give the estimator; evaluation's do not."""
    from skyrl.train.generators.utils import prepare_generator_input

    skyrl.register()
    skyrl.PRIORS.prior.rates = {"2+2=": 0.25}

    prompts = [
        {"prompt": [{"role": "user", "content": text}], "env_class": None, "env_extras": {}, "uid": uid}
        for uid, text in (("0", "2+2="), ("1", "3+3="))
    ]
    generator = skyrl.PromptedGenerator(Echo())
    batch, uids = prepare_generator_input(prompts, 2, {}, "none", "eval", 0)
    assert asyncio.run(generator.generate(batch)) == {"response_ids": [[1]] * 4}
    with pytest.raises(ValueError, match="prior: none for 2 of 2 groups"):
        advantages("v05", torch.eye(4), torch.ones(4, 4), uids)
    batch, uids = prepare_generator_input(prompts, 2, {}, "none", "train", 0)
    asyncio.run(generator.generate(batch))
    result = advantages("v05", torch.tensor([[1.0], [0.0], [1.0], [0.0]]), torch.ones(4, 1), uids)
    assert result.flatten().tolist() == [0.75, -0.25, 0.5, -0.5]
    assert skyrl.PRIORS.prior.learnt == {"2+2=": (1.0, 2.0), "3+3=": (1.0, 2.0)}


def test_a_prompt_that_a_filter_dropped_is_predicted_anew(skyrl):
    """SkyRL's id of a prompt is the same in every epoch, and no estimator is told of the groups that its filter drops."""
    from skyrl.train.generators.utils import prepare_generator_input

    skyrl.register()
    generator = skyrl.PromptedGenerator(Echo())
    prompts = [{"prompt": [{"role": "user", "content": "2+2="}], "env_class": None, "env_extras": {}, "uid": "0"}]
    for step, rate in enumerate((0.25, 0.75)):
        skyrl.PRIORS.prior.rates = {"2+2=": rate}
        batch, uids = prepare_generator_input(prompts, 2, {}, "none", "train", step)
        asyncio.run(generator.generate(batch))
    result = advantages("v05", torch.tensor([[1.0], [0.0]]), torch.ones(2, 1), uids)
    assert result.flatten().tolist() == [0.25, -0.75]


@pytest.mark.parametrize("kind", [None, "filter", "replace"])
def test_sampling_that_repeats_rollouts_is_refused(skyrl, kind):
    from skyrl.train.config.config import AlgorithmConfig, DynamicSamplingConfig

    skyrl.register()
    skyrl.PRIORS.open(["a"], ["x"])
    given = torch.tensor([[1.0], [0.0]]), torch.ones(2, 1), ["a", "a"]
    config = AlgorithmConfig(dynamic_sampling=DynamicSamplingConfig(type=kind))
    if kind == "replace":
        with pytest.raises(ValueError, match=r"trainer\.algorithm\.dynamic_sampling\.type='replace': .*; choose 'filter' or null"):
            advantages("v05", *given, config=config)
    else:
        assert advantages("v05", *given, config=config).flatten().tolist() == [0.5, -0.5]
    assert advantages("v05_rloo", *given, config=config).flatten().tolist() == [1.0, -1.0]  # as SkyRL's own


def test_the_estimators_reach_other_processes_by_reference(skyrl):
    """SkyRL sends them pickled; there they must find that process's table, not a copy of this one's."""
    import cloudpickle

    skyrl.register()
    sent = cloudpickle.loads(cloudpickle.dumps(ppo_utils.AdvantageEstimatorRegistry._functions["v05"]))
    skyrl.PRIORS.open(["a"], ["x"])
    result, _ = sent(torch.tensor([[1.0], [0.0]]), torch.ones(2, 1), np.array(["a", "a"], dtype=object), config=SimpleNamespace())
    assert result.flatten().tolist() == [0.5, -0.5]
