"""The embedded engine on the device, where CUDA graphs replay its steps: log-probabilities are those of a plain forward pass."""

import numpy as np
import pytest
import torch

pytest.importorskip("transformers")

from helpers.tiny_policy import tiny_model, tiny_tokenizer
from v05.rollout import Request, generate
from v05.rollout.scoring import completion_statistics
from v05.rollout.slots import SlotBatch
from v05.rollout.transformers_engine import TransformersEngine

pytestmark = pytest.mark.gpu
TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 0.1}  # nats
PROMPTS = [(3, 4, 5), (6, 7, 8, 9, 10, 11, 12, 13, 14), (2,), tuple(2 + i % 13 for i in range(30))]


def policy(device, dtype=torch.float32):
    model = tiny_model().eval()
    with torch.no_grad():
        model.lm_head.weight *= 20
    return model.to(device, dtype)


def requests(count, **settings):
    return [Request(PROMPTS[i % len(PROMPTS)], seed=i, **settings) for i in range(count)]


def assert_plain(model, wanted, completions):
    for request, completion in zip(wanted, completions, strict=True):
        ids = torch.tensor([[*request.prompt, *completion.tokens.tolist()]], device=model.device)
        logits = model(input_ids=ids, use_cache=False).logits[0, len(request.prompt) - 1 : -1].detach()
        plain = torch.log_softmax(logits.double(), -1).cpu().gather(1, torch.from_numpy(completion.tokens)[:, None]).squeeze(1)
        np.testing.assert_allclose(completion.logprobs, plain.numpy(), atol=TOLERANCE[model.dtype], rtol=0)


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("capacity", [3, 20])
def test_log_probabilities(capacity, dtype, device):
    model, wanted = policy(device, dtype), [*requests(40), *requests(4, greedy=True)]
    engine = TransformersEngine(model, tiny_tokenizer(), max_new_tokens=30, capacity=capacity)
    assert isinstance(engine._batch, SlotBatch)
    completions = generate(engine, wanted)
    assert_plain(model, wanted, completions)
    made = completion_statistics(model, [r.prompt for r in wanted], completions, 0)
    for row, squares, completion in zip(made.logprob.cpu(), made.sum_pi_squared.cpu(), completions, strict=True):
        n = len(completion.tokens)
        np.testing.assert_allclose(row[:n].detach().numpy(), completion.logprobs, atol=TOLERANCE[dtype], rtol=0)
        if dtype == torch.float32:
            np.testing.assert_allclose(squares[:n].detach().numpy(), completion.sum_pi_squared, rtol=1e-2)
    again = generate(engine, wanted)
    assert all(a.tokens.tolist() == b.tokens.tolist() for a, b in zip(completions, again, strict=True))


@pytest.mark.parametrize("sampling", [{"temperature": 0.7, "top_p": 0.9}, {"temperature": 0.0}, {"max_new_tokens": 1}])
def test_ways_to_sample(sampling, device):
    """The same tokens as on the CPU, unless a uniform number lies within rounding of the border between two tokens."""
    settings = {"max_new_tokens": 16, "capacity": 8} | sampling
    there = generate(TransformersEngine(policy(device), tiny_tokenizer(), **settings), requests(40))
    here = generate(TransformersEngine(policy("cpu"), tiny_tokenizer(), **settings), requests(40))
    same = [a.tokens.tolist() == b.tokens.tolist() for a, b in zip(there, here, strict=True)]
    assert np.mean(same) > 0.9
    for a, b, alike in zip(there, here, same, strict=True):
        if alike:
            np.testing.assert_allclose(a.logprobs, b.logprobs, atol=TOLERANCE[torch.float32])


@pytest.mark.parametrize("replaced", [False, True])
def test_weights_that_change_are_read(replaced, device):
    """New weights take effect, whether written in place, as an optimiser does, or as other tensors."""
    model, wanted = policy(device), requests(12)
    engine = TransformersEngine(model, tiny_tokenizer(), max_new_tokens=20, capacity=12)
    before = generate(engine, wanted)
    with torch.no_grad():
        for parameter in model.parameters():
            new = parameter + 0.2 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(0)).to(device)
            if replaced:
                parameter.data = new
            else:
                parameter.copy_(new)
    after = generate(engine, wanted)
    assert any(a.tokens.tolist() != b.tokens.tolist() for a, b in zip(before, after, strict=True))
    assert_plain(model, wanted, after)


def test_steps_are_replayed(cuda):
    """There is one graph per size. After the second run all of them are captured."""
    engine = TransformersEngine(policy(cuda), tiny_tokenizer(), max_new_tokens=30, capacity=40)
    for _ in range(2):
        generate(engine, requests(40))
    graphs = dict(engine._batch._graphs._graphs)
    assert graphs
    assert all(graph is not None for graph in graphs.values())
    generate(engine, requests(40))
    assert engine._batch._graphs._graphs == graphs
