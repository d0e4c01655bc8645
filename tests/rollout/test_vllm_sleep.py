"""vLLM sleeps while the trainer computes gradients: the order of the calls, on a double of vLLM (tests/helpers/vllm_double.py).

tests/rollout/test_vllm_engine.py has a run on vLLM itself, tests/gpu/test_vllm_sleep.py what sleeping frees on a GPU.
"""

import copy
import json

import pytest
import torch
from transformers import GenerationConfig

from helpers import vllm_double
from v05.rollout import Completion, Request, SleepingEngine, generate
from v05.rollout.transformers_engine import TransformersEngine
from v05.rollout.vllm_engine import VllmEngine
from v05.train.config import EngineConfig, RunConfig
from v05.train.metrics import read_metrics
from v05.train.policy import load_policy
from v05.train.presets import run_config
from v05.train.trainer import Trainer

WANTED = [Request((5, 6), seed) for seed in range(3)]


class Tokenizer:
    eos_token_id = vllm_double.END

    def decode(self, tokens, skip_special_tokens):
        return " ".join(map(str, tokens))


@pytest.fixture
def engine_of(monkeypatch, tmp_path):
    """engine_of(sleep=2): a VllmEngine on the double, whose calls are engine._engine.calls."""
    vllm_double.install(monkeypatch)
    monkeypatch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "0")  # the engine sets both; the test takes them back
    monkeypatch.setenv("VLLM_LOGGING_LEVEL", "WARNING")
    GenerationConfig(eos_token_id=vllm_double.END).save_pretrained(tmp_path)
    return lambda **settings: VllmEngine(tmp_path, Tokenizer(), max_new_tokens=4, capacity=2, **settings)


def weights(token):
    return iter([("weight", torch.tensor(token))])


def tokens_of(completions):
    return {completion.tokens.tolist()[0] for completion in completions}


@pytest.mark.parametrize("level", [1, 2])
def test_weights_wake_first_and_keys_and_values_when_they_are_loaded(engine_of, level, monkeypatch):
    engine = engine_of(sleep=level)
    calls = engine._engine.calls
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: calls.append(("empty_cache",)))
    assert engine._engine.arguments.enable_sleep_mode
    engine.update_weights(weights(7))  # the first, before the engine ever slept
    assert tokens_of(generate(engine, WANTED)) == {7}
    assert calls[:2] == [("reload_weights",), ("reset_prefix_cache",)]
    calls.clear()
    engine.sleep()
    engine.update_weights(weights(8))
    assert tokens_of(generate(engine, WANTED)) == {8}
    assert calls[:-2] == [
        ("sleep", level),
        ("empty_cache",),
        ("wake_up", ["weights"]),
        ("reload_weights",),
        ("wake_up", ["kv_cache"]),
        ("reset_prefix_cache",),
    ]
    assert calls[-2:] == [("sample", 8)] * 2  # three requests, two at once


def test_nothing_is_sampled_asleep(engine_of):
    engine = engine_of(sleep=2)
    engine.sleep()
    with pytest.raises(RuntimeError, match="the vLLM engine is asleep and samples nothing; update_weights wakes it"):
        engine.submit([0], WANTED[:1])
    assert engine.poll() == []
    assert engine._engine.calls == [("sleep", 2)]


def test_rollouts_in_flight_are_not_aborted(engine_of):
    engine = engine_of(sleep=2)
    engine.submit([0], WANTED[:1])
    with pytest.raises(ValueError, match="sleep: rollouts are in flight; poll until none is"):
        engine.sleep()
    ((_, completion),) = engine.poll()
    assert isinstance(completion, Completion)
    engine.sleep()


def test_an_engine_that_is_not_to_sleep_stays_awake(engine_of):
    engine = engine_of()
    assert not engine._engine.arguments.enable_sleep_mode
    engine.sleep()
    assert engine._engine.calls == []
    assert isinstance(engine, SleepingEngine)
    assert not hasattr(TransformersEngine, "sleep")


def test_after_weights_that_do_not_load_it_sleeps_on_and_can_be_closed(engine_of):
    engine = engine_of(sleep=2)
    engine.sleep()
    engine._engine.reload_error = RuntimeError("CUDA out of memory")
    with pytest.raises(RuntimeError, match="CUDA out of memory"):
        engine.update_weights(weights(7))
    with pytest.raises(RuntimeError, match="asleep"):
        engine.submit([0], WANTED[:1])
    engine._engine.reload_error = None
    engine.update_weights(weights(7))
    assert tokens_of(generate(engine, WANTED)) == {7}
    engine.sleep()
    engine.close()
    assert engine._engine.calls[-1] == ("shutdown",)


