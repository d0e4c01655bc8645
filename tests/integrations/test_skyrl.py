"""The estimators in SkyRL's registry, against SkyRL's own. `make test-integrations` installs SkyRL where Python is 3.12."""

import asyncio
import inspect
from dataclasses import astuple
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from helpers.host_situations import TOLERANCE, FixedPrior, situations
from v05.energy import completion_energy
from v05.integrations.groups import PromptPriors
from v05.integrations.settings import Settings
from v05.methods import Calibration, find_method
from v05.prior.calibration import Calibrator

ppo_utils = pytest.importorskip("skyrl.backends.skyrl_train.utils.ppo_utils", exc_type=ImportError)
pytestmark = [pytest.mark.host, pytest.mark.filterwarnings("default")]


@pytest.fixture
def skyrl(monkeypatch):
    """The integration with a registry of its own, without v05's estimators, and a prior that the test sets."""
    from v05.integrations import skyrl

    monkeypatch.setattr(ppo_utils.AdvantageEstimatorRegistry, "_functions", dict(ppo_utils.AdvantageEstimatorRegistry._functions))
    monkeypatch.setattr(skyrl, "PRIORS", PromptPriors(FixedPrior()))
    monkeypatch.setattr(skyrl, "ROLLOUTS", {})
    return skyrl


def advantages(estimator, token_rewards, mask, ids, normalize=True, config=None):
    """The advantages that SkyRL's trainer computes for a batch."""
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
        n = len(batch["prompts"])
        return {"response_ids": [[1]] * n, "loss_masks": [[1]] * n}


def test_the_generator_predicts_on_the_way(skyrl):
    """Training prompts open their groups under the ids that SkyRL later gives the estimator. Evaluation prompts open none."""
    from skyrl.train.generators.utils import prepare_generator_input

    skyrl.register()
    skyrl.PRIORS.prior.rates = {"2+2=": 0.25}

    prompts = [
        {"prompt": [{"role": "user", "content": text}], "env_class": None, "env_extras": {}, "uid": uid}
        for uid, text in (("0", "2+2="), ("1", "3+3="))
    ]
    generator = skyrl.PromptedGenerator(Echo())
    batch, uids = prepare_generator_input(prompts, 2, {}, "none", "eval", 0)
    assert asyncio.run(generator.generate(batch)) == {"response_ids": [[1]] * 4, "loss_masks": [[1]] * 4}
    with pytest.raises(ValueError, match="prior: none for 2 of 2 groups"):
        advantages("v05", torch.eye(4), torch.ones(4, 4), uids)
    batch, uids = prepare_generator_input(prompts, 2, {}, "none", "train", 0)
    asyncio.run(generator.generate(batch))
    result = advantages("v05", torch.tensor([[1.0], [0.0], [1.0], [0.0]]), torch.ones(4, 1), uids)
    assert result.flatten().tolist() == [0.75, -0.25, 0.5, -0.5]
    assert skyrl.PRIORS.prior.learnt == {"2+2=": (1.0, 2.0), "3+3=": (1.0, 2.0)}


def test_a_prompt_that_a_filter_dropped_is_predicted_anew(skyrl):
    """SkyRL's id of a prompt is the same in every epoch, and the estimator never sees the groups that SkyRL's filter drops."""
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
    assert advantages("v05_rloo", *given, config=config).flatten().tolist() == [1.0, -1.0]  # as with SkyRL's own estimator


def test_the_estimators_reach_other_processes_by_reference(skyrl):
    """SkyRL sends estimators pickled. In another process they must use that process's table, not a copy of this process's."""
    import cloudpickle

    skyrl.register()
    sent = cloudpickle.loads(cloudpickle.dumps(ppo_utils.AdvantageEstimatorRegistry._functions["v05"]))
    skyrl.PRIORS.open(["a"], ["x"])
    result, _ = sent(torch.tensor([[1.0], [0.0]]), torch.ones(2, 1), np.array(["a", "a"], dtype=object), config=SimpleNamespace())
    assert result.flatten().tolist() == [0.5, -0.5]


