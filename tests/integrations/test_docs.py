"""The blocks of docs/hosts/ and docs/losses.md where their host is installed: Python runs, and options are read as the host reads
them.
"""

import copy
import importlib
import inspect
import shlex
import subprocess
import sys
import warnings
from importlib.util import find_spec
from types import SimpleNamespace

import pytest
import torch

from helpers.documents import ROOT, blocks, make_inputs, run_page
from helpers.tiny_policy import tiny_model

HOSTS = ROOT / "docs" / "hosts"
LOSSES = ROOT / "docs" / "losses.md"
pytestmark = pytest.mark.filterwarnings("default")


def named(path):
    """The object that an option of slime names, found as slime finds it."""
    module, _, attribute = path.rpartition(".")
    return getattr(importlib.import_module(module), attribute)


def test_slime(monkeypatch):
    yaml = pytest.importorskip("yaml")
    from helpers.host_situations import FixedPrior
    from v05.integrations import slime
    from v05.integrations.groups import PromptPriors

    monkeypatch.setattr(slime, "PRIORS", PromptPriors(FixedPrior()))
    words = shlex.split(blocks(HOSTS / "slime.md", "sh")[1])
    options = dict(zip(words[::2], words[1::2], strict=True))
    args = SimpleNamespace(reward_key=None, use_rollout_logprobs=False, **yaml.safe_load(blocks(HOSTS / "slime.md", "yaml")[0]))
    status = SimpleNamespace(value="completed")
    samples = [
        SimpleNamespace(group_index=0, prompt="2+2=", remove_sample=False, status=status, get_reward_value=lambda _, r=reward: r)
        for reward in (1.0, 0.0)
    ]
    raw, advantages = named(options["--custom-reward-post-process-path"])(args, samples)
    assert (raw, advantages) == ([1.0, 0.0], [0.5, -0.5])
    assert callable(named(options["--custom-advantage-function-path"]))


@pytest.fixture
def short_runs(tmp_path, monkeypatch):
    """Let TRL train for only two steps, on the CPU."""
    if not find_spec("trl"):
        return
    import datasets
    from trl import GRPOConfig

    def shorten(config, prepare=GRPOConfig.__post_init__):
        config.max_steps, config.use_cpu, config.max_completion_length, config.report_to = 2, True, 4, []
        prepare(config)

    monkeypatch.setattr(GRPOConfig, "__post_init__", shorten)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


@pytest.mark.host
def test_python(tmp_path, monkeypatch, short_runs):
    """The blocks of TRL's and SkyRL's pages run, for the hosts that this environment has."""
    hosts = [host for host in ("trl", "skyrl") if find_spec(host)]
    if not hosts:
        pytest.skip("needs trl or skyrl")
    monkeypatch.chdir(tmp_path)
    make_inputs(tmp_path)
    if "skyrl" in hosts:
        from skyrl.backends.skyrl_train.utils.ppo_utils import AdvantageEstimatorRegistry
        from skyrl.train.entrypoints.main_base import BasePPOExp

        monkeypatch.setattr(AdvantageEstimatorRegistry, "_functions", dict(AdvantageEstimatorRegistry._functions))
        monkeypatch.setattr(BasePPOExp, "get_generator", lambda *_: "SkyRL's")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # TRL warns that its asynchronous trainer is experimental
        pages = {host: run_page(HOSTS / f"{host}.md") for host in hosts}
    assert not any(f"needs {host}" in reason for host, (_, left_out) in pages.items() for reason in left_out.values())
    if "trl" in hosts:
        namespace, _ = pages["trl"]
        assert namespace["trainer"].state.global_step == 2
        assert_known_to_the_asynchronous_loop(namespace["worker_arguments"], namespace["V05RolloutWorker"])
    if "skyrl" in hosts:
        assert "v05" in AdvantageEstimatorRegistry._functions
        experiment = pages["skyrl"][0]["Experiment"]
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

    words = shlex.split(blocks(HOSTS / "verl.md", "sh")[1].replace("\\\n", " "))
    assert words[:3] == ["python", "-m", "verl.trainer.main_ppo"]
    with initialize_config_dir(f"{verl.__path__[0]}/trainer/config", version_base=None):
        config = compose("ppo_trainer", overrides=words[3:])
    assert callable(get_adv_estimator_fn(config.algorithm.adv_estimator))
    assert Settings.read(config.algorithm.v05) == Settings(reward_range=(0.0, 1.0), initial=4)
    manager = load_class_from_fqn(config.actor_rollout_ref.rollout.agent.agent_loop_manager_class, "AgentLoopManager")
    assert manager.__name__ == "SequentialAgentLoopManager"
    assert config.actor_rollout_ref.rollout.n == 16


