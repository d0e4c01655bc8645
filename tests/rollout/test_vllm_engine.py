"""vLLM in this process and behind a server, against the embedded engine. `make test-vllm` installs vLLM."""

import inspect
import json
import os
import socket
import subprocess
import sys
import time

import numpy as np
import pytest
import torch

from helpers import vllm_double
from v05.rollout import Failure, Request, generate
from v05.rollout.transformers_engine import TransformersEngine
from v05.rollout.vllm_engine import VllmEngine, VllmServerEngine
from v05.train.config import PolicyConfig
from v05.train.engine import sync_weights
from v05.train.metrics import read_metrics
from v05.train.policy import character_decoder, character_tokenizer, load_policy
from v05.train.presets import run_config

pytest.importorskip("vllm")
pytestmark = [pytest.mark.vllm, pytest.mark.filterwarnings("default")]
LIMIT = 12
TOLERANCE = 1e-4  # float32, with sums in another order


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A small random Qwen3 whose end token is likely enough to occur."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("policy")
    tokenizer = character_tokenizer()
    character_decoder(PolicyConfig(hidden_size=64, layers=2, heads=2, intermediate_size=96), len(tokenizer)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def in_process(folder):
    engine = VllmEngine(folder, load_policy(folder)[1], max_new_tokens=LIMIT, capacity=32, kv_cache_gib=0.1)
    yield engine
    engine.close()


@pytest.fixture(scope="module")
def server(folder, tmp_path_factory):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    options = ["--model", str(folder), "--port", str(port), "--dtype", "float32", "--enforce-eager", "--max-num-seqs", "32"]
    log = tmp_path_factory.mktemp("server") / "log.txt"
    environment = {**os.environ, "VLLM_SERVER_DEV_MODE": "1", "VLLM_CPU_KVCACHE_SPACE": "1"}
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", *options]
    with log.open("w") as output, subprocess.Popen(command, stdout=output, stderr=output, env=environment) as process:
        deadline = time.monotonic() + 300
        engine = None
        while engine is None:
            try:
                weights = tmp_path_factory.mktemp("weights")
                engine = VllmServerEngine(
                    f"http://127.0.0.1:{port}", weights, load_policy(folder)[1], max_new_tokens=LIMIT, capacity=32
                )
            except RuntimeError:
                assert process.poll() is None, log.read_text()[-5000:]
                assert time.monotonic() < deadline, log.read_text()[-5000:]
                time.sleep(1)
        yield engine
        engine.close()
        process.terminate()
        process.wait(60)


@pytest.fixture(params=["in_process", "server"])
def engine(request):
    return request.getfixturevalue(request.param)


def requests(tokenizer, count=200):
    return [Request(tuple(tokenizer(f"{i % 7}+{i % 3}=")["input_ids"]), seed=i) for i in range(count)]


def test_seeds_ends_and_log_probabilities(engine, folder):
    model, tokenizer = load_policy(folder)
    wanted = requests(tokenizer)
    assert sync_weights(engine, model, wanted, tokenizer.pad_token_id, TOLERANCE) < TOLERANCE
    completions = generate(engine, wanted)
    assert {c.finished for c in completions} == {True, False}
    for completion in completions:
        ends = completion.tokens == tokenizer.eos_token_id
        assert ends[:-1].sum() == 0
        assert ends[-1] == completion.finished
        assert len(completion.tokens) == len(completion.logprobs)
        assert completion.finished or len(completion.tokens) == LIMIT
    again = generate(engine, wanted[::-1])[::-1]  # in another order, and beside other rollouts
    assert [c.tokens.tolist() for c in again] == [c.tokens.tolist() for c in completions]
    others = generate(engine, [Request(r.prompt, r.seed + 1000) for r in wanted])
    assert [c.tokens.tolist() for c in others] != [c.tokens.tolist() for c in completions]
    embedded = TransformersEngine(model, tokenizer, max_new_tokens=LIMIT)
    assert engine.decode(completions[0]) == embedded.decode(completions[0])


def test_first_tokens_follow_the_models_distribution(in_process, folder):
    model, tokenizer = load_policy(folder)
    in_process.update_weights(model.state_dict().items())
    prompt = tuple(tokenizer("1+1=")["input_ids"])
    count = 2000
    tokens = [c.tokens[0] for c in generate(in_process, [Request(prompt, seed) for seed in range(count)])]
    seen = np.bincount(tokens, minlength=len(tokenizer)) / count
    expected = torch.softmax(model(input_ids=torch.tensor([prompt])).logits[0, -1], dim=-1).detach().numpy()
    assert np.abs(seen - expected).max() < 5 * np.sqrt(expected.max() / count)


def test_weights_are_updated_in_place_the_tied_head_too(engine, folder):
    model, tokenizer = load_policy(folder)
    assert model.config.tie_word_embeddings
    wanted = requests(tokenizer, 32)
    pad = tokenizer.pad_token_id
    sync_weights(engine, model, wanted, pad, TOLERANCE)
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.3 * parameter.std() * torch.randn_like(parameter)
    update, engine.update_weights = engine.update_weights, lambda state: None
    try:
        with pytest.raises(RuntimeError, match="after a sync, log-probabilities of engine and trainer differ"):  # stale weights
            sync_weights(engine, model, wanted, pad, TOLERANCE)
    finally:
        engine.update_weights = update
    assert sync_weights(engine, model, wanted, pad, TOLERANCE) < TOLERANCE


def test_weights_wait_for_rollouts(engine, folder):
    model, tokenizer = load_policy(folder)
    engine.submit([7], requests(tokenizer, 1))
    with pytest.raises(ValueError, match="update_weights: rollouts are in flight; poll until none is"):
        engine.update_weights(model.state_dict().items())
    ((key, _),) = engine.poll()
    assert key == 7
    assert engine.poll() == []


def test_a_prompt_too_long_fails_alone(engine, folder):
    fitting = requests(load_policy(folder)[1], 3)
    engine.submit([1, 2, 3, 4], [*fitting, Request((5,) * 1000, 0)])
    results = {}
    while len(results) < 4:
        results.update(engine.poll())
    assert isinstance(results[4], Failure)
    assert "refused the request" in results[4].error
    assert not any(isinstance(results[key], Failure) for key in (1, 2, 3))


def test_half_precision_is_refused_until_it_is_meant(in_process, folder):
    # The trainer's weights, rounded to bfloat16, imitate an engine in half precision: a process can hold only one vLLM engine.
    model, tokenizer = load_policy(folder)
    rounded = {name: tensor.bfloat16().float() for name, tensor in model.state_dict().items()}
    update, in_process.update_weights = in_process.update_weights, lambda state: update(rounded.items())
    try:
        with pytest.raises(RuntimeError, match=r"raise the tolerance and set loss\.importance_cap"):
            sync_weights(in_process, model, requests(tokenizer, 32), tokenizer.pad_token_id, TOLERANCE)
        assert TOLERANCE < sync_weights(in_process, model, requests(tokenizer, 32), tokenizer.pad_token_id, 0.5) < 0.5
    finally:
        in_process.update_weights = update


SCRIPT = """
import sys
from pathlib import Path
from v05.train.config import RunConfig
from v05.train.trainer import train

if __name__ == "__main__":
    train(RunConfig.model_validate_json(Path(sys.argv[1]).read_text()), Path(sys.argv[2]))
"""


def test_a_training_run(folder, tmp_path):
    # The run gets a process of its own, because a process can hold only one vLLM engine.
    (tmp_path / "run.py").write_text(SCRIPT)
    for kind, settings in (("vllm", {"kv_cache_gib": 0.1}), ("transformers", {})):
        config = run_config(
            "smoke",
            "v05",
            policy={"path": folder, "max_new_tokens": 4},
            engine={"kind": kind, **settings},
            loss={"importance_cap": 2.0},
            total_rollouts=128,
        )
        (tmp_path / f"{kind}.json").write_text(config.model_dump_json())
        command = [sys.executable, tmp_path / "run.py", tmp_path / f"{kind}.json", tmp_path / kind]
        result = subprocess.run(command, capture_output=True, text=True, timeout=600)
        assert result.returncode == 0, result.stderr[-5000:]
    steps = read_metrics(tmp_path / "vllm", "step")
    assert len(steps) >= 2
    assert all(s["sync_difference"] < TOLERANCE and s["mismatch"] < TOLERANCE for s in steps)
    assert all(s["capped_fraction"] == 0 and s["invalid"] == 0 for s in steps)
    # The two engines draw different random numbers from the same policy.
    entropy = [read_metrics(tmp_path / kind, "evaluation")[0]["entropy"] for kind in ("vllm", "transformers")]
    assert entropy[0] == pytest.approx(entropy[1], abs=0.1)


def test_the_double_takes_the_arguments_of_vllm():
    """tests/rollout/test_vllm_sleep.py rests on it."""
    from vllm import EngineArgs, LLMEngine
    from vllm.v1.engine.core_client import InprocClient
    from vllm.v1.executor.abstract import SLEEP_TAGS

    for real, double in ((LLMEngine, vllm_double.LLMEngine), (InprocClient, vllm_double.Core)):
        for name in vars(double):
            if not name.startswith("__"):
                mine, theirs = (inspect.signature(getattr(of, name)).parameters for of in (double, real))
                assert [each for each in theirs if each in mine] == list(mine), name
                assert all(theirs[each].default == mine[each].default for each in mine), name
                assert all(each.default is not each.empty for each in theirs.values() if each.name not in mine), name
    wanted = {"enable_sleep_mode", "gpu_memory_utilization", "kv_cache_memory_bytes"}
    assert wanted <= inspect.signature(EngineArgs).parameters.keys()
    assert SLEEP_TAGS == vllm_double.TAGS


def test_a_build_for_the_cpu_is_not_put_to_sleep(folder, tmp_path):
    from vllm import EngineArgs

    with pytest.raises(ValueError, match="Sleep mode is not supported on current platform"):  # what vLLM says to it
        EngineArgs(model=str(folder), enable_sleep_mode=True).create_engine_config()
    settings = ["--set", "engine.sleep=2", "--out", str(tmp_path / "run")]
    command = [sys.executable, "-m", "v05", "train", *training_options(folder), *settings]
    result = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert result.returncode == 2, result.stdout + result.stderr
    assert "engine.sleep=2 needs a CUDA or ROCm device" in " ".join(result.stderr.split())
    assert "device_type='cpu'" in " ".join(result.stderr.split())


# Runs the command `v05` with vLLM's worker for the CPU sleeping as the one for GPUs does, below vLLM's own engine and scheduler:
# what is asleep reads NaN. Anything that vLLM computes is refused meanwhile. The last line of the output is the order of the calls.
SLEEPER = """
import json, runpy, sys, torch
from vllm.platforms.cpu import CpuPlatform
from vllm.v1.worker.cpu_worker import CPUWorker

log, asleep, kept = [], set(), {}

def sleep(self, level=1):
    log.append(f"sleep {level}")
    weights, cache = self.model_runner.model.state_dict(), self.model_runner.kv_caches
    assert weights and cache
    kept.update({name: tensor.clone() for name, tensor in weights.items()} if level == 1 else {})
    for tensor in (*weights.values(), *cache):
        tensor.fill_(float("nan"))
    asleep.update(("weights", "kv_cache"))

def wake_up(self, tags=None):
    log.append(f"wake {tags}")
    asleep.difference_update(tags)
    with torch.no_grad():
        for name, tensor in self.model_runner.model.state_dict().items() if "weights" in tags else ():
            tensor.copy_(kept.get(name, tensor))
    for cache in self.model_runner.kv_caches if "kv_cache" in tags else ():
        cache.zero_()

def recorded(name, forbidden):
    function = getattr(CPUWorker, name)
    def call(self, *args, **kwargs):
        assert not asleep & forbidden, (name, asleep)
        if log[-1:] != [name]:
            log.append(name)
        return function(self, *args, **kwargs)
    setattr(CPUWorker, name, call)

CpuPlatform.is_sleep_mode_available = lambda self: True
CPUWorker.sleep, CPUWorker.wake_up = sleep, wake_up
recorded("reload_weights", {"weights"})
recorded("execute_model", {"weights", "kv_cache"})
try:
    runpy.run_module("v05", run_name="__main__")
finally:
    print(json.dumps(log))
"""


def training_options(folder):
    settings = ["engine.kv_cache_gib=0.1", "policy.max_new_tokens=4", "loss.importance_cap=2", "total_rollouts=128"]
    options = ["--preset", "smoke", "--method", "v05", "--policy", str(folder), "--engine", "vllm"]
    return options + [word for setting in settings for word in ("--set", setting)]


def test_a_run_whose_engine_sleeps_is_the_run_whose_engine_does_not(folder, tmp_path):
    (tmp_path / "sleeper.py").write_text(SLEEPER)
    logs, records = {}, {}
    for level in ("null", "1", "2"):
        options = [*training_options(folder), "--set", f"engine.sleep={level}", "--out", str(tmp_path / level)]
        command = [sys.executable, str(tmp_path / "sleeper.py"), "train", *options]
        result = subprocess.run(command, capture_output=True, text=True, timeout=600)
        assert result.returncode == 0, result.stdout[-2000:] + result.stderr[-5000:]
        logs[level] = json.loads(result.stdout.splitlines()[-1])
        records[level] = [
            {name: value for name, value in record.items() if "seconds" not in name} for record in read_metrics(tmp_path / level)
        ]
    steps = [record for record in records["null"] if record["kind"] == "step"]
    assert len(steps) >= 2
    assert all(step["sync_difference"] < TOLERANCE and step["mismatch"] < TOLERANCE for step in steps)
    sample = ["reload_weights", "execute_model"]
    assert [call for call in logs["null"] if call in sample] == sample * (len(steps) + 1)
    for level in ("1", "2"):
        turn = [f"sleep {level}", "wake ['weights']", "reload_weights", "wake ['kv_cache']", "execute_model"]
        first = logs[level].index(turn[0])
        assert logs[level][first - 2 :] == [*sample, *turn * len(steps)]
        assert records[level] == records["null"]


def test_an_evaluation_samples_what_the_embedded_engine_does(folder, tmp_path):
    """Each command runs in a process of its own, as users start it, because an engine needs the process to itself."""
    (tmp_path / "sums.jsonl").write_text("".join(f'{{"problem": "{i}+1=", "answer": {i + 1}}}\n' for i in range(8)))
    environment = {**os.environ, "VLLM_CPU_KVCACHE_SPACE": "1"}
    found = {}
    for engine, temperature in (("transformers", 0), ("vllm", 0), ("vllm", 0.7)):
        out = tmp_path / f"{engine}-{temperature}"
        options = ["--data", str(tmp_path), "--samples", "2", "--template", "{problem}", "--max-new-tokens", str(LIMIT)]
        options += ["--engine", engine, "--temperature", str(temperature), "--top-p", "0.9", "--out", str(out)]
        command = [sys.executable, "-m", "v05", "eval", str(folder), "--benchmarks", "sums", *options]
        result = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=tmp_path, timeout=600)
        assert result.returncode == 0, result.stdout + result.stderr
        samples = map(json.loads, (out / "samples.jsonl").read_text().splitlines())
        found[out.name] = {(sample["problem"], sample["sample"]): sample["completion"] for sample in samples}
    assert len(found["vllm-0"]) == 16
    assert found["vllm-0"] == found["transformers-0"]
    assert found["vllm-0.7"] != found["vllm-0"]
