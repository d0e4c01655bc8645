"""The expected memory of a run, against real models and a real process."""

import subprocess
import sys
from contextlib import nullcontext
from dataclasses import fields
from pathlib import Path

import pytest
import torch
import transformers
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig

from v05.rollout import Request
from v05.rollout.scoring import computed_again
from v05.rollout.transformers_engine import TransformersEngine
from v05.train import memory
from v05.train.config import LoraConfig
from v05.train.lora import add_adapter
from v05.train.masters import MasterWeights
from v05.train.memory import expected_memory, memory_report, trace
from v05.train.policy import character_tokenizer
from v05.train.presets import run_config

BENCH = Path(__file__).parents[2] / "bench" / "memory.py"
SMALL = {"pad_token_id": 0, "eos_token_id": 1, "bos_token_id": None}
LAYERS = 5
PROMPT, NEW, ROWS = 24, 40, 3  # sizes of a micro-batch


def architecture(**settings):
    sizes = {"hidden_size": 64, "intermediate_size": 160, "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 512}
    return LlamaConfig(**SMALL | sizes | {"num_hidden_layers": LAYERS, "tie_word_embeddings": True} | settings)


def run_of(*settings, **overrides):
    sizes = [f"policy.max_new_tokens={NEW}", f"optimizer.tokens_per_backward={ROWS * (PROMPT + NEW)}", "sampling_batch=7"]
    return run_config("smoke", "grpo", [*sizes, *settings], **overrides)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("lora", [None, LoraConfig(rank=4)])
def test_weights_masters_and_adamw_are_counted(tied, dtype, lora):
    config = architecture(tie_word_embeddings=tied)
    run = run_of(f"policy.dtype={dtype}", "loss.kl_coefficient=0.1")
    run = run.model_copy(update={"policy": run.policy.model_copy(update={"lora": lora})})
    found = expected_memory(run, config, PROMPT)
    model = AutoModelForCausalLM.from_config(config, dtype=getattr(torch, dtype))
    plain = sum(p.nbytes for p in model.parameters())
    if lora is not None:
        add_adapter(model, lora, 0)
    masters = MasterWeights(model)
    trained = masters.parameters.values()
    for master in trained:
        master.grad = torch.zeros_like(master)
    optimizer = torch.optim.AdamW(trained)
    optimizer.step()
    assert found.weights == sum(p.nbytes for p in model.parameters())
    assert found.reference == (plain if lora is None else 0)  # with an adapter, the policy without it is the reference
    assert found.masters == (0 if dtype == "float32" else sum(p.nbytes for p in trained))
    assert found.gradients == sum(p.grad.nbytes for p in trained)
    assert found.optimizer == sum(s[mean].nbytes for s in optimizer.state.values() for mean in ("exp_avg", "exp_avg_sq"))


@pytest.mark.parametrize("settings", [[], ["optimizer.gradient_checkpointing=true"], ["policy.lora.rank=4"]], ids=str)
def test_activations_of_two_layers_tell_those_of_all(settings):
    """Compared with the memory that autograd keeps of a real model. Each storage counts once."""
    run = run_of(*settings)
    one, two = (trace(run, architecture(), layers, ROWS, PROMPT + NEW) for layers in (1, 2))
    model = AutoModelForCausalLM.from_config(architecture()).eval()
    if run.policy.lora is not None:
        add_adapter(model, run.policy.lora, 0)
    kept = {}

    def keep(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    again = run.optimizer.gradient_checkpointing
    ids = torch.zeros(ROWS, PROMPT + NEW, dtype=torch.int64)
    mask = torch.ones_like(ids)
    mask[0, 0] = 0  # with this, attention gets a mask, as when a completion is read after its prompt
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor), computed_again(model) if again else nullcontext():
        hidden = model.base_model(input_ids=ids, attention_mask=mask, use_cache=False).last_hidden_state
    for tensor in (*model.parameters(), *model.buffers()):
        kept.pop(tensor.untyped_storage().data_ptr(), None)
    expected = one.kept + (LAYERS - 1) * (two.kept - one.kept)
    assert expected == pytest.approx(sum(kept.values()) + hidden.nbytes, rel=0.05)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_keys_and_values_of_the_engine_are_counted(dtype):
    config, run = architecture(), run_of(f"policy.dtype={dtype}")
    model = AutoModelForCausalLM.from_config(config, dtype=getattr(torch, dtype)).eval()
    engine = TransformersEngine(model, character_tokenizer(), max_new_tokens=NEW, capacity=run.sampling_batch)
    engine.submit(range(run.sampling_batch), [Request((5,) * PROMPT, seed) for seed in range(run.sampling_batch)])
    engine.poll()
    held = sum(tensor.nbytes for tensor in engine._batch._cache.tensors())
    found = expected_memory(run, config, PROMPT)
    assert found.slots == held > 0
    assert found.peak >= found.weights + held + found.sampling


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_vllm_is_counted_while_it_is_awake(dtype):
    settings = ["engine.kind=vllm", f"engine.dtype={dtype}", "engine.kv_cache_gib=0.5"]
    model = AutoModelForCausalLM.from_config(architecture(), dtype=getattr(torch, dtype))
    awake = expected_memory(run_of(*settings), architecture(), PROMPT)
    assert awake.vllm == sum(p.nbytes for p in model.parameters()) + (1 << 29)
    asleep = expected_memory(run_of(*settings, "engine.sleep=2"), architecture(), PROMPT)
    assert (asleep.vllm, asleep.vllm_awake) == (0, awake.vllm)
    # These take turns with the engine that sleeps.
    assert awake.peak - asleep.peak == awake.gradients + max(awake.backward, awake.update)
    assert expected_memory(run_of(), architecture(), PROMPT).vllm == 0
    advised = [list(memory._savings(run_of(*settings), PROMPT, 1, device)) for device in ("cuda", "cpu")]
    assert ["engine.sleep=2" in settings for settings in advised] == [True, False]  # vLLM cannot sleep on a CPU


def test_what_lowers_memory_lowers_what_is_expected():
    plain = run_of("optimizer.tokens_per_backward=100000", "rollouts_per_step=512")
    base = expected_memory(plain, architecture(), PROMPT)

    def less(*settings, **arguments):
        run = run_of("optimizer.tokens_per_backward=100000", "rollouts_per_step=512", *settings)
        return expected_memory(run, architecture(), PROMPT, **arguments)

    assert less("optimizer.gradient_checkpointing=true").backward < base.backward / 3
    assert less("optimizer.tokens_per_backward=640").backward < base.backward / 3
    assert less("policy.dtype=bfloat16").backward < 0.7 * base.backward
    assert less("sampling_batch=700").sampling > 50 * base.sampling  # 700 instead of 7
    assert less("sampling_batch=700").slots == 11 * base.slots  # the number of slots is a multiple of 64
    assert less(ranks=2).gradients == 2 * base.gradients  # DDP reduces copies of the gradients
    sharded = less("distributed=fsdp2", ranks=4)
    assert sharded.optimizer == base.optimizer / 4
    assert sharded.weights == base.weights * 5 / 4  # the policy is sampled from an unsharded copy


def test_a_run_that_needs_too_much_is_told_what_helps(monkeypatch):
    run = run_of("optimizer.tokens_per_backward=100000", "rollouts_per_step=512")
    monkeypatch.setattr(memory, "memory_there_is", lambda device, ranks: 1 << 40)
    assert "would lower" not in memory_report(run, architecture(), PROMPT, 1, "cpu")
    monkeypatch.setattr(memory, "memory_there_is", lambda device, ranks: 1 << 20)
    line = memory_report(run, architecture(), PROMPT, 1, "cpu")
    setting = f"optimizer.tokens_per_backward={PROMPT + NEW}"  # one rollout per pass
    lower = expected_memory(run_of("rollouts_per_step=512", setting), architecture(), PROMPT)
    assert line.endswith(f"; --set {setting} would lower it most, to {lower.peak / (1 << 30):.2f} GiB")
    needs = expected_memory(run, architecture(), PROMPT)
    assert f"about {needs.peak / (1 << 30):.2f} GiB expected" in line
    assert all(f.name in line for f in fields(needs) if getattr(needs, f.name))


@pytest.mark.parametrize("name", ["Gemma2Config", "Lfm2Config", "GPT2Config"])
def test_other_architectures_are_traced(name):
    sizes = {"hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 2, "num_key_value_heads": 2, "vocab_size": 64}
    config = getattr(transformers, name)(**SMALL | sizes)
    assert expected_memory(run_of(), config, PROMPT).backward > 0


def test_an_architecture_that_cannot_be_traced_is_named():
    sizes = {"hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 2, "vocab_size": 64, "num_experts": 4}
    config = AutoConfig.for_model("qwen3_moe", **SMALL, **sizes)  # its experts' product has no fake in float32
    assert "cannot be estimated for model_type='qwen3_moe'" in memory_report(run_of(), config, PROMPT, 1, "cpu")


def test_a_process_takes_what_is_expected():
    """With a policy this small, the libraries' own memory matters."""
    command = [sys.executable, str(BENCH), "--policies", "tiny", "--cases", "float32"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr
    ratio = float(done.stdout.split()[-1])
    assert 0.75 < ratio < 1.25, done.stdout
