"""Policies with a trained adapter, against peft and transformers with the same weights."""

import copy
import sys

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from helpers.tiny_policy import tiny_model, tiny_tokenizer
from v05.rollout import Completion, Request, generate
from v05.rollout.scoring import completion_logprobs, output_layer
from v05.rollout.transformers_engine import TransformersEngine
from v05.train.config import LoraConfig
from v05.train.lora import adapter_off, add_adapter, merged_weights
from v05.train.presets import run_config
from v05.train.trainer import Trainer

PROMPTS = [(2, 3, 4), (5, 6)]


def adapted(seed=0, trained=True, **settings):
    """A model with an adapter. If `trained`, the adapter changes the model."""
    model = tiny_model().eval()
    add_adapter(model, LoraConfig(rank=4, **settings), seed)
    torch.manual_seed(1)
    for name, parameter in model.named_parameters():
        if trained and ".lora_B." in name:
            torch.nn.init.normal_(parameter, std=0.2)
    return model


def logits_of(model):
    return model(input_ids=torch.arange(2, 12)[None]).logits


def logprobs_of(model):
    completions = [Completion(np.array([7, 8, 9]), np.zeros(3, dtype=np.float32), True)] * 2
    return completion_logprobs(model, PROMPTS, completions, 0)


def test_a_fresh_adapter_changes_nothing_and_alone_is_trained():
    model, base = adapted(trained=False), tiny_model().eval()
    assert torch.equal(logits_of(model), logits_of(base))
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    layers = {name.partition(".lora_")[0] for name in trained}
    linear = {name for name, layer in base.named_modules() if isinstance(layer, torch.nn.Linear) and name != "lm_head"}
    assert all(".lora_" in name for name in trained)
    assert layers == linear


def test_seeds_decide_the_adapter_and_nothing_else():
    torch.manual_seed(3)
    expected = torch.rand(3)
    torch.manual_seed(3)
    models = [adapted(seed, trained=False) for seed in (0, 0, 1)]
    torch.manual_seed(3)
    add_adapter(tiny_model(), LoraConfig(), 0)
    first = [model.get_parameter("model.layers.0.mlp.up_proj.lora_A.default.weight") for model in models]
    assert torch.equal(first[0], first[1])
    assert not torch.equal(first[0], first[2])
    model = tiny_model()
    torch.manual_seed(3)
    add_adapter(model, LoraConfig(), 0)
    assert torch.equal(torch.rand(3), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_merged_weights_are_an_ordinary_policy(dtype, tmp_path):
    model = adapted().to(dtype)
    model.save_pretrained(tmp_path, state_dict=dict(merged_weights(model)))
    plain = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=dtype)
    assert {name for name, _ in merged_weights(model)} == set(tiny_model().state_dict())
    assert type(plain.model.layers[0].mlp.up_proj) is torch.nn.Linear
    tolerance = 1e-5 if dtype == torch.float32 else 0.03
    assert (logits_of(plain) - logits_of(model)).norm() < tolerance * logits_of(model).norm()
    assert (logits_of(tiny_model().to(dtype)) - logits_of(model)).norm() > 0.1 * logits_of(model).norm()


def test_the_reference_is_the_model_without_its_adapter():
    model, base = adapted(), tiny_model().eval()
    before = logprobs_of(model)
    with adapter_off(model):
        assert torch.equal(logprobs_of(model), logprobs_of(base))
    assert torch.equal(logprobs_of(model), before)
    assert all(p.requires_grad == (".lora_" in name) for name, p in model.named_parameters())


def test_the_loss_and_the_engine_take_it_for_a_transformers_model():
    model = adapted()
    assert output_layer(model) is model.lm_head
    engine = TransformersEngine(model, tiny_tokenizer(), max_new_tokens=8)
    completions = generate(engine, [Request(prompt, seed=i) for i, prompt in enumerate(PROMPTS)])
    rows = completion_logprobs(model, PROMPTS, completions, 0)
    for row, completion in zip(rows, completions, strict=True):
        np.testing.assert_allclose(completion.logprobs, row[: len(completion.tokens)].detach().numpy(), atol=1e-5)
    assert output_layer(adapted(target_modules=("lm_head",))) is None  # here the logits do not come from one linear layer


def test_gradients_are_those_of_the_plain_model():
    """The chain rule gives the expected gradients from those of merged float64 weights: dL/dB = dL/dW A^T alpha / rank, and dL/dA
    likewise.
    """
    model = adapted()
    logprobs_of(model).sum().backward()
    plain = tiny_model().eval().double()
    plain.load_state_dict({name: value.double() for name, value in merged_weights(copy.deepcopy(model).double())})
    for prompt in PROMPTS:
        logits = plain(input_ids=torch.tensor([[*prompt, 7, 8, 9]])).logits[0, len(prompt) - 1 : -1]
        torch.log_softmax(logits, -1)[torch.arange(3), torch.tensor([7, 8, 9])].sum().backward()
    for name in ("self_attn.q_proj", "mlp.down_proj"):
        layer = model.get_submodule(f"model.layers.1.{name}")
        a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
        of_weight = plain.get_submodule(f"model.layers.1.{name}").weight.grad * 32 / 4
        torch.testing.assert_close(b.grad.double(), of_weight @ a.double().T, rtol=1e-3, atol=1e-5)
        torch.testing.assert_close(a.grad.double(), b.double().T @ of_weight, rtol=1e-3, atol=1e-5)


def test_what_is_missing_or_misspelt_is_named(tmp_path, monkeypatch):
    with pytest.raises(ValueError, match=r"policy\.lora\.target_modules=\('nowhere',\)"):
        adapted(target_modules=("nowhere",))
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(ImportError, match=r"pip install 'v05\[lora\]'"):
        Trainer(run_config("smoke", "v05", ["policy.lora={}"]), tmp_path, lambda line: None)
