"""Architectures: sampled and trained log-probabilities equal those of a plain forward pass, or the model is refused by name."""

import numpy as np
import pytest
import torch
import transformers
from transformers import AutoModelForCausalLM

from helpers.tiny_policy import tiny_model, tiny_tokenizer
from v05.rollout import Request, generate
from v05.rollout import transformers_engine as engine_module
from v05.rollout.batch import RowBatch
from v05.rollout.rows import Rows
from v05.rollout.scoring import completion_logprobs
from v05.rollout.slots import SlotBatch, _SlotCache
from v05.rollout.transformers_engine import JOIN_EVERY, TransformersEngine

VOCABULARY = 32
PROMPTS = [(3, 4, 5), (6, 7, 8, 9, 10, 11, 12, 13, 14), (2,), (8, 8, 3, 4, 20, 21, 22, 23, 24, 25, 26, 27, 28), (6, 5, 4)]
SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
    "eos_token_id": 1,
    "bos_token_id": None,
}
HALF = {"layer_types": ["linear_attention", "full_attention"]}
DELTA = HALF | {
    "head_dim": 8,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
MAMBA = {name: SIZES[name] for name in ("vocab_size", "hidden_size", "num_hidden_layers", "pad_token_id", "eos_token_id")}
MAMBA |= {"state_size": 8, "bos_token_id": None}
MAMBA_2 = {"mamba_n_heads": 4, "mamba_d_head": 16, "mamba_n_groups": 2, "mamba_d_state": 8, "mamba_chunk_size": 8}
LATENT = {"q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 8, "v_head_dim": 8, "qk_nope_head_dim": 8}

# Architectures in which every layer keeps keys and values.
ATTENTION = {
    "Qwen3Config": {"head_dim": 8},
    "LlamaConfig": {},
    "Gemma3TextConfig": {"head_dim": 8, "sliding_window": 6, "layer_types": ["sliding_attention", "full_attention"]},
    "GptOssConfig": {"head_dim": 8, "sliding_window": 6, "num_local_experts": 4, "num_experts_per_tok": 2},
    "GPT2Config": {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 128},
    "DeepseekV3Config": LATENT | {"num_key_value_heads": 4, "n_routed_experts": 4, "num_experts_per_tok": 2, "n_group": 1}
    | {"topk_group": 1, "moe_intermediate_size": 16, "first_k_dense_replace": 1},
}  # fmt: skip
# Architectures with a recurrent or convolutional state in some or all layers.
STATE = {
    "Qwen3_5TextConfig": DELTA,
    "Qwen3_5MoeTextConfig": DELTA | EXPERTS | {"shared_expert_intermediate_size": 16},
    "Qwen3NextConfig": DELTA | EXPERTS | {"shared_expert_intermediate_size": 16},
    "Lfm2Config": {"layer_types": ["conv", "full_attention"], "conv_bias": True},
    "Lfm2MoeConfig": {"layer_types": ["conv", "full_attention"], "num_dense_layers": 1} | EXPERTS,
    "JambaConfig": {"attn_layer_period": 2, "attn_layer_offset": 1, "expert_layer_period": 2, "expert_layer_offset": 1}
    | {"num_experts": 2, "mamba_d_state": 8, "mamba_dt_rank": 4},
    "NemotronHConfig": {"num_hidden_layers": 4, "layers_block_type": ["mamba", "attention", "mlp", "moe"], "head_dim": 8}
    | {"mamba_num_heads": 4, "mamba_head_dim": 16, "ssm_state_size": 8, "n_groups": 2, "chunk_size": 8}
    | {"n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "moe_shared_expert_intermediate_size": 16},
    "GraniteMoeHybridConfig": MAMBA_2 | HALF | {"shared_intermediate_size": 16, "num_local_experts": 4, "num_experts_per_tok": 2},
    "FalconH1Config": MAMBA_2 | {"head_dim": 8, "mamba_d_ssm": 64},
    "BambaConfig": MAMBA_2 | {"attn_layer_indices": [1]},
    "Zamba2Config": {"layers_block_type": ["linear_attention", "hybrid"], "mamba_d_state": 8, "n_mamba_heads": 4}
    | {"mamba_ngroups": 2, "chunk_size": 8},
    "OlmoHybridConfig": DELTA,
    "KimiLinearConfig": HALF | LATENT | {"num_key_value_heads": 4, "linear_num_heads": 2, "linear_head_dim": 8, "num_experts": 4}
    | {"num_experts_per_token": 2, "moe_intermediate_size": 16},
    "MambaConfig": None,
    "FalconMambaConfig": None,
    "Mamba2Config": {"num_heads": 4, "head_dim": 16, "n_groups": 2, "chunk_size": 8},
}  # fmt: skip
# Architectures that keep their state in a way that the engine does not support.
REFUSED = {
    "RwkvConfig": {"attention_hidden_size": 32, "context_length": 128},
    "MiniMaxConfig": HALF | {"head_dim": 8, "num_local_experts": 2, "block_size": 8},
    "RecurrentGemmaConfig": {"num_hidden_layers": 3, "lru_width": 32, "attention_window_size": 16, "head_dim": 8}
    | {"block_types": ["recurrent", "recurrent", "attention"]},
}  # fmt: skip


def model_of(name, settings):
    """A model whose weights are so large that a mistake in any layer shows. With transformers' initial weights all logits are
    nearly equal.
    """
    if not hasattr(transformers, name):
        pytest.skip(f"transformers {transformers.__version__} has no {name}")
    sizes = MAMBA if name in ("MambaConfig", "FalconMambaConfig", "Mamba2Config") else SIZES
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(getattr(transformers, name)(**sizes | (settings or {})))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.copy_(torch.randn_like(parameter) * 1.2 * parameter.shape[-1] ** -0.5)
    return model.eval()


def requests(count):
    return [Request(PROMPTS[i % len(PROMPTS)], seed=i) for i in range(count)]


def plain_logprobs(model, prompt, tokens):
    """(L,) log-probabilities from a forward pass over one sequence, without a cache."""
    logits = model(input_ids=torch.tensor([[*prompt, *tokens.tolist()]]), use_cache=False).logits[0, len(prompt) - 1 : -1]
    return torch.log_softmax(logits.float(), dim=-1).gather(-1, torch.from_numpy(tokens)[:, None]).squeeze(-1)


def gradient(model, loss):
    model.zero_grad()
    loss.backward()
    return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


@pytest.mark.parametrize(("name", "settings"), (ATTENTION | STATE).items(), ids=(ATTENTION | STATE).keys())
def test_sampled_and_trained_log_probabilities_are_those_of_a_plain_pass(name, settings):
    """Rollouts join and leave midway, and prompts differ in length."""
    model = model_of(name, settings)
    engine = TransformersEngine(model, tiny_tokenizer(), max_new_tokens=2 * JOIN_EVERY, capacity=4)
    wanted = requests(10)
    completions = generate(engine, wanted)
    lengths = [len(c.tokens) for c in completions]
    assert min(lengths) < JOIN_EVERY < max(lengths)
    trained = completion_logprobs(model, [r.prompt for r in wanted], completions, 0)
    plain = [plain_logprobs(model, r.prompt, c.tokens) for r, c in zip(wanted, completions, strict=True)]
    for completion, row, expected in zip(completions, trained, plain, strict=True):
        np.testing.assert_allclose(completion.logprobs, expected.detach().numpy(), atol=1e-4, rtol=0)
        torch.testing.assert_close(row[: len(expected)], expected, atol=1e-4, rtol=0)
    mine = gradient(model, torch.cat([row[: len(p)] for row, p in zip(trained, plain, strict=True)]).sum())
    expected = gradient(model, torch.cat(plain).sum())
    assert (mine - expected).norm() < 1e-4 * expected.norm()


@pytest.mark.parametrize(("name", "settings"), REFUSED.items(), ids=REFUSED.keys())
def test_an_architecture_whose_state_is_not_kept_is_refused_by_name(name, settings):
    model = model_of(name, settings)
    with pytest.raises(ValueError, match=f"model_type={model.config.model_type!r}: the embedded engine cannot keep"):
        TransformersEngine(model, tiny_tokenizer(), max_new_tokens=8)


def test_a_time_step_below_its_bound_is_sampled_as_it_is_trained():
    """When transformers computes a single token, it ignores the bound of the time step. These models often reach this bound."""
    model = model_of("NemotronHConfig", STATE["NemotronHConfig"] | {"time_step_min": 0.05})
    engine = TransformersEngine(model, tiny_tokenizer(), max_new_tokens=12)
    wanted = requests(5)
    for request, completion in zip(wanted, generate(engine, wanted), strict=True):
        expected = plain_logprobs(model, request.prompt, completion.tokens).detach().numpy()
        np.testing.assert_allclose(completion.logprobs, expected, atol=1e-4, rtol=0)
    assert not any(module._forward_hooks for module in model.modules())


@pytest.mark.parametrize("fault", ["slots", "slots and rows", "trained"])
def test_the_self_check_finds_a_wrong_pass(fault, monkeypatch):
    """An architecture for which slots are wrong is sampled in rows. If rows are wrong too, it is refused."""
    model = tiny_model()
    with torch.no_grad():
        model.lm_head.weight *= 20
    assert isinstance(TransformersEngine(model, tiny_tokenizer(), max_new_tokens=8)._batch, SlotBatch)
    if "slots" in fault:  # a step writes one column too far
        right_place = _SlotCache.go_to
        monkeypatch.setattr(_SlotCache, "go_to", lambda cache, at, columns: right_place(cache, at + 1, columns))
    if "rows" in fault:  # positions also count the padding
        monkeypatch.setattr(Rows, "_widen", lambda rows, width: setattr(rows, "mask", rows.mask.new_ones(len(rows), width)))
    if fault == "trained":
        right = engine_module.completion_logprobs
        monkeypatch.setattr(engine_module, "completion_logprobs", lambda *args: right(*args) + 0.01)
    if fault == "slots":
        assert isinstance(TransformersEngine(model, tiny_tokenizer(), max_new_tokens=8)._batch, RowBatch)
        return
    with pytest.raises(ValueError, match="model_type='llama': the embedded engine cannot keep this architecture's state"):
        TransformersEngine(model, tiny_tokenizer(), max_new_tokens=8)


def test_the_self_check_leaves_no_trace():
    model = tiny_model().train()
    before, random = {name: value.clone() for name, value in model.state_dict().items()}, torch.get_rng_state()
    TransformersEngine(model, tiny_tokenizer(), max_new_tokens=8)
    assert model.training
    assert torch.equal(random, torch.get_rng_state())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_half_precision_is_no_wrong_architecture():
    for dtype in (torch.bfloat16, torch.float16):
        for name in ("Qwen3_5TextConfig", "FalconH1Config", "Mamba2Config", "LlamaConfig"):
            TransformersEngine(model_of(name, (ATTENTION | STATE)[name]).to(dtype), tiny_tokenizer(), max_new_tokens=4)