class Sampler:
    """Answers like a generator of SkyRL, with responses of varying length. Tokens of successes are more likely than those of
    failures. SkyRL's overlong filter keeps responses that are cut off from training.

    Attributes:
        steps: most steps of a trajectory; 0 where training is not step-wise.
        energies, tokens, rewards: one value for each trajectory of the last answer; `tokens` counts those trained on.
        rows: number of output rows of each of these trajectories.
    """

    def __init__(self, steps):
        self.random, self.steps = np.random.default_rng(0), steps

    async def generate(self, batch):
        from skyrl.train.generators.utils import apply_overlong_filtering

        n = len(batch["prompts"])
        self.rewards = np.where(self.random.random(n) < 0.4, 1.0, 0.0)
        self.rows = self.random.integers(1, self.steps + 1, size=n) if self.steps else np.ones(n, dtype=int)
        of_row = np.repeat(np.arange(n), self.rows)
        lengths = self.random.integers(2, 6, size=len(of_row))
        scale = np.where(self.rewards[of_row] > 0, 0.2, 2.0)
        logprobs = [-self.random.exponential(s, length) for s, length in zip(scale, lengths, strict=True)]
        masks = [np.arange(length) != length - 1 if row % 5 == 0 else np.ones(length) for row, length in enumerate(lengths)]
        stop_reasons = np.where(self.random.random(len(of_row)) < 0.3, "length", "stop").tolist()
        masks = [np.array(mask) for mask in apply_overlong_filtering([mask.tolist() for mask in masks], stop_reasons)]
        self.energies = np.bincount(of_row, [completion_energy(p[mask != 0]) for p, mask in zip(logprobs, masks, strict=True)])
        self.tokens = np.bincount(of_row, [mask.sum() for mask in masks])
        return {
            "prompt_token_ids": [[1]] * len(of_row),
            "response_ids": [[2] * length for length in lengths],
            "rewards": self.rewards[of_row].tolist(),
            "loss_masks": [mask.astype(int).tolist() for mask in masks],
            "stop_reasons": stop_reasons,
            "rollout_metrics": None,
            "rollout_logprobs": [p.tolist() for p in logprobs],
            "trajectory_ids": [batch["trajectory_ids"][i] for i in of_row] if self.steps else None,
            "is_last_step": (np.diff(of_row, append=n) > 0).tolist() if self.steps else None,
            "env_metrics": [{}] * len(of_row),
        }


@pytest.mark.parametrize("steps", [0, 3], ids=["whole", "step-wise"])
@pytest.mark.parametrize("method", ["optimal", "otb", "batch_energy", "opo", "ebpo", "rloo"])
def test_what_the_generator_knows_reaches_the_advantages_and_the_calibration(skyrl, method, steps):
    """SkyRL's trainer hands on energies, lengths, and which rollouts train, from sampling to advantages. In the second of two steps
    the calibration learnt in the first changes the baselines.
    """
    from skyrl.train.config import SkyRLTrainConfig
    from skyrl.train.generators.utils import prepare_generator_input
    from skyrl.train.trainer import RayPPOTrainer

    skyrl.register()
    texts = [f"prompt {g}" for g in range(100)]
    prior = skyrl.PRIORS.prior = FixedPrior({text: 0.1 + 0.08 * (g % 11) for g, text in enumerate(texts)})
    cfg = SkyRLTrainConfig()
    cfg.trainer.algorithm.advantage_estimator = f"v05_{method}"
    cfg.trainer.train_batch_size = cfg.trainer.policy_mini_batch_size = 100
    cfg.generator.n_samples_per_prompt, cfg.generator.step_wise_trajectories = 4, bool(steps)
    trainer = RayPPOTrainer.__new__(RayPPOTrainer)  # without GPUs there are no workers to make
    sampler = Sampler(steps)
    trainer.cfg, trainer.generator, trainer.all_metrics = cfg, skyrl.PromptedGenerator(sampler), {}
    trainer.tokenizer, trainer.dispatch = SimpleNamespace(pad_token_id=0), SimpleNamespace(get_lcm_dp_size=lambda: 7)
    calibrator = Calibrator()
    reference = Settings(method).estimator(prior, calibrator)
    prompts = [
        {"prompt": [{"role": "user", "content": text}], "env_class": None, "env_extras": {}, "uid": str(g)}
        for g, text in enumerate(texts)
    ]
    for step in range(2):
        batch, uids = prepare_generator_input(prompts, 4, {}, "none", "train", step)
        output = asyncio.run(trainer.generate(batch))
        rows = [trajectory.instance_id for trajectory in output["trajectory_ids"]] if steps else uids
        data = trainer.convert_to_training_input(*trainer.postprocess_generator_output(output, rows))
        data["values"] = None
        data = trainer.compute_advantages_and_returns(data)
        rates = prior.predict(texts)
        energy, trains = sampler.tokens if method == "opo" else sampler.energies, sampler.tokens > 0
        estimate = reference.advantages(sampler.rewards, rates, group_ids=uids, valid=trains, energy=energy)
        expected = torch.zeros(len(data["advantages"]), 1)
        expected[: len(rows), 0] = estimate.advantages[torch.from_numpy(np.repeat(np.arange(400), sampler.rows))]
        torch.testing.assert_close(data["advantages"], expected * data["response_mask"], rtol=0, atol=1e-5)
        if find_method(method).needs_prior:
            of_prompt = np.repeat(np.arange(100), 4)[trains]
            taught = np.bincount(of_prompt, sampler.rewards[trains], 100), np.bincount(of_prompt, minlength=100)
            np.testing.assert_allclose([prior.learnt[text] for text in texts], np.transpose(taught), rtol=1e-12)
        reference.close(texts, rates, *reference.outcomes(estimate.stats), estimate.energies)
    assert skyrl.ROLLOUTS == {}
    if find_method(method).reads_calibration:
        learnt = skyrl.PRIORS.settle(Settings(method)).calibrator
        assert learnt.calibration.kappa != Calibration().kappa
        assert astuple(learnt.calibration) == pytest.approx(astuple(calibrator.calibration))
    if find_method(method).learns_energies:
        np.testing.assert_allclose(learnt.state_dict()["energies"], calibrator.state_dict()["energies"], rtol=1e-12)
        assert learnt.calibration.delta1 != 0.0


