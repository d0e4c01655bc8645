"""The blocks of docs/integrations.md where their hosts are: Python runs as it stands, options are read as the host reads them."""

import importlib
import inspect
import shlex
import warnings
from importlib.util import find_spec
from types import SimpleNamespace

import pytest

from helpers.documents import ROOT, blocks, make_inputs, run_page

GUIDE = ROOT / "docs" / "integrations.md"
pytestmark = pytest.mark.filterwarnings("default")


def named(path):
    """What slime's options name, found as slime does."""
    module, _, attribute = path.rpartition(".")
    return getattr(importlib.import_module(module), attribute)


def test_slime(monkeypatch):
    yaml = pytest.importorskip("yaml")
    from helpers.host_situations import FixedPrior
    from v05.integrations import slime
    from v05.integrations.groups import PromptPriors

    monkeypatch.setattr(slime, "PRIORS", PromptPriors(FixedPrior()))
    words = shlex.split(blocks(GUIDE, "slime", "sh")[1])
    options = dict(zip(words[::2], words[1::2], strict=True))
    args = SimpleNamespace(reward_key=None, use_rollout_logprobs=False, **yaml.safe_load(blocks(GUIDE, "slime", "yaml")[0]))
    status = SimpleNamespace(value="completed")
    samples = [
        SimpleNamespace(group_index=0, prompt="2+2=", remove_sample=False, status=status, get_reward_value=lambda _, r=reward: r)
        for reward in (1.0, 0.0)
    ]
    raw, advantages = named(options["--custom-reward-post-process-path"])(args, samples)
    assert (raw, advantages) == ([1.0, 0.0], [0.5, -0.5])
    assert callable(named(options["--custom-advantage-function-path"]))


@pytest.fixture
def short_runs(monkeypatch):
    """TRL trains for two steps on the CPU."""
    try:
        from v05.integrations.trl import V05Config
    except ImportError:
        return

    def shorten(config, prepare=V05Config.__post_init__):
        config.max_steps, config.use_cpu, config.max_completion_length, config.report_to = 2, True, 4, []
        prepare(config)

    monkeypatch.setattr(V05Config, "__post_init__", shorten)


@pytest.mark.host
def test_python(tmp_path, monkeypatch, short_runs):
    """TRL's and SkyRL's blocks, in the environment of each."""
    hosts = [host for host in ("trl", "skyrl") if find_spec(host)]
    if not hosts:
        pytest.skip("needs trl or skyrl")
    monkeypatch.chdir(tmp_path)
    make_inputs(tmp_path)
    if "trl" in hosts:
        import datasets

        monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    if "skyrl" in hosts:
        from skyrl.backends.skyrl_train.utils.ppo_utils import AdvantageEstimatorRegistry
        from skyrl.train.entrypoints.main_base import BasePPOExp

        monkeypatch.setattr(AdvantageEstimatorRegistry, "_functions", dict(AdvantageEstimatorRegistry._functions))
        monkeypatch.setattr(BasePPOExp, "get_generator", lambda *_: "SkyRL's")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # TRL's asynchronous trainer says that it is experimental
        namespace, left_out = run_page(GUIDE)
    assert not any(f"needs {host}" in reason for reason in left_out.values() for host in hosts)
    if "trl" in hosts:
        assert namespace["trainer"].state.global_step == 2
        assert_known_to_the_asynchronous_loop(namespace["worker_arguments"], namespace["V05RolloutWorker"])
    if "skyrl" in hosts:
        assert "v05" in AdvantageEstimatorRegistry._functions
        experiment = namespace["Experiment"]
        assert experiment.get_generator(object.__new__(experiment), None, None, None).generator == "SkyRL's"


def assert_known_to_the_asynchronous_loop(arguments, worker):
    import trl.experimental.async_grpo.async_rollout_worker as host

    known = set(inspect.signature(host._AsyncRolloutLoop.__init__).parameters)
    assert set(arguments) <= known | set(inspect.signature(worker._loop_cls.__init__).parameters)


@pytest.mark.host
def test_verl():
    verl = pytest.importorskip("verl", exc_type=ImportError)
    from hydra import compose, initialize_config_dir
    from verl.trainer.ppo.core_algos import get_adv_estimator_fn
    from verl.utils.import_utils import load_class_from_fqn

    from v05.integrations.settings import Settings

    words = shlex.split(blocks(GUIDE, "verl", "sh")[1].replace("\\\n", " "))
    assert words[:3] == ["python", "-m", "verl.trainer.main_ppo"]
    with initialize_config_dir(f"{verl.__path__[0]}/trainer/config", version_base=None):
        config = compose("ppo_trainer", overrides=words[3:])
    assert callable(get_adv_estimator_fn(config.algorithm.adv_estimator))
    assert Settings.read(config.algorithm.v05) == Settings(reward_range=(0.0, 1.0), initial=4)
    manager = load_class_from_fqn(config.actor_rollout_ref.rollout.agent.agent_loop_manager_class, "AgentLoopManager")
    assert manager.__name__ == "SequentialAgentLoopManager"
    assert config.actor_rollout_ref.rollout.n == 16
