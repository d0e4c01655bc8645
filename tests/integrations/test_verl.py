"""The estimators in verl's registry and on its data, against verl's own. `make test-integrations` installs verl."""

import inspect
import json
import subprocess
import sys

import numpy as np
import pytest
import torch

from helpers.host_situations import TOLERANCE, FixedPrior, situations
from v05.integrations.groups import PromptPriors

pytest.importorskip("verl", exc_type=ImportError)
pytestmark = [pytest.mark.host, pytest.mark.filterwarnings("default")]


@pytest.fixture(scope="module")
def host():
    from omegaconf import OmegaConf
    from verl import DataProto
    from verl.trainer.ppo import core_algos, ray_trainer

    class Host:
        def advantages(self, estimator, token_rewards, mask, ids, **algorithm):
            """The advantages that verl's trainer computes for a batch under `algorithm.adv_estimator=estimator`."""
            data = DataProto.from_single_dict(
                {
                    "token_level_rewards": token_rewards,
                    "response_mask": mask,
                    "uid": np.array(ids, dtype=object),
                }
            )
            config = OmegaConf.create({"adv_estimator": estimator, **algorithm})
            normalize = config.get("norm_adv_by_std_in_grpo", True)
            ray_trainer.compute_advantage(data, estimator, norm_adv_by_std_in_grpo=normalize, config=config)
            assert torch.equal(data.batch["advantages"], data.batch["returns"])
            return data.batch["advantages"]

    Host.core_algos = core_algos
    return Host()


@pytest.fixture
def prior(monkeypatch):
    from v05.integrations import verl

    prior = FixedPrior()
    monkeypatch.setattr(verl, "PRIORS", PromptPriors(prior))
    return prior


def test_verl_finds_the_estimators_by_itself():
    """They are found in a fresh process that has never imported v05, as verl's workers are."""
    script = (
        "import verl; from verl.trainer.ppo.core_algos import get_adv_estimator_fn as find; print(*(find(n).args[0] for n in %r))"
    )
    names = ["v05", "v05_calibrated", "v05_rloo"]
    out = subprocess.run([sys.executable, "-W", "ignore", "-c", script % names], capture_output=True, text=True, check=True).stdout
    assert out.splitlines()[-1] == "v05 calibrated rloo"


def test_the_doors_have_the_shape_they_were_written_for(host):
    assert list(inspect.signature(host.core_algos.register_adv_est).parameters) == ["name_or_enum"]
    given = inspect.signature(host.core_algos.compute_grpo_vectorized_outcome_advantage).parameters
    assert list(given)[:3] == ["token_level_rewards", "response_mask", "index"]
    assert "config" in given


def random_batch(seed):
    """Uneven groups of at least two rollouts, with shuffled rows and responses of any length."""
    generator = torch.Generator().manual_seed(seed)
    ids = [f"uid{g}" for g in range(40) for _ in range(2 + int(torch.randint(8, (), generator=generator)))]
    ids = [ids[i] for i in torch.randperm(len(ids), generator=generator).tolist()]
    lengths = 1 + torch.randint(16, (len(ids), 1), generator=generator)
    mask = (torch.arange(16) < lengths).long()
    rewards = torch.zeros(len(ids), 16)
    rewards.scatter_(1, lengths - 1, torch.randint(2, (len(ids), 1), generator=generator).float())
    return rewards, mask, ids


@pytest.mark.parametrize(
    ("ours", "theirs", "config"),
    [
        ("v05_grpo", "grpo", {}),
        ("v05_grpo", "grpo_vectorized", {}),
        ("v05_grpo", "grpo", {"norm_adv_by_std_in_grpo": False}),
        ("v05_rloo", "rloo", {}),
        ("v05_rloo", "rloo_vectorized", {}),
    ],
)
def test_parity(host, prior, ours, theirs, config):
    for seed in range(5):
        batch = random_batch(seed)
        torch.testing.assert_close(
            host.advantages(ours, *batch, **config), host.advantages(theirs, *batch, **config), rtol=0, atol=1e-5
        )


@pytest.mark.parametrize("case", situations("trajectory"))
def test_situations(host, prior, case):
    from v05.integrations import verl

    if case.method == "dr_grpo":
        estimator, config = "v05_grpo", {"norm_adv_by_std_in_grpo": False}
    else:
        estimator, config = {"v05": "v05", "grpo": "v05_grpo"}[case.method], {}
    prior.rates = case.priors
    verl.PRIORS.open([group for group in case.ids if group != "pad0"], [group for group in case.ids if group != "pad0"])
    config["v05"] = {"reward_range": list(case.reward_range), "leave_one_out": case.leave_one_out}
    advantages = host.advantages(estimator, case.token_rewards, case.mask, case.ids, **config)
    torch.testing.assert_close(advantages, case.expected_tokens, rtol=0, atol=TOLERANCE)


def test_v05_without_a_prior_says_what_to_do(host, prior):
    remedy = r"agent_loop_manager_class=v05\.integrations\.verl_rollout\..* PRIORS\.settle\(Settings\.read\(.*PRIORS\.open\(uids"
    with pytest.raises(ValueError, match=f"prior: none for .*{remedy}"):
        host.advantages("v05", *random_batch(0))


def test_a_manager_of_ones_own_settles_the_prior_of_the_configuration(host, monkeypatch, tmp_path):
    from v05.integrations import verl

    outcomes = tmp_path / "outcomes.jsonl"
    outcomes.write_text(json.dumps({"policy": "p", "prompt": "2+2=", "score": 1.0, "trials": 400}) + "\n")
    config = {"v05": {"outcomes": str(outcomes)}}
    rewards = torch.tensor([[1.0], [1.0]])

    def advantages():
        verl.PRIORS.open(["uid"], ["2+2="])
        return host.advantages("v05", rewards, torch.ones_like(rewards), ["uid"] * 2, **config)

    monkeypatch.setattr(verl, "PRIORS", PromptPriors())
    with pytest.raises(ValueError, match=r"v05\.outcomes='.*outcomes\.jsonl': the prior in PRIORS was made with None; give PRIORS"):
        advantages()
    monkeypatch.setattr(verl, "PRIORS", PromptPriors())
    verl.PRIORS.settle(verl.Settings.read(config["v05"]))
    assert (advantages().abs() < 0.1).all()  # the prior knows that this prompt succeeds
