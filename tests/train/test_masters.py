"""A policy in bfloat16: its float32 masters against float64, its runs, and its rounding."""

import copy
import shutil

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, LlamaConfig

from helpers.kill_and_resume import policy_digest, untimed
from helpers.tiny_policy import tiny_model, tiny_tokenizer
from v05.rollout import Request, generate
from v05.rollout.scoring import completion_logprobs, output_layer
from v05.rollout.transformers_engine import TransformersEngine
from v05.train.checkpoint import find_checkpoints
from v05.train.masters import MasterWeights
from v05.train.metrics import read_metrics
from v05.train.presets import run_config
from v05.train.trainer import Trainer, train

SETTINGS = {
    "bfloat16": ["policy.dtype=bfloat16"],
    "lora": ["policy.lora.rank=4", "loss.kl_coefficient=0.1"],
    "all": [
        "policy.dtype=bfloat16",
        "policy.lora.rank=4",
        "loss.kl_coefficient=0.1",
        "loss.importance_cap=2",
        "optimizer.gradient_checkpointing=true",
    ],
}


def test_small_updates_add_up():
    torch.manual_seed(0)
    layer = torch.nn.Linear(8, 8).to(torch.bfloat16)
    start = copy.deepcopy(layer).double()
    expected = copy.deepcopy(start)
    masters = MasterWeights(layer)
    settings = {"lr": 1e-5, "weight_decay": 0.1}  # an update is a hundredth of the smallest step of a bfloat16 weight of 0.3
    optimizer = torch.optim.AdamW(masters.parameters.values(), **settings)
    reference = torch.optim.AdamW(expected.parameters(), **settings)
    for _ in range(100):
        gradients = [torch.randn_like(p) + 1 for p in layer.parameters()]
        for parameter, twin, gradient in zip(layer.parameters(), expected.parameters(), gradients, strict=True):
            parameter.grad, twin.grad = gradient.clone(), gradient.double()
        masters.take_gradients()
        optimizer.step()
        masters.round_to_model()
        optimizer.zero_grad()
        reference.step()
    for name, twin in expected.named_parameters():
        master = masters.parameters[name].double()
        moved, wanted = master - start.get_parameter(name), twin - start.get_parameter(name)
        assert wanted.abs().min() > 5e-4
        # Decay and step each round a float32 weight below 0.5 by up to 2^-26.
        torch.testing.assert_close(moved, wanted, rtol=0, atol=100 * 2 * 2.0**-26)
        assert torch.equal(layer.get_parameter(name), masters.parameters[name].bfloat16())


def test_gradients_of_several_passes_add_up_in_float32():
    layer = torch.nn.Linear(4, 1, bias=False).to(torch.bfloat16)
    masters = MasterWeights(layer)
    for part in (1.0, *[2.0**-9] * 256):  # each is less than half of the smallest step of a bfloat16 number at 1
        layer.weight.grad = torch.full_like(layer.weight, part)
        masters.take_gradients()
    assert layer.weight.grad is None
    assert masters.parameters["weight"].grad.unique().tolist() == [1.5]


def test_float32_parameters_are_their_own_masters():
    model = tiny_model()
    assert all(master is model.get_parameter(name) for name, master in MasterWeights(model).parameters.items())


@pytest.mark.parametrize("name", SETTINGS)
def test_a_run_goes_on_as_if_it_had_not_stopped(name, tmp_path):
    config = run_config("smoke", "v05", SETTINGS[name], total_rollouts=192, checkpoint_seconds=0)
    trainer = Trainer(config, tmp_path / "whole", lambda line: None)
    for done, _ in enumerate(trainer.run()):
        if done == 1:
            shutil.copytree(tmp_path / "whole", tmp_path / "halves")
    trained = load_file(find_checkpoints(tmp_path / "halves")[-1] / "policy.safetensors")
    assert all(value.dtype == torch.float32 for value in trained.values())
    assert all(".lora_" in name for name in trained) == (config.policy.lora is not None)
    train(config, tmp_path / "halves")
    assert untimed(tmp_path / "halves") == untimed(tmp_path / "whole")
    assert policy_digest(tmp_path / "halves") == policy_digest(tmp_path / "whole")
    saved = AutoModelForCausalLM.from_pretrained(tmp_path / "halves" / "policy")  # its config.json names the dtype
    assert saved.dtype == getattr(torch, config.policy.dtype)
    if config.policy.lora is None:
        masters = trainer.learner.masters.parameters
        assert all(torch.equal(p, masters[name].bfloat16()) for name, p in saved.named_parameters())
        assert any(not torch.equal(p.float(), masters[name]) for name, p in saved.named_parameters())


def test_a_policy_in_bfloat16_learns(tmp_path):
    settings = ["policy.dtype=bfloat16", "optimizer.learning_rate=1e-3", "loss.importance_cap=2", "evaluation.final_samples=0"]
    config = run_config("smoke", "grpo", settings, total_rollouts=4000, rollouts_per_step=128)
    trainer = Trainer(config, tmp_path, lambda line: None)
    trainer.task.verify = lambda prompt, completion: float(completion.startswith("1"))
    list(trainer.run())
    steps = read_metrics(tmp_path, "step")
    assert np.mean([s["accuracy"] for s in steps[-5:]]) > np.mean([s["accuracy"] for s in steps[:5]]) + 0.3
    assert max(s["mismatch"] for s in steps) < 0.02


@pytest.mark.parametrize("scale", [1.0, 4.0], ids=["flat", "peaked"])
def test_the_engine_and_the_learner_agree_within_rounding(scale):
    """Log-probabilities of sampled tokens in bfloat16, from the engine and from the learner, against float64."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(LlamaConfig(**tiny_model().config.to_diff_dict() | {"num_hidden_layers": 8})).eval()
    with torch.no_grad():
        model.lm_head.weight *= 20 * scale
    model = model.to(torch.bfloat16)
    assert output_layer(model) is not None
    engine = TransformersEngine(model, tiny_tokenizer(), max_new_tokens=16)
    requests = [Request((2 + i % 10, 3, 4), seed=i) for i in range(64)]
    completions = generate(engine, requests)
    prompts = [request.prompt for request in requests]
    learner = completion_logprobs(model, prompts, completions, 0).detach().double().numpy()
    exact = completion_logprobs_in_float64(copy.deepcopy(model).double(), prompts, completions)
    rows = zip(completions, learner, exact, strict=True)
    ours = np.concatenate([np.stack((c.logprobs, row[: len(c.tokens)], truth)) for c, row, truth in rows], axis=1)
    assert np.abs(ours[0] - ours[1]).mean() < 0.02 * scale
    assert np.abs(ours[1] - ours[2]).mean() < 0.02 * scale


def completion_logprobs_in_float64(model, prompts, completions):
    for prompt, completion in zip(prompts, completions, strict=True):
        logits = model(input_ids=torch.tensor([[*prompt, *completion.tokens.tolist()]])).logits[0, len(prompt) - 1 : -1]
        tokens = torch.from_numpy(completion.tokens)[:, None]
        yield torch.log_softmax(logits, -1).gather(1, tokens)[:, 0].detach().numpy()
