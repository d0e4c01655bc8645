"""Every block of docs/integrations.md, executed: Python as it stands with its paths made real, commands as the host reads them."""

import importlib
import re
import shlex
import warnings
from pathlib import Path
from types import SimpleNamespace

import pytest

GUIDE = (Path(__file__).parents[2] / "docs" / "integrations.md").read_text()
pytestmark = pytest.mark.filterwarnings("default")


def blocks(section, language):
    """The code blocks of one section, in order."""
    (text,) = re.findall(rf"^## {section}\n(.*?)(?=^## |\Z)", GUIDE, flags=re.DOTALL | re.MULTILINE)
    return re.findall(rf"```{language}\n(.*?)```", text, flags=re.DOTALL)


def run(code):
    namespace = {}
    exec(compile(code, "docs/integrations.md", "exec"), namespace)
    return namespace


def named(path):
    """What slime's options name, found as slime does."""
    module, _, attribute = path.rpartition(".")
    return getattr(importlib.import_module(module), attribute)


def test_slime(monkeypatch):
    yaml = pytest.importorskip("yaml")
    from host_situations import FixedPrior

    from v05.integrations import slime
    from v05.integrations.groups import PromptPriors

    monkeypatch.setattr(slime, "PRIORS", PromptPriors(FixedPrior()))
    words = shlex.split(blocks("slime", "sh")[0])
    options = dict(zip(words[::2], words[1::2], strict=True))
    args = SimpleNamespace(reward_key=None, use_rollout_logprobs=False, **yaml.safe_load(blocks("slime", "yaml")[0]))
    status = SimpleNamespace(value="completed")
    samples = [
        SimpleNamespace(group_index=0, prompt="2+2=", remove_sample=False, status=status, get_reward_value=lambda _, r=reward: r)
        for reward in (1.0, 0.0)
    ]
    raw, advantages = named(options["--custom-reward-post-process-path"])(args, samples)
    assert (raw, advantages) == ([1.0, 0.0], [0.5, -0.5])
    assert callable(named(options["--custom-advantage-function-path"]))


@pytest.mark.host
def test_trl(tmp_path, monkeypatch):
    pytest.importorskip("trl", exc_type=ImportError)
    import datasets
    from tiny_policy import tiny_model, tiny_tokenizer

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    tiny_model().save_pretrained(tmp_path / "model")
    tiny_tokenizer().save_pretrained(tmp_path / "model")
    lines = [f'{{"prompt": "{a}+{b}=", "answer": "{a + b}"}}\n' for a in range(5) for b in range(5)]
    (tmp_path / "tasks.jsonl").write_text("".join(lines))
    code = blocks("TRL", "python")[0]
    for written, real in (
        ("path/to/model", str(tmp_path / "model")),
        ("tasks.jsonl", str(tmp_path / "tasks.jsonl")),
        ("runs/trl", str(tmp_path / "run")),
        ("max_steps=200", "max_steps=2, use_cpu=True, max_completion_length=4, report_to=[]"),
    ):
        assert written in code
        code = code.replace(written, real)
    assert run(code)["trainer"].state.global_step == 2


@pytest.mark.host
def test_trl_async():
    pytest.importorskip("trl", exc_type=ImportError)
    import inspect

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        namespace = run(blocks("TRL", "python")[1])
    import trl.experimental.async_grpo.async_rollout_worker as host

    known = set(inspect.signature(host._AsyncRolloutLoop.__init__).parameters)
    known |= set(inspect.signature(namespace["V05RolloutWorker"]._loop_cls.__init__).parameters)
    assert set(namespace["worker_arguments"]) <= known


@pytest.mark.host
def test_verl():
    verl = pytest.importorskip("verl", exc_type=ImportError)
    from hydra import compose, initialize_config_dir
    from verl.trainer.ppo.core_algos import get_adv_estimator_fn
    from verl.utils.import_utils import load_class_from_fqn

    from v05.integrations.groups import Settings

    words = shlex.split(blocks("verl", "sh")[1].replace("\\\n", " "))
    assert words[:3] == ["python", "-m", "verl.trainer.main_ppo"]
    with initialize_config_dir(f"{verl.__path__[0]}/trainer/config", version_base=None):
        config = compose("ppo_trainer", overrides=words[3:])
    assert callable(get_adv_estimator_fn(config.algorithm.adv_estimator))
    assert Settings.read(config.algorithm.v05) == Settings(reward_range=(0.0, 1.0), initial=4)
    manager = load_class_from_fqn(config.actor_rollout_ref.rollout.agent.agent_loop_manager_class, "AgentLoopManager")
    assert manager.__name__ == "SequentialAgentLoopManager"
    assert config.actor_rollout_ref.rollout.n == 16


@pytest.mark.host
def test_skyrl(monkeypatch):
    ppo_utils = pytest.importorskip("skyrl.backends.skyrl_train.utils.ppo_utils", exc_type=ImportError)
    from skyrl.train.entrypoints.main_base import BasePPOExp

    monkeypatch.setattr(ppo_utils.AdvantageEstimatorRegistry, "_functions", dict(ppo_utils.AdvantageEstimatorRegistry._functions))
    monkeypatch.setattr(BasePPOExp, "get_generator", lambda *_: "SkyRL's")
    experiment = run(blocks("SkyRL", "python")[0])["Experiment"]
    assert "v05" in ppo_utils.AdvantageEstimatorRegistry._functions
    assert experiment.get_generator(object.__new__(experiment), None, None, None).generator == "SkyRL's"
