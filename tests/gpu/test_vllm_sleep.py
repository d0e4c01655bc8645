"""What a vLLM engine that sleeps gives back of the GPU's memory, and that it samples from the same policy when it wakes.

Needs vLLM's build for CUDA: make VLLM=vllm TORCH=... .venv-vllm/.ready, then
V05_GPU=1 .venv-vllm/bin/python -m pytest -m gpu tests/gpu/test_vllm_sleep.py
"""

import importlib.util
import json
import subprocess
import sys

import pytest

pytestmark = pytest.mark.gpu
GIB = 1 << 30
KV_CACHE_GIB = 1.0
TOLERANCE = 0.1  # nats, in bfloat16

# In a process of its own: vLLM sets what is global in torch, and sleeps once a process.
SCRIPT = """
import json, sys
from pathlib import Path

import torch

from v05.rollout import Request, generate
from v05.rollout.vllm_engine import VllmEngine
from v05.train.config import PolicyConfig
from v05.train.engine import sync_weights
from v05.train.policy import character_decoder, character_tokenizer, load_policy

folder, level, kv_cache_gib, tolerance = Path(sys.argv[1]), int(sys.argv[2]), float(sys.argv[3]), float(sys.argv[4])
tokenizer = character_tokenizer()
torch.manual_seed(0)
decoder = character_decoder(PolicyConfig(hidden_size=512, layers=8, heads=8, intermediate_size=2048), len(tokenizer))
decoder.bfloat16().save_pretrained(folder)
tokenizer.save_pretrained(folder)
model, tokenizer = load_policy(folder, torch.bfloat16)
engine = VllmEngine(
    folder, tokenizer, max_new_tokens=12, capacity=32, dtype="bfloat16", kv_cache_gib=kv_cache_gib, max_model_len=64, sleep=level
)
wanted = [Request(tuple(tokenizer(f"{i % 7}+{i % 3}=")["input_ids"]), seed=i) for i in range(32)]
free, differences, sampled = {}, [], []


def measure(name):
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    free[name] = torch.cuda.mem_get_info()[0]


def sync():
    differences.append(sync_weights(engine, model, wanted, tokenizer.pad_token_id, tolerance))


sync()
sampled.append([c.logprobs.tolist() for c in generate(engine, wanted)])
measure("awake")
engine.sleep()
measure("asleep")
gradients = torch.empty(free["asleep"] - 2**29, dtype=torch.uint8, device="cuda")
del gradients  # torch caches the memory: half a GiB is left, less than vLLM needs to wake
sync()
sampled.append([c.logprobs.tolist() for c in generate(engine, wanted)])
measure("woken")
engine.sleep()
with torch.no_grad():
    for parameter in model.parameters():
        parameter += 0.1 * parameter.float().std() * torch.randn_like(parameter)
sync()
weights = sum(parameter.nbytes for parameter in model.parameters())
engine.close()
print(json.dumps({"free": free, "differences": differences, "sampled": sampled, "weights": weights}))
"""


@pytest.mark.parametrize("level", [1, 2])
def test_memory_is_free_while_vllm_sleeps_and_it_wakes_to_the_same_policy(level, cuda, tmp_path):
    if importlib.util.find_spec("vllm") is None:  # not imported here: that would change torch's settings for other tests
        pytest.skip("needs vLLM")
    (tmp_path / "sleep.py").write_text(SCRIPT)
    command = [sys.executable, "sleep.py", str(tmp_path / "policy"), str(level), str(KV_CACHE_GIB), str(TOLERANCE)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, timeout=600)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-5000:]
    found = json.loads(done.stdout.splitlines()[-1])
    freed = found["free"]["asleep"] - found["free"]["awake"]
    assert freed > 0.95 * (KV_CACHE_GIB * GIB + found["weights"])
    assert found["free"]["woken"] == pytest.approx(found["free"]["awake"], abs=0.1 * GIB)
    assert max(found["differences"]) < TOLERANCE  # of the last two after other weights were loaded
    before, after = found["sampled"]
    assert [len(row) for row in before] == [len(row) for row in after]
    assert max(abs(a - b) for one, other in zip(before, after, strict=True) for a, b in zip(one, other, strict=True)) < TOLERANCE
