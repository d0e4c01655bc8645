"""Statistics of completions. They come from hidden states if the model's logits are just those of its output layer."""

import numpy as np
import pytest
import torch
import transformers
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import AutoModelForCausalLM

from helpers.tiny_policy import tiny_model
from v05.rollout import Completion
from v05.rollout.scoring import checkpointed_layers, completion_statistics, output_layer

SIZES = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "pad_token_id": 0,
    "eos_token_id": 1,
    "bos_token_id": None,
}


def model_of(name, vocabulary=32, **settings):
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(getattr(transformers, name)(vocab_size=vocabulary, **SIZES | settings)).eval()


def completions_of(lengths, vocabulary):
    random = np.random.default_rng(0)
    rows = [random.integers(vocabulary, size=n) for n in lengths]
    return [Completion(row, np.zeros(len(row), dtype=np.float32), True) for row in rows]


@pytest.mark.parametrize(
    ("name", "settings", "is_all"),
    [
        ("Qwen3Config", {}, True),
        ("Gemma2Config", {}, False),  # caps its logits
        ("Gemma2Config", {"final_logit_softcapping": None}, True),
        ("CohereConfig", {"logit_scale": 0.25}, False),
        ("GraniteConfig", {"logits_scaling": 8.0}, False),
    ],
)
def test_what_else_is_done_to_logits_is_done(name, settings, is_all):
    model = model_of(name, **settings)
    assert (output_layer(model) is not None) == is_all
    prompts, completions = [(3, 4, 5), (6, 7)], completions_of((4, 2), 32)
    made = completion_statistics(model, prompts, completions, 0)
    for row, (prompt, completion) in enumerate(zip(prompts, completions, strict=True)):
        tokens = torch.from_numpy(completion.tokens)
        logits = model(input_ids=torch.tensor([[*prompt, *completion.tokens.tolist()]])).logits[0, len(prompt) - 1 : -1]
        log_p = torch.log_softmax(logits.double(), -1)
        length = len(tokens)
        logprob = log_p.gather(1, tokens[:, None])[:, 0]
        torch.testing.assert_close(made.logprob[row, :length].double(), logprob, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(made.entropy[row, :length].double(), -(log_p.exp() * log_p).sum(-1), rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(made.sum_pi_squared[row, :length].double(), log_p.exp().square().sum(-1), rtol=1e-4, atol=1e-5)
        assert (made.logprob[row, length:] == 0).all()


class Largest(TorchDispatchMode):
    """Records the bytes of the largest tensor that is made inside this context."""

    bytes = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        made = func(*args, **(kwargs or {}))
        self.bytes = max([self.bytes, *(leaf.nbytes for leaf in tree_leaves(made) if isinstance(leaf, torch.Tensor))])
        return made


def test_logits_of_all_tokens_are_never_held():
    vocabulary, rollouts, width = 4096, 300, 24
    model = model_of("Qwen3Config", vocabulary)
    completions = completions_of([width] * rollouts, vocabulary)
    with Largest() as largest:
        completion_statistics(model, [(3, 4)] * rollouts, completions, 0).logprob.sum().backward()
    assert 0 < largest.bytes < 0.7 * rollouts * width * vocabulary * 4


def test_the_layer_is_looked_for_once(monkeypatch):
    model = tiny_model()
    assert output_layer(model) is not None
    monkeypatch.setattr(model, "get_output_embeddings", lambda: None)
    assert output_layer(model) is not None


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("Qwen3Config", {}),
        ("Gemma2Config", {"layer_types": ["sliding_attention", "full_attention", "full_attention"], "sliding_window": 4}),
        ("Lfm2Config", {"layer_types": ["conv", "full_attention", "conv"]}),
    ],
)
def test_checkpointing_keeps_the_gradient_and_little_else(name, settings):
    model = model_of(name, num_hidden_layers=3, **settings)
    prompts, completions = [(3, 4, 5), (6, 7), (3, 4, 5)], completions_of((14, 2, 9), 32)
    made, gradients, kept = [], [], []
    for checkpointing in (False, True):
        model.zero_grad()
        memory = Kept()
        with memory:
            logprob = completion_statistics(model, prompts, completions, 0, 14, checkpointing).logprob
        logprob.square().sum().backward()
        made.append(logprob.detach())
        gradients.append(torch.cat([p.grad.flatten() for p in model.parameters()]))
        kept.append(memory.bytes)
    torch.testing.assert_close(made[1], made[0], rtol=1e-5, atol=1e-5)
    assert (gradients[1] - gradients[0]).norm() < 1e-5 * gradients[0].norm()
    assert kept[1] < kept[0] / 2
    assert not any("forward" in vars(module) for module in model.modules())


class Kept(torch.autograd.graph.saved_tensors_hooks):
    """Records the bytes kept for backward passes inside this context. A tensor counts as often as it is kept."""

    def __init__(self):
        super().__init__(self.keep, lambda tensor: tensor)
        self.bytes = 0

    def keep(self, tensor):
        self.bytes += tensor.nbytes
        return tensor


def test_layers_that_cannot_be_checkpointed_are_refused():
    model = tiny_model()
    model.model.layers = torch.nn.ModuleList()
    with pytest.raises(ValueError, match=r"gradient_checkpointing=True: .* model_type='llama'"):
        checkpointed_layers(model)
