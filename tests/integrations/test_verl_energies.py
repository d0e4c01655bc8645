"""Energies in verl: the steps of its trainer from sampling to advantages, on rollouts in its TransferQueue and a local Ray. `make
test-integrations` installs them.
"""

from dataclasses import astuple
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from helpers.host_situations import FixedPrior
from v05.energy import completion_energy
from v05.integrations.groups import PromptPriors
from v05.integrations.settings import Settings
from v05.methods import find_method
from v05.prior.calibration import Calibrator

pytest.importorskip("verl", exc_type=ImportError)
tq = pytest.importorskip("transfer_queue", exc_type=ImportError)
pytestmark = [pytest.mark.host, pytest.mark.filterwarnings("default")]
PAD = f"pad{'0f' * 16}"


@pytest.fixture(scope="module")
def config():
    """verl's defaults, but log-probabilities of the rollouts are not recomputed, because that needs the policy."""
    import verl
    from omegaconf import OmegaConf

    config = OmegaConf.load(f"{verl.__path__[0]}/trainer/config/_generated_ppo_trainer.yaml")
    return OmegaConf.merge(config, {"algorithm": {"rollout_correction": {"bypass_mode": True}}})


@pytest.fixture(scope="module")
def queue():
    import ray
    from omegaconf import OmegaConf

    ray.init(num_cpus=4, include_dashboard=False)
    tq.init(OmegaConf.create({"backend": {"SimpleStorage": {"num_data_storage_units": 1}}}))
    yield
    tq.close()
    ray.shutdown()


@pytest.fixture
def priors(monkeypatch):
    from v05.integrations import verl

    priors = PromptPriors(FixedPrior({f"prompt {g}": 0.1 + 0.08 * (g % 11) for g in range(100)}))
    monkeypatch.setattr(verl, "PRIORS", priors)
    return priors


class Rollouts:
    """100 groups of four rollouts in shuffled order. Tokens of successes are more likely than those of failures.

    Attributes:
        told_apart: the rollouts of a group have different lengths.
    """

    def __init__(self, prefix, seed, told_apart):
        generator = np.random.default_rng(seed)
        sessions = generator.permutation(400)
        self.uids = [f"{prefix}-{session // 4}" for session in sessions]
        self.keys = [f"{uid}_{session % 4}_0" for uid, session in zip(self.uids, sessions, strict=True)]
        lengths = 2 + (2 * (sessions % 4) if told_apart else generator.integers(2, size=400))
        self.rewards = np.where(generator.random(400) < 0.4, 1.0, -1.0)
        self.masks = [torch.ones(length, dtype=torch.int64) for length in lengths]
        for mask in self.masks[::5]:
            mask[-1] = 0  # a tool's token
        self.logprobs = [
            torch.tensor(-generator.exponential(0.2 if reward > 0 else 2.0, length), dtype=torch.float32)
            for reward, length in zip(self.rewards, lengths, strict=True)
        ]
        self.energies = [completion_energy(p[mask != 0]) for p, mask in zip(self.logprobs, self.masks, strict=True)]

    def put(self):
        """Put the rollouts into the queue as verl's workers do, group by group, with a row of padding. Returns the keys of the
        batch.
        """
        from verl.utils.tensordict_utils import list_of_dict_to_tensordict

        rows = sorted(zip(self.keys, self.uids, self.masks, self.rewards, self.logprobs, strict=True), key=lambda row: row[0])
        rows.append((f"{PAD}_0_0", PAD, torch.zeros(1, dtype=torch.int64), 0.0, torch.zeros(1)))
        fields = [
            {
                "uid": uid,
                "response_mask": mask,
                "rm_scores": torch.nn.functional.one_hot(torch.tensor(len(mask) - 1), len(mask)) * torch.tensor(reward).float(),
                "rollout_log_probs": logprobs,
            }
            for _, uid, mask, reward, logprobs in rows
        ]
        tags = [{"status": "success"}] * len(rows)
        tq.kv_batch_put(keys=[row[0] for row in rows], partition_id="train", fields=list_of_dict_to_tensordict(fields), tags=tags)
        return [rows[-1][0], *self.keys]


def trainers_advantages(config, estimator, keys):
    """The advantages that verl's trainer writes into the queue, by key."""
    from omegaconf import OmegaConf
    from verl.trainer.ppo.v1 import PPOTrainer

    changed = OmegaConf.merge(config, {"algorithm": {"adv_estimator": estimator, "v05": {"reward_range": [-1, 1]}}})
    trainer, batch = SimpleNamespace(config=changed), tq.KVBatchMeta(partition_id="train", keys=keys, tags=[{}] * len(keys))
    batch = PPOTrainer._compute_old_log_prob(trainer, batch, {})
    PPOTrainer._compute_advantage(trainer, batch, {})
    advantages = tq.kv_batch_get(keys=keys, partition_id="train", select_fields=["advantages"])["advantages"]
    return dict(zip(keys, advantages.unbind(), strict=True))


@pytest.mark.parametrize("method", ["optimal", "otb", "batch_energy"])
def test_energies_reach_the_advantages_and_the_calibration(config, queue, priors, method):
    """In the second of two steps, the energies learnt in the first change the baselines. Even if verl cannot tell the rollouts of a
    group apart, methods that sum energies over a group's successes and failures give the same result.
    """
    calibrator = Calibrator()
    reference = Settings(method, reward_range=(-1.0, 1.0)).estimator(priors.prior, calibrator)
    for step in range(2):
        drawn = Rollouts(f"{method}-{step}", step, told_apart=method == "batch_energy")
        groups = list(dict.fromkeys(drawn.uids))
        texts = [f"prompt {group.rsplit('-')[-1]}" for group in groups]
        rates = priors.open(groups, texts)
        keys = drawn.put()
        found = trainers_advantages(config, f"v05_{method}", keys)
        estimate = reference.advantages(drawn.rewards, rates, group_ids=drawn.uids, energy=drawn.energies)
        for key, mask, advantage in zip(drawn.keys, drawn.masks, estimate.advantages, strict=True):
            torch.testing.assert_close(found[key], advantage * mask, rtol=0, atol=1e-5)
        reference.close(texts, rates, *reference.outcomes(estimate.stats), estimate.energies)
        tq.kv_clear(keys=keys, partition_id="train")
    if find_method(method).learns_energies:
        learnt = priors.settle(Settings(method)).calibrator
        np.testing.assert_allclose(learnt.state_dict()["energies"], calibrator.state_dict()["energies"], rtol=1e-12)
        assert learnt.calibration.delta1 != 0.0
        assert astuple(learnt.calibration) == pytest.approx(astuple(calibrator.calibration))


def test_rollouts_that_the_queue_does_not_have_leave_the_batch_without_energies(config, queue, priors, caplog):
    from v05.integrations.verl_energies import batch_energies

    drawn = Rollouts("lost", 0, told_apart=True)
    keys = drawn.put()
    trainers_advantages(config, "v05_none", keys)
    rewards, mask = torch.tensor(drawn.rewards)[:, None], torch.ones(400, 1)
    assert (batch_energies(rewards, mask, drawn.uids) > 0).all()
    tq.kv_clear(keys=[drawn.keys[7]], partition_id="train")
    assert batch_energies(rewards, mask, drawn.uids) is None
    assert "the queue has 399 rollouts of the 400 in the batch" in caplog.text
    tq.kv_clear(keys=[key for key in keys if key != drawn.keys[7]], partition_id="train")
    assert batch_energies(rewards, mask, drawn.uids) is None
