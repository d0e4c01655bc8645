"""Slots: log-probabilities equal those of a plain pass over each rollout, whatever rollouts join and leave, and a step fits a CUDA
graph.
"""

import numpy as np
import pytest
import torch
from transformers import Qwen3Config, Qwen3ForCausalLM

from helpers.tiny_policy import tiny_model, tiny_tokenizer
from v05.rollout import NotFiniteError, Request, generate
from v05.rollout import transformers_engine as engine_module
from v05.rollout.batch import RowBatch
from v05.rollout.sampling import BLOCK, Sampler, inverse_cdf
from v05.rollout.scoring import completion_statistics
from v05.rollout.slots import LOOK_EVERY, Capturable, SlotBatch, fits_slots
from v05.rollout.transformers_engine import JOIN_EVERY, TransformersEngine

POSITIONS = 64  # positions of tiny_model
PROMPTS = [(3, 4, 5), (6, 7, 8, 9, 10, 11, 12, 13, 14), (2,), (8, 8, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 3, 4, 5)]


class AsOnCuda:
    """A stand-in for CUDA graphs. It runs the same steps: of few sizes, and several between two looks at the results."""

    def __init__(self):
        self.sizes, self.addresses = [], []

    def run(self, size, step, count, addresses):
        for _ in range(count):
            self.sizes.append(size)
            self.addresses.append(addresses)
            step()


@pytest.fixture(scope="module")
def model():
    model = tiny_model().eval()
    with torch.no_grad():
        model.lm_head.weight *= 40
    return model


@pytest.fixture(params=["as on the CPU", "as on CUDA"])
def engine_of(request, model):
    """engine_of(max_new_tokens=..., ...): makes an engine with slots."""

    def make(model=model, **settings):
        engine = TransformersEngine(model, tiny_tokenizer(), **settings)
        assert isinstance(engine._batch, SlotBatch)
        if request.param == "as on CUDA":
            engine._batch._graphs, engine._batch.look_every = AsOnCuda(), LOOK_EVERY
        return engine

    return make


def requests(count):
    return [Request(PROMPTS[i % len(PROMPTS)], seed=i) for i in range(count)]


def assert_plain(model, wanted, completions, tolerance=1e-4):
    """Log-probabilities and sums of squares equal those of a pass over each sequence without a cache."""
    for request, completion in zip(wanted, completions, strict=True):
        logits = model(input_ids=torch.tensor([[*request.prompt, *completion.tokens]]), use_cache=False).logits[0].detach()
        log_p = torch.log_softmax(logits[len(request.prompt) - 1 : -1].double(), dim=-1)
        plain = log_p.gather(-1, torch.from_numpy(completion.tokens)[:, None]).squeeze(-1)
        np.testing.assert_allclose(completion.logprobs, plain.numpy(), atol=tolerance, rtol=0)
        squares = log_p.exp().square().sum(-1).numpy()
        np.testing.assert_allclose(completion.sum_pi_squared, squares, rtol=10 * tolerance)


@pytest.mark.parametrize("capacity", [1, 3, 8, 100])
def test_rollouts_that_wait_and_join_late(capacity, engine_of, model):
    wanted = requests(24)
    engine = engine_of(max_new_tokens=2 * JOIN_EVERY, capacity=capacity)
    completions = generate(engine, wanted)
    lengths = [len(c.tokens) for c in completions]
    assert min(lengths) < JOIN_EVERY < max(lengths) == 2 * JOIN_EVERY
    assert_plain(model, wanted, completions)
    assert all(a.logprobs.tobytes() == b.logprobs.tobytes() for a, b in zip(completions, generate(engine, wanted), strict=True))


def test_slots_and_rows_sample_the_same(engine_of, model, monkeypatch):
    wanted = [*requests(16), *(Request(prompt, 5, greedy=True) for prompt in PROMPTS)]
    slots = generate(engine_of(max_new_tokens=12, capacity=6), wanted)
    monkeypatch.setattr(engine_module, "fits_slots", lambda model: False)
    engine = TransformersEngine(model, tiny_tokenizer(), max_new_tokens=12, capacity=6)
    assert isinstance(engine._batch, RowBatch)
    for a, b in zip(slots, generate(engine, wanted), strict=True):
        assert a.tokens.tolist() == b.tokens.tolist()
        assert a.finished == b.finished
        np.testing.assert_allclose(a.logprobs, b.logprobs, atol=1e-4)