def test_where_vllm_cannot_sleep_it_is_refused(engine_of, monkeypatch):
    vllm_double.install(monkeypatch, sleeps=False)
    with pytest.raises(ValueError, match=r"engine\.sleep=2 needs a CUDA or ROCm device .*device_type='cpu' and cannot give"):
        engine_of(sleep=2)
    engine_of()


def test_vllm_asks_for_its_cache_of_the_gpu_and_not_for_all_of_it(engine_of, monkeypatch):
    assert "gpu_memory_utilization" not in vars(engine_of()._engine.arguments)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (1 << 30, 80 << 30))
    arguments = engine_of(kv_cache_gib=4)._engine.arguments
    assert arguments.kv_cache_memory_bytes == 4 << 30
    assert arguments.gpu_memory_utilization == 0.05
    assert "gpu_memory_utilization" not in vars(engine_of(kv_cache_gib=None)._engine.arguments)  # `v05 eval` has the GPU alone


@pytest.mark.parametrize("kind", ["transformers", "vllm_server", "ray"])
def test_other_engines_do_not_sleep(kind):
    with pytest.raises(ValueError, match=f"engine.sleep=2 with engine.kind='{kind}': only vLLM in the trainer's process sleeps"):
        run_config("smoke", "v05", ["engine.sleep=2"], engine=EngineConfig(kind=kind))
    with pytest.raises(ValueError, match=r"--set engine\.sleep=3"):
        run_config("smoke", "v05", ["engine.sleep=3"], engine=EngineConfig(kind="vllm"))


class Sleeper(TransformersEngine):
    """What the trainer sees of VllmEngine: an engine with a copy of the weights, which level 2 takes from it."""

    def __init__(self, path, tokenizer, *, dtype, kv_cache_gib, sleep, **limits):
        self.policy = load_policy(path)[0]
        super().__init__(self.policy, tokenizer, **limits)
        self.level = sleep
        self.asleep = False
        self.log = []

    def submit(self, keys, requests):
        assert not self.asleep
        self.log.append("sample")
        super().submit(keys, requests)

    def sleep(self):
        if self.level is None:
            return
        self.log.append("sleep")
        self.asleep = True
        with torch.no_grad():
            for parameter in self.policy.parameters():
                parameter.fill_(float("nan"))

    def update_weights(self, state):
        self.log.append("wake" if self.asleep else "update")
        self.policy.load_state_dict(copy.deepcopy(dict(state)), strict=False)
        self.asleep = False

    def close(self):
        self.log.append("close")
        super().close()


@pytest.fixture
def trainer_of(monkeypatch, tmp_path):
    """trainer_of(sleep): a trainer of a few steps, whose engine is a Sleeper."""
    monkeypatch.setattr("v05.rollout.vllm_engine.VllmEngine", Sleeper)

    def trainer_of(sleep):
        engine = EngineConfig(kind="vllm", sleep=sleep)
        config = run_config("smoke", "v05", engine=engine, loss={"importance_cap": 2.0}, total_rollouts=192)
        return Trainer(config, tmp_path / str(sleep), lambda line: None)

    return trainer_of


def test_a_run_sleeps_while_gradients_are_computed_and_is_the_same_run(trainer_of, tmp_path):
    trainer = trainer_of(2)
    log = trainer.engine.log
    for name in ("rescore", "update"):
        computed = getattr(trainer.learner, name)
        setattr(trainer.learner, name, lambda *args, name=name, computed=computed: log.append(name) or computed(*args))
    list(trainer.run())
    turns = [call for i, call in enumerate(log) if log[i - 1 : i] != [call]]  # several calls of one kind are one turn
    steps = read_metrics(tmp_path / "2", "step")
    assert len(steps) > 1
    assert turns == ["update", "sample", *["sleep", "rescore", "update", "wake", "sample"] * len(steps), "close"]
    list(trainer_of(None).run())
    for awake, slept in zip(read_metrics(tmp_path / "None"), read_metrics(tmp_path / "2"), strict=True):
        assert {k: v for k, v in awake.items() if "seconds" not in k} == {k: v for k, v in slept.items() if "seconds" not in k}


@pytest.mark.parametrize("place", ["learner.rescore", "learner.update", "engine.update_weights"])
def test_an_error_while_it_sleeps_closes_it(place, trainer_of):
    trainer = trainer_of(2)
    run = trainer.run()
    next(run)
    owner, name = place.split(".")

    def fail(*arguments):
        raise RuntimeError("CUDA out of memory")

    setattr(getattr(trainer, owner), name, fail)
    with pytest.raises(RuntimeError, match="CUDA out of memory"):
        list(run)
    assert trainer.engine.log[-2:] == ["sleep", "close"]


def test_the_setting_is_kept_in_config_json():
    config = run_config("smoke", "v05", ["engine.kind=vllm", "engine.sleep=2"])
    assert RunConfig.model_validate(json.loads(config.model_dump_json())).engine.sleep == 2