def test_a_part_of_a_group_has_no_energies(skyrl):
    """For a part of a group, `optimal` equals `calibrated` with each rollout left out, and learns nothing about energies. `otb` is
    refused.
    """
    skyrl.register(leave_one_out=True)
    given = torch.tensor([[1.0], [0.0]]), torch.ones(2, 1), ["a", "a"]
    found = []
    for method in ("optimal", "calibrated"):
        skyrl.PRIORS.open(["a"], ["x"])
        skyrl.ROLLOUTS["a"] = [(1, 0.5), (0, 0.0), (1, 0.5)]
        found.append(advantages(f"v05_{method}", *given))
        assert skyrl.ROLLOUTS == {}
    torch.testing.assert_close(*found, rtol=0, atol=1e-6)
    assert skyrl.PRIORS.settle(Settings("optimal")).calibrator.state_dict()["energies"].tolist() == [[0.0, 0.0], [0.0, 0.0]]
    with pytest.raises(ValueError, match="energy: needed by method='otb'"):
        advantages("v05_otb", *given)


def test_repeated_groups_repeat_what_is_known_of_them(skyrl):
    """Dynamic sampling may replace a group by a copy of another, for methods without a prior."""
    skyrl.register()
    skyrl.ROLLOUTS["a"] = [(1, 3.0), (1, 1.0), (0, 0.0)]
    rewards = torch.tensor([[1.0], [0.0], [1.0]] * 2)
    assert advantages("v05_otb", rewards, torch.ones(6, 1), ["a"] * 6).flatten().tolist() == [0.25, -0.75, 0.0] * 2


@pytest.mark.parametrize("settings", [{}, {"prior": "mean"}])
def test_the_prior_of_a_method_that_has_its_own_is_named_when_it_is_registered(skyrl, monkeypatch, settings):
    """SkyRL names its estimator only after the groups have been predicted."""
    monkeypatch.setattr(skyrl, "PRIORS", PromptPriors())
    skyrl.register(**settings)
    skyrl.PRIORS.open(["a"], ["x"])
    given = torch.tensor([[1.0], [0.0]]), torch.ones(2, 1), ["a", "a"]
    if settings:
        assert advantages("v05_ebpo", *given).flatten().tolist() == pytest.approx([0.5, -0.5])
    else:
        with pytest.raises(ValueError, match=r"v05\.prior='mean': the prior in PRIORS was made with 'history'; give"):
            advantages("v05_ebpo", *given)