def test_completions_of_one_token(engine_of, model):
    wanted = requests(9)
    completions = generate(engine_of(max_new_tokens=1, capacity=4), wanted)
    assert {len(c.tokens) for c in completions} == {1}
    assert_plain(model, wanted, completions)


def test_a_prompt_that_leaves_just_enough_positions(engine_of, model):
    new = 10
    longest = tuple(2 + i % 13 for i in range(POSITIONS - new))
    wanted = [Request(longest, 0), Request((3, 4), 1), Request(longest[:-1], 2)]
    with torch.no_grad():
        bias = model.lm_head.weight[1].clone()
        model.lm_head.weight[1] = 0  # this model never ends a completion itself
    completions = generate(engine_of(max_new_tokens=new), wanted)
    assert max(len(c.tokens) for c in completions) == new
    assert_plain(model, wanted, completions)
    with torch.no_grad():
        model.lm_head.weight[1] = bias


def test_longer_prompts_and_more_rollouts_than_before(engine_of, model):
    """Slots grow in number and in length while some are in use."""
    engine = engine_of(max_new_tokens=24, capacity=200)
    first, rest = requests(1), [Request(tuple(2 + i % 13 for i in range(5 + n % 35)), 10 + n) for n in range(120)]
    wanted = [*first, *rest]
    engine.submit([0], first)
    done = {}
    while not engine._batch._cache.columns:
        done |= engine.poll()
    engine.submit(range(1, 121), rest)
    while polled := engine.poll():
        done |= polled
    assert engine._batch._cache.keys.shape[1] > 64
    assert_plain(model, wanted, [done[key] for key in range(len(wanted))])


@pytest.mark.parametrize("replaced", [False, True])
def test_weights_that_change_between_polls_are_read(replaced, engine_of):
    model = tiny_model().eval()
    engine = engine_of(model, max_new_tokens=20, capacity=4)
    wanted = requests(8)
    generate(engine, wanted)
    engine.submit(range(8), wanted)
    engine.poll()
    torch.manual_seed(3)
    with torch.no_grad():
        for parameter in model.parameters():
            new = parameter + 0.1 * torch.randn_like(parameter)
            if replaced:
                parameter.data = new
            else:
                parameter.copy_(new)
    addresses = engine._batch._addresses()
    while engine.poll():
        pass
    assert_plain(model, wanted, generate(engine, wanted))
    if isinstance(engine._batch._graphs, AsOnCuda):  # new addresses of weights need new graphs
        seen = engine._batch._graphs.addresses
        assert (seen[0] == seen[-1]) != replaced
        assert seen[-1] == addresses


def test_polls_in_the_middle(engine_of, model):
    engine = engine_of(max_new_tokens=30, capacity=5)
    wanted = requests(20)
    done = {}
    for key, request in enumerate(wanted):
        engine.submit([key], [request])
        if key % 3 == 2:
            done |= engine.poll()
    while polled := engine.poll():
        assert not done.keys() & dict(polled).keys()
        done |= polled
    assert_plain(model, wanted, [done[key] for key in range(20)])


@pytest.mark.parametrize("engine_of", ["as on CUDA"], indirect=True)
def test_sizes_are_few(engine_of):
    engine = engine_of(max_new_tokens=40, capacity=50)
    for count in (50, 37, 3):
        generate(engine, requests(count))
    sizes = set(engine._batch._graphs.sizes)
    assert sizes <= {(slots, columns) for slots in (16, 32, 64) for columns in (64, 128)}
    assert len(set(engine._batch._graphs.addresses)) == 1


def test_after_a_policy_that_is_not_finite(engine_of):
    """A good policy does not see what the slots hold of a bad one."""
    model = tiny_model().eval()
    engine, wanted = engine_of(model, max_new_tokens=12), requests(4)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with torch.no_grad():
        model.model.layers[0].self_attn.v_proj.weight.fill_(float("nan"))
    engine.submit(range(4), wanted)
    with pytest.raises(NotFiniteError):
        engine.poll()
    model.load_state_dict(before)
    assert_plain(model, wanted, generate(engine, wanted))


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 2e-5), (torch.bfloat16, 0.1)])
def test_log_probabilities_are_the_trainers(dtype, tolerance, engine_of):
    """In bfloat16 an activation is rounded to 1 in 256. It may round differently where kernels add in another order."""
    torch.manual_seed(0)
    config = Qwen3Config(vocab_size=700, hidden_size=64, intermediate_size=128, num_hidden_layers=4, num_attention_heads=4)
    config.num_key_value_heads, config.head_dim, config.eos_token_id, config.pad_token_id = 2, 16, 1, 0
    model = Qwen3ForCausalLM(config).eval().to(dtype)
    with torch.no_grad():
        model.lm_head.weight *= 10
    wanted = requests(12)
    completions = generate(engine_of(model, max_new_tokens=24, capacity=5), wanted)
    made = completion_statistics(model, [r.prompt for r in wanted], completions, 0)
    differences = [row[: len(c.logprobs)] - torch.from_numpy(c.logprobs) for row, c in zip(made.logprob, completions, strict=True)]
    assert torch.cat(differences).abs().max() < tolerance
    if dtype == torch.bfloat16:
        assert torch.cat(differences).abs().mean() < tolerance / 5
        return
    for row, completion in zip(made.sum_pi_squared, completions, strict=True):
        squares = torch.from_numpy(completion.sum_pi_squared)
        torch.testing.assert_close(row[: len(squares)].double(), squares, rtol=1e-4, atol=0)