@pytest.mark.host
def test_the_example_of_a_budget_in_verl(tmp_path):
    verl = pytest.importorskip("verl", exc_type=ImportError)
    from hydra import compose, initialize_config_dir

    from v05.integrations.settings import Settings

    make_inputs(tmp_path)
    script = [sys.executable, ROOT / "examples" / "budget_with_verl.py", "--model", tmp_path / "path" / "to" / "model"]
    printed = subprocess.run([*script, "--out", tmp_path, "--print"], capture_output=True, text=True, check=True).stdout
    with initialize_config_dir(f"{verl.__path__[0]}/trainer/config", version_base=None):
        config = compose("ppo_trainer", overrides=shlex.split(printed)[3:])
    assert Settings.read(config.algorithm.v05) == Settings(reward_range=(0.0, 1.0), initial=4, chunk="look")
    assert config.reward.custom_reward_function.name == "compute_score"


@pytest.mark.host
def test_statistics_in_trl(tmp_path, monkeypatch, short_runs):
    """The page's trainer trains. Its log-probabilities, entropies and gradients equal those of TRL's trainer."""
    trl = pytest.importorskip("trl", exc_type=ImportError)
    monkeypatch.chdir(tmp_path)
    make_inputs(tmp_path)
    namespace, _ = run_page(LOSSES)
    trainer = namespace["trainer"]
    assert trainer.state.global_step == 2
    energies = [entry["energy"] for entry in trainer.state.log_history if "energy" in entry]
    assert energies
    assert all(0 < energy < 2 for energy in energies)

    ids = torch.randint(2, 15, (6, 9), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    mask[0, :3], mask[1, -2:] = 0, 0  # a short prompt and a short completion
    for bf16, tolerance in ((False, 1e-5), (True, 2e-2)):
        args = trl.GRPOConfig(output_dir="runs/bf16", num_generations=8, beta=0.1, bf16=bf16, temperature=0.7)
        made = []
        for kind in (type(trainer), trl.GRPOTrainer):
            other = kind("path/to/model", namespace["correct"], args, trainer.train_dataset)
            logprob, entropy, _ = other._get_per_token_logps_and_entropies(
                other.model, ids, mask, logits_to_keep=5, batch_size=4, compute_entropy=True
            )
            (logprob.exp() + entropy).sum().backward()
            reference = other._get_per_token_logps_and_entropies(other.ref_model, ids, mask, logits_to_keep=5)[0]
            gradients = [parameter.grad for parameter in other.model.parameters()]
            made.append([logprob[mask[:, -5:] == 1], entropy[mask[:, -5:] == 1], reference[mask[:, -5:] == 1], *gradients])
        torch.testing.assert_close(*made, rtol=tolerance, atol=tolerance)


@pytest.fixture
def page_in_verl(monkeypatch):
    """The page's namespace. What the page registers in verl is removed afterwards."""
    pytest.importorskip("verl", exc_type=ImportError)
    from verl.trainer.ppo import core_algos
    from verl.workers.engine import EngineRegistry

    monkeypatch.setattr(core_algos, "POLICY_LOSS_REGISTRY", dict(core_algos.POLICY_LOSS_REGISTRY))
    monkeypatch.setattr(EngineRegistry, "_engines", copy.deepcopy(EngineRegistry._engines))
    return run_page(LOSSES)[0]


@pytest.mark.host
def test_a_loss_in_verl(page_in_verl):
    from verl.trainer.ppo.core_algos import get_policy_loss_fn
    from verl.workers.config import ActorConfig

    generator = torch.Generator().manual_seed(0)
    mask = torch.arange(9) < torch.tensor([[9], [2], [0], [5]])
    mask[0, 0] = False
    old, step = -torch.rand(4, 9, generator=generator), 0.3 * torch.randn(4, 9, generator=generator)
    config = ActorConfig(strategy="fsdp", rollout_n=1, ppo_micro_batch_size_per_gpu=1, clip_ratio_high=0.28, clip_ratio_c=1e6)
    config.global_batch_info.update(dp_size=2, batch_num_tokens=40, global_batch_size=8)
    made = []
    for name in ("v05_dapo", "vanilla"):
        new = (old + step).requires_grad_()
        advantages = torch.tensor([[1.0], [-0.5], [2.0], [0.7]]) * mask
        loss, logged = get_policy_loss_fn(name)(old, new, advantages, mask, "token-mean", config)
        loss.backward()
        made.append([loss.detach(), new.grad, logged["actor/pg_clipfrac"], logged["actor/ppo_kl"]])
    torch.testing.assert_close(*made, rtol=1e-6, atol=1e-6)


@pytest.mark.host
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_sums_of_squares_in_verl(page_in_verl, monkeypatch, temperature):
    """The page's engine gives the same values and gradients as verl's engine, which computes them from logits."""
    from tensordict import TensorDict
    from verl.utils import tensordict_utils as tu
    from verl.utils.torch_functional import entropy_from_logits
    from verl.workers.engine import EngineRegistry
    from verl.workers.engine.fsdp import transformer_impl

    monkeypatch.setattr(transformer_impl.FSDPEngine, "_build_module", lambda _: tiny_model())
    monkeypatch.setenv("VERL_ENGINE_DEVICE", "cuda")
    monkeypatch.setenv("VERL_ENGINE_VENDOR", "nvidia")
    own = transformer_impl.FSDPEngineWithLMHead
    assert EngineRegistry.get_engine_cls("language_model", "fsdp2") is page_in_verl["Engine"] is not own
    sequences = [torch.tensor([2, 5, 7, 1]), torch.tensor([3, 4, 9, 8, 6, 1])]
    positions = [torch.arange(len(sequence)) for sequence in sequences]
    made = []
    for kind, fused in ((page_in_verl["Engine"], True), (own, False)):
        engine = object.__new__(kind)
        engine.pad_to_length = engine.use_ulysses_sp = False
        engine.model_config = SimpleNamespace(use_fused_kernels=fused)
        engine.engine_config = SimpleNamespace(entropy_checkpointing=False, entropy_from_logits_with_chunking=False)
        engine.compute_entropy_from_logits = entropy_from_logits
        engine.module = engine._build_module()
        batch = TensorDict(
            {
                "input_ids": torch.nested.nested_tensor(sequences, layout=torch.jagged),
                "position_ids": torch.nested.nested_tensor(positions, layout=torch.jagged),
            },
            batch_size=[2],
        )
        flags = {
            "temperature": temperature,
            "use_fused_kernels": fused,
            "calculate_entropy": True,
            "calculate_sum_pi_squared": True,
        }
        tu.assign_non_tensor(batch, **flags)
        inputs, arguments = engine.prepare_model_inputs(batch)
        output = engine.prepare_model_outputs(engine.module(**inputs, use_cache=False), arguments, batch, None)
        values = [output[name].values() for name in ("log_probs", "entropy", "sum_pi_squared")]
        (values[0].exp() + values[1]).sum().backward()
        made.append([*values, *(parameter.grad for parameter in engine.module.parameters())])
    torch.testing.assert_close(*made, rtol=1e-5, atol=1e-5)
