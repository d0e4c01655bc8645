"""The sequential agent loop manager with verl's workers and TransferQueue, a fake LLM server and a fake reward worker, on a local
Ray. `make test-integrations` installs them. The trainer needs GPUs, so its steps from sampling to advantages are written out here.
"""

import json
import time
from pathlib import Path

import numpy as np
import pytest

from helpers import verl_fakes
from helpers.host_situations import FixedPrior
from helpers.verl_fakes import FakeRewards, FakeServer
from v05.integrations.groups import PromptPriors

pytest.importorskip("verl", exc_type=ImportError)
pytest.importorskip("transfer_queue", exc_type=ImportError)
pytestmark = [pytest.mark.host, pytest.mark.filterwarnings("default")]
PATIENCE = 300  # seconds until all groups must be there
PROMPTS = {"sure": 0.95, "hopeless": 0.95, "fair": 0.5, "broken": 0.5}  # the prior of each prompt


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    """verl's defaults, a small model, and the settings that a user of v05 makes."""
    import verl
    from omegaconf import OmegaConf

    from helpers.tiny_policy import tiny_model, tiny_tokenizer

    folder = tmp_path_factory.mktemp("model")
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = "{% for message in messages %}{{ message['content'] }} {% endfor %}"
    tokenizer.save_pretrained(folder)
    tiny_model().save_pretrained(folder)
    config = OmegaConf.load(f"{verl.__path__[0]}/trainer/config/_generated_ppo_trainer.yaml")
    return OmegaConf.merge(
        config,
        {
            "actor_rollout_ref": {
                "model": {"path": str(folder)},
                "rollout": {
                    "name": "vllm",
                    "n": 8,
                    "prompt_length": 8,
                    "response_length": 4,
                    "agent": {
                        "num_workers": 1,
                        "agent_loop_manager_class": "v05.integrations.verl_rollout.SequentialAgentLoopManager",
                    },
                },
            },
            "transfer_queue": {"backend": {"SimpleStorage": {"num_data_storage_units": 1}}},
            "algorithm": {"adv_estimator": "v05", "v05": {"reward_range": [-1, 1], "initial": 2}},
        },
    )


@pytest.fixture(scope="module")
def manager(config):
    import ray
    import transfer_queue as tq
    from verl.utils.import_utils import load_class_from_fqn

    path = {"PYTHONPATH": str(Path(verl_fakes.__file__).parents[1])}
    # Actors claim some cores each, and Ray does not check that the machine has 16.
    ray.init(num_cpus=16, include_dashboard=False, runtime_env={"env_vars": path})
    tq.init(config.transfer_queue)
    name = config.actor_rollout_ref.rollout.agent.agent_loop_manager_class
    yield load_class_from_fqn(name, "AgentLoopManager").create(
        config=config, llm_client=FakeServer(), reward_loop_worker_handles=[ray.remote(FakeRewards).remote()]
    )
    tq.close()
    ray.shutdown()


def draw(manager, prompts, prefix="uid", **more):
    """Submit prompts as verl's trainer does, and wait for their groups. Returns the uid of each prompt, and all keys with their
    tags.
    """
    import transfer_queue as tq
    from verl.utils import tensordict_utils as tu

    uids = [f"{prefix}-{prompt}" for prompt in prompts]
    batch = tu.get_tensordict(
        {
            "uid": np.array(uids, dtype=object),
            "raw_prompt": np.array([[{"role": "user", "content": prompt}] for prompt in prompts] + [None], dtype=object)[:-1],
            "index": np.arange(len(prompts)),
        }
    )
    tu.assign_non_tensor_data(batch, "global_steps", 1)
    for name, value in more.items():
        tu.assign_non_tensor_data(batch, name, value)
    partition = "val" if more.get("validate") else "train"
    tags = [{"is_prompt": True, "status": "pending", "global_steps": 1}] * len(uids)
    tq.kv_batch_put(keys=uids, partition_id=partition, tags=tags)
    manager.generate_sequences(batch)
    deadline = time.monotonic() + PATIENCE
    while True:
        items = tq.kv_list(partition)[partition]
        if all(items[uid]["status"] in ("finished", "failure") for uid in uids):
            return dict(zip(prompts, uids, strict=True)), items
        assert time.monotonic() < deadline, items
        time.sleep(0.1)