@pytest.mark.parametrize("sampling", [{}, {"temperature": 0.7, "top_p": 0.9}, {"temperature": 0.0}])
def test_a_step_asks_the_device_nothing(sampling, engine_of):
    engine = engine_of(max_new_tokens=12, capacity=4, **sampling)
    engine.submit(range(4), requests(4))
    engine.poll()
    with torch.no_grad(), Capturable():
        engine._batch._step(4, 64)


@pytest.mark.parametrize(
    "ask",
    [
        lambda x: x.sum().item(),
        lambda x: x[x > 0],
        lambda x: x.nonzero(),
        lambda x: x.masked_fill_(x > 1, 0)[torch.tensor([True, False])],
        lambda x: x.to("meta"),
        lambda x: torch.empty(2, device="meta").copy_(x),
        bool,
    ],
)
def test_what_no_graph_can_hold_is_refused(ask):
    x = torch.tensor([[1.0, 2.0], [0.0, 3.0]])[0, :1] if ask is bool else torch.tensor([1.0, 2.0])
    with Capturable(), pytest.raises(RuntimeError, match="waits for the device"):
        ask(x)


def test_which_models_have_slots(model):
    assert fits_slots(model)
    eager = tiny_model()
    eager.config._attn_implementation = "eager"
    windowed = Qwen3ForCausalLM(
        Qwen3Config(hidden_size=32, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2, vocab_size=15)
    )
    assert fits_slots(windowed)
    windowed.config.sliding_window, windowed.config.layer_types = 6, ["sliding_attention", "full_attention"]
    dynamic = tiny_model()
    dynamic.model.rotary_emb.rope_type = "dynamic"
    assert [fits_slots(each) for each in (eager, windowed, dynamic)] == [False] * 3


@pytest.mark.parametrize("vocabulary", [7, BLOCK, BLOCK + 1, 5 * BLOCK - 3])
def test_inverse_cdf_of_a_long_vocabulary(vocabulary):
    """Compared with the float64 definition, except where a uniform number lies within rounding of a border."""
    random = np.random.default_rng(0)
    pi = np.exp(3 * random.standard_normal((40, vocabulary)))
    pi[:, ::3] = 0
    pi = (pi / pi.sum(-1, keepdims=True)).astype(np.float32)
    u = random.random(40)
    cdf = pi.astype(np.float64).cumsum(-1)
    wanted = (cdf / cdf[:, -1:] > u[:, None]).argmax(-1)
    near = np.abs(cdf / cdf[:, -1:] - u[:, None]).min(-1) < 1e-6
    found = inverse_cdf(torch.from_numpy(pi), torch.from_numpy(u)).numpy()
    assert (found == wanted)[~near].all()
    assert near.mean() < 0.1
    for extreme, token in ((0.0, pi[0].nonzero()[0][0]), (1 - 2.0**-53, pi[0].nonzero()[0][-1])):
        assert inverse_cdf(torch.from_numpy(pi[:1]), torch.tensor([extreme], dtype=torch.float64)).tolist() == [token]


def test_statistics_of_a_draw_are_those_of_float64():
    torch.manual_seed(0)
    logits = (5 * torch.randn(64, 5000)).requires_grad_(False)
    uniform = torch.rand(64, dtype=torch.float64)
    token, logprob, squares = Sampler().draw(logits, uniform, torch.zeros(64, dtype=torch.bool))
    exact = torch.log_softmax(logits.double(), -1)
    torch.testing.assert_close(logprob.double(), exact.gather(1, token[:, None]).squeeze(1), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(squares.double(), exact.exp().square().sum(-1), rtol=1e-5, atol=0)
