"""The recipe's configuration as verl composes and checks it: the printed commands run up to the point where they need a GPU."""

import dataclasses
import json
import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from v05.integrations.settings import Settings

pytest.importorskip("verl", exc_type=ImportError)
pytestmark = [pytest.mark.host, pytest.mark.filterwarnings("default")]
ROOT = Path(__file__).parents[2]
ADDED = {  # verl reads these, but its own configuration does not list them
    "algorithm.v05",
    "actor_rollout_ref.rollout.agent.agent_loop_manager_class",
    "reward.reward_kwargs",
}


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A tiny model, and data in the form that the recipe writes."""
    from helpers.tiny_policy import tiny_model, tiny_tokenizer

    folder = tmp_path_factory.mktemp("made")
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = "{% for message in messages %}{{ message['content'] }} {% endfor %}"
    tokenizer.save_pretrained(folder / "model")
    tiny_model().save_pretrained(folder / "model")
    row = {"data_source": "math_dapo", "prompt": [{"role": "user", "content": "2+2="}], "ability": "MATH"}
    row |= {"reward_model": {"style": "rule", "ground_truth": "4"}, "extra_info": {"index": 0}}
    for name in ("train", "validation"):
        (folder / "data").mkdir(exist_ok=True)
        (folder / "data" / f"{name}.jsonl").write_text(json.dumps(row) + "\n")
    return folder


@pytest.fixture(scope="module", params=["v05", "grpo", "dapo"])
def composed(request, made):
    """A method's name, and the configuration that hydra composes from the script's printed command."""
    from omegaconf import OmegaConf

    environment = {**os.environ, "OUT": str(made), "MODEL": str(made / "model")}
    script = [ROOT / "examples" / "paper_qwen3_4b.sh", "--dry-run", "train", request.param]
    printed = subprocess.run(script, capture_output=True, text=True, check=True, env=environment).stdout.splitlines()[-1]
    words = shlex.split(printed)
    assert words[2:5] == ["python", "-m", "verl.trainer.main_ppo"]
    command = [sys.executable, "-W", "ignore", *words[3:], "--cfg", "job"]
    out = subprocess.run(command, capture_output=True, text=True)
    assert out.returncode == 0, out.stderr
    return request.param, OmegaConf.create(out.stdout[out.stdout.index("actor_rollout_ref:") :])


def paths(config, prefix=""):
    """The dotted names of all values in a configuration."""
    for name, value in config.items():
        if isinstance(value, dict) and value:
            yield from paths(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}"


def test_every_key_is_one_that_verl_knows(composed):
    import verl
    from omegaconf import OmegaConf

    _, config = composed
    base = OmegaConf.load(f"{verl.__path__[0]}/trainer/config/_generated_ppo_trainer.yaml")
    known = set(paths(OmegaConf.to_container(base, resolve=False)))
    new = {name for name in paths(OmegaConf.to_container(config, resolve=False)) if name not in known}
    assert {name for name in new if not any(name == added or name.startswith(f"{added}.") for added in ADDED)} == set()


def test_verl_accepts_it(composed):
    """verl's own checks pass, and its conversions to the workers' configurations work."""
    from verl.trainer.ppo.core_algos import get_adv_estimator_fn
    from verl.trainer.ppo.utils import need_critic, need_reference_policy
    from verl.utils.config import omega_conf_to_dataclass, validate_config
    from verl.utils.import_utils import load_class_from_fqn

    method, config = composed
    assert not need_critic(config)
    assert not need_reference_policy(config)
    validate_config(config, use_reference_policy=False, use_critic=False)
    rollout = omega_conf_to_dataclass(config.actor_rollout_ref.rollout)
    actor = omega_conf_to_dataclass(config.actor_rollout_ref.actor)
    assert dataclasses.is_dataclass(omega_conf_to_dataclass(config.actor_rollout_ref.model))
    assert rollout.n == 16
    assert (actor.clip_ratio_low, actor.clip_ratio_high) == (0.2, 0.2 if method == "grpo" else 0.28)
    assert (actor.optim.lr, actor.optim.lr_warmup_steps, actor.optim.weight_decay) == (1e-6, 10, 0.1)
    gpus = config.trainer.nnodes * config.trainer.n_gpus_per_node
    assert gpus == 32
    assert actor.ppo_mini_batch_size * rollout.n % gpus == 0
    assert callable(get_adv_estimator_fn(config.algorithm.adv_estimator))
    assert config.algorithm.filter_groups.enable == (method == "dapo")
    if method == "v05":
        manager = load_class_from_fqn(config.actor_rollout_ref.rollout.agent.agent_loop_manager_class, "AgentLoopManager")
        assert manager.__name__ == "SequentialAgentLoopManager"
        settings = Settings.read(config.algorithm.v05)
        assert (settings.reward_range, settings.initial, settings.prior) == ((-1.0, 1.0), 4, "v0")
        assert settings.outcomes == config.trainer.default_local_dir.removesuffix("v05") + "context/outcomes.jsonl"
        assert settings.learnt == config.trainer.default_local_dir + "/prior.safetensors"


def test_its_data_and_rewards(composed, made):
    """verl's data set reads the files. Its reward managers accept a boxed answer, and their rewards lie in v05's range."""
    import asyncio

    import numpy as np
    import torch
    from tensordict import TensorDict
    from transformers import AutoTokenizer
    from verl import DataProto
    from verl.trainer.ppo.reward import load_reward_manager
    from verl.trainer.ppo.utils import create_rl_dataset
    from verl.utils.reward_score import default_compute_score

    method, config = composed
    tokenizer = AutoTokenizer.from_pretrained(made / "model")
    rows = create_rl_dataset(config.data.train_files, config.data, tokenizer, None)
    assert rows[0]["raw_prompt"] == [{"role": "user", "content": "2+2="}]
    assert default_compute_score("math_dapo", "so it is \\boxed{4}", "4")["score"] == 1.0
    assert default_compute_score("aime24", "so it is \\boxed{5}", "4")["score"] == -1.0

    async def reward(length):
        manager = load_reward_manager(config, tokenizer)
        batch = TensorDict(
            {"responses": torch.full((1, length), 2), "attention_mask": torch.ones(1, length, dtype=torch.long)}, [1]
        )
        columns = {"data_source": "math_dapo", "reward_model": {"ground_truth": "4"}, "extra_info": {}}
        others = {name: np.array([value, None], dtype=object)[:1] for name, value in columns.items()}
        return (await manager.run_single(DataProto(batch=batch, non_tensor_batch=others)))["reward_score"]

    assert float(asyncio.run(reward(10))) == -1.0
    assert float(asyncio.run(reward(8192))) == (-2.0 if method == "dapo" else -1.0)