@pytest.fixture(scope="module")
def drawn(manager):
    from v05.integrations import verl

    prior = FixedPrior(PROMPTS)
    verl.PRIORS.prior = prior
    uids, items = draw(manager, list(PROMPTS))
    yield prior, uids, items
    verl.PRIORS = PromptPriors()


def sessions(uid, items):
    return sorted(key for key in items if key.startswith(f"{uid}_"))


def test_prompts_get_the_rollouts_they_need(drawn):
    _, uids, items = drawn
    assert len(sessions(uids["sure"], items)) == 2  # as predicted: only the initial ones
    assert len(sessions(uids["hopeless"], items)) == 8  # against the prediction: up to rollout.n
    assert 2 <= len(sessions(uids["fair"], items)) <= 8
    assert {uid: items[uid]["status"] for uid in uids.values()} == {
        uid: "failure" if prompt == "broken" else "finished" for prompt, uid in uids.items()
    }


def test_the_trainer_gets_v05s_advantages(drawn, config):
    """verl's trainer adds padding rows to these groups before it computes advantages."""
    import transfer_queue as tq
    from verl import DataProto
    from verl.trainer.ppo.v1.utils import compute_advantage_for_multi_trajectories

    prior, uids, items = drawn
    keys = [key for prompt in ("sure", "hopeless", "fair") for key in sessions(uids[prompt], items)]
    data = tq.kv_batch_get(keys=keys, partition_id="train", select_fields=["uid", "response_mask", "rm_scores"])
    data = DataProto(batch=data.to_padded_tensor())
    data.non_tensor_batch["uid"] = np.array(data.batch.pop("uid").tolist(), dtype=object)
    data.batch["token_level_rewards"] = data.batch["rm_scores"]
    batch = DataProto.concat([data, data[:1]])
    batch.non_tensor_batch["uid"][-1] = "pad0"
    keys.append("pad0_0_0")
    compute_advantage_for_multi_trajectories(batch, keys, "v05", config=config.algorithm)
    advantages = batch.batch["advantages"]
    assert advantages.shape == (len(keys), 3)
    assert advantages[:2].flatten().tolist() == pytest.approx([0.1] * 6)  # reward 1 minus the prior 0.9
    assert (advantages[2:10] < 0).all()
    assert (advantages[-1] == 0).all()
    fair = len(keys) - 11
    assert prior.learnt == {"sure": (2, 2), "hopeless": (0, 8), "fair": (fair // 2 + fair % 2, fair)}


@pytest.fixture
def calibrated(config, manager, monkeypatch):
    """A second manager on the first one's Ray, with another estimator, and its configuration."""
    import ray
    from omegaconf import OmegaConf

    from v05.integrations import verl, verl_rollout

    priors = PromptPriors(FixedPrior(PROMPTS))
    monkeypatch.setattr(verl, "PRIORS", priors)
    monkeypatch.setattr(verl_rollout, "PRIORS", priors)
    more = {"unbiased": True, "group_weighting": "prompt"}
    changed = OmegaConf.merge(config, {"algorithm": {"adv_estimator": "v05_calibrated", "v05": more}})
    workers = [ray.remote(FakeRewards).remote()]
    made = verl_rollout.SequentialAgentLoopManager.create(
        config=changed, llm_client=FakeServer(), reward_loop_worker_handles=workers
    )
    return made, changed


def test_calibrated_rounds_may_be_unbiased(calibrated):
    """The workers stop groups by the calibration that they are sent, and the estimator counts paths by the same one."""
    import transfer_queue as tq
    from verl import DataProto
    from verl.trainer.ppo import ray_trainer

    from v05.methods import Calibration
    from v05.path_counting import path_counting_advantages

    made, changed = calibrated
    made._estimator.calibrator.calibration = Calibration(0.3, 1.1, 6.0, 0.05)
    prompts = [prompt for prompt in PROMPTS if prompt != "broken"]
    uids, items = draw(made, prompts, prefix="calibrated")
    keys = [key for prompt in prompts for key in sessions(uids[prompt], items)]
    data = tq.kv_batch_get(keys=keys, partition_id="train", select_fields=["uid", "response_mask", "rm_scores"])
    data = DataProto(batch=data.to_padded_tensor())
    data.non_tensor_batch["uid"] = np.array(data.batch.pop("uid").tolist(), dtype=object)
    data.batch["token_level_rewards"] = data.batch["rm_scores"]
    ray_trainer.compute_advantage(data, "v05_calibrated", config=changed.algorithm)
    for prompt in prompts:
        rows = [i for i, key in enumerate(keys) if key.startswith(f"{uids[prompt]}_")]
        rewards = data.batch["rm_scores"][rows].sum(-1).double().numpy()
        wanted = path_counting_advantages(
            rewards,
            [2 * PROMPTS[prompt] - 1],
            [0, len(rows)],
            method="calibrated",
            initial=2,
            maximum=8,
            calibration=Calibration(0.3, 1.1, 6.0, 0.05),
            reward_range=(-1.0, 1.0),
        )
        assert data.batch["advantages"][rows, 0].tolist() == pytest.approx((wanted * 2 / len(rows)).tolist(), abs=1e-6)


def test_validation_is_verls(manager):
    uids, items = draw(manager, ["sure"], validate=True)
    assert len(sessions(uids["sure"], items)) == 1  # val_kwargs.n


def test_rewards_that_come_after_the_rollouts_are_refused(config):
    from v05.integrations.verl_rollout import SequentialAgentLoopManager

    with pytest.raises(ValueError, match=r"enable_resource_pool=False: V_0\.5 tests rewards while it samples"):
        SequentialAgentLoopManager(config, FakeServer())


def test_settings_out_of_bounds_are_refused_before_anything_is_sampled(config):
    from omegaconf import OmegaConf

    from v05.integrations.verl_rollout import SequentialAgentLoopManager

    for changed, message in (({"initial": 0}, "initial=0"), ({"chunk": 0}, "chunk=0"), ({"inital": 2}, r"v05\.inital=2 is not")):
        with pytest.raises(ValueError, match=message):
            SequentialAgentLoopManager(OmegaConf.merge(config, {"algorithm": {"v05": changed}}), FakeServer())


def test_the_settings_say_what_the_prior_is_and_has_learnt(config, tmp_path, monkeypatch):
    from omegaconf import OmegaConf

    from v05.integrations import verl_rollout

    def refused(message, **changed):
        monkeypatch.setattr(verl_rollout, "PRIORS", PromptPriors())
        with pytest.raises(ValueError, match=message):
            verl_rollout.SequentialAgentLoopManager(OmegaConf.merge(config, {"algorithm": {"v05": changed}}), FakeServer())

    refused("backbone=absent: no config.json there", prior="v0", backbone="absent")
    rows = [
        {"policy": "p", "prompt": prompt, "score": score, "trials": 16} for prompt, score in (("sure", 1.0), ("hopeless", -1.0))
    ]
    (tmp_path / "outcomes.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    refused(
        "enable_resource_pool=False", outcomes=str(tmp_path / "outcomes.jsonl")
    )  # no reward workers: refused, but only after the prior is settled
    sure, hopeless = verl_rollout.PRIORS.prior.predict(["sure", "hopeless"])
    assert sure > 0.7
    assert hopeless < 0.3
