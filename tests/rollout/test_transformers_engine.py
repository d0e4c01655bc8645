"""The embedded engine: seeds, log-probabilities, ends, and the distribution of its samples."""

import numpy as np
import pytest
import torch
from transformers import Qwen3ForCausalLM

from v05.rollout import Request, generate
from v05.rollout.sampling import inverse_cdf, uniforms
from v05.rollout.scoring import completion_logprobs
from v05.rollout.transformers_engine import JOIN_EVERY, TransformersEngine
from v05.train.config import PolicyConfig
from v05.train.policy import character_decoder, character_tokenizer

PROMPTS = ["1+1=", "012-345=", "7*8=", "1+1="]


@pytest.fixture(scope="module")
def policy():
    torch.manual_seed(0)
    tokenizer = character_tokenizer()
    model = character_decoder(PolicyConfig(hidden_size=32, layers=2, heads=2, intermediate_size=64), len(tokenizer))
    with torch.no_grad():  # make the end-of-sequence token likely enough to occur
        model.model.embed_tokens.weight *= 8
    return model, tokenizer


def requests(tokenizer, count=32):
    prompts = [tuple(tokenizer(p)["input_ids"]) for p in PROMPTS]
    return [Request(prompts[i % len(prompts)], seed=i) for i in range(count)]


def engine(policy, **settings):
    return TransformersEngine(*policy, max_new_tokens=settings.pop("max_new_tokens", 6), **settings)


def test_a_rollout_depends_on_its_seed_not_on_its_batch(policy):
    wanted = requests(policy[1])
    together = generate(engine(policy), wanted)
    apart = generate(engine(policy, capacity=5), wanted[::-1])[::-1]
    again = generate(engine(policy), [Request(r.prompt, r.seed + 1000) for r in wanted])
    for a, b in zip(together, apart, strict=True):
        assert a.tokens.tolist() == b.tokens.tolist()
        np.testing.assert_allclose(a.logprobs, b.logprobs, atol=1e-4)
    assert any(a.tokens.tolist() != b.tokens.tolist() for a, b in zip(together, again, strict=True))


def test_rollouts_that_join_midway_are_those_sampled_alone(policy):
    _, tokenizer = policy
    limit = 5 * JOIN_EVERY
    wanted = requests(tokenizer, 40)
    small = engine(policy, max_new_tokens=limit, capacity=6)
    together = generate(small, wanted)
    lengths = [len(c.tokens) for c in together]
    assert min(lengths) < JOIN_EVERY < 2 * JOIN_EVERY < max(lengths)
    for request, completion in zip(wanted, together, strict=True):
        (alone,) = generate(engine(policy, max_new_tokens=limit), [request])
        assert alone.tokens.tolist() == completion.tokens.tolist()
        np.testing.assert_allclose(completion.logprobs, alone.logprobs, atol=1e-4)
    again = generate(small, wanted)
    assert all(a.logprobs.tobytes() == b.logprobs.tobytes() for a, b in zip(together, again, strict=True))


def test_layers_with_a_sliding_window(policy):
    _, tokenizer = policy
    torch.manual_seed(1)
    config = character_decoder(PolicyConfig(hidden_size=32, layers=2, heads=2, intermediate_size=64), len(tokenizer)).config
    config.sliding_window, config.layer_types = 6, ["sliding_attention", "full_attention"]
    model = Qwen3ForCausalLM(config).eval()
    with torch.no_grad():
        model.model.embed_tokens.weight *= 8
    wanted = requests(tokenizer, 24)
    completions = generate(engine((model, tokenizer), max_new_tokens=3 * JOIN_EVERY, capacity=6), wanted)
    for request, completion in zip(wanted, completions, strict=True):
        ids = torch.tensor([[*request.prompt, *completion.tokens]])
        naive = torch.log_softmax(model(input_ids=ids).logits[0], dim=-1)[len(request.prompt) - 1 : -1]
        naive = naive.gather(-1, torch.from_numpy(completion.tokens)[:, None]).squeeze(-1)
        np.testing.assert_allclose(completion.logprobs, naive.detach().numpy(), atol=1e-4, rtol=1e-4)


def test_finished_rollouts_come_back_while_others_go_on(policy):
    some = engine(policy, max_new_tokens=40)
    wanted = requests(policy[1], 32)
    some.submit(range(100, 132), wanted)
    first = some.poll()
    assert 0 < len(first) < 32
    with pytest.raises(ValueError, match="update_weights: rollouts are in flight; poll until none is"):
        some.update_weights([])
    seen = [key for key, _ in first]
    while polled := some.poll():
        seen += [key for key, _ in polled]
    assert sorted(seen) == list(range(100, 132))


def test_updated_weights_are_sampled_from(policy):
    model, tokenizer = policy
    other = character_decoder(PolicyConfig(hidden_size=32, layers=2, heads=2, intermediate_size=64), len(tokenizer))
    replica = engine((other, tokenizer))
    wanted = requests(tokenizer)
    expected = generate(engine(policy), wanted)
    assert any(a.tokens.tolist() != b.tokens.tolist() for a, b in zip(expected, generate(replica, wanted), strict=True))
    replica.update_weights(model.state_dict().items())
    for a, b in zip(expected, generate(replica, wanted), strict=True):
        assert a.tokens.tolist() == b.tokens.tolist()
        assert a.logprobs.tobytes() == b.logprobs.tobytes()
    with pytest.raises(ValueError, match=r"update_weights: model.norm.weight of shape \(3,\) does not fit"):
        replica.update_weights([("model.norm.weight", torch.zeros(3))])


def test_logprobs_are_those_of_the_model_read_naively(policy):
    model, tokenizer = policy
    wanted = requests(tokenizer)
    completions = generate(engine(policy), wanted)
    shared = completion_logprobs(model, [r.prompt for r in wanted], completions, tokenizer.pad_token_id)
    for request, completion, row in zip(wanted, completions, shared, strict=True):
        ids = torch.tensor([[*request.prompt, *completion.tokens]])
        naive = torch.log_softmax(model(input_ids=ids).logits[0], dim=-1)[len(request.prompt) - 1 : -1]
        naive = naive.gather(-1, torch.from_numpy(completion.tokens)[:, None]).squeeze(-1)
        torch.testing.assert_close(row[: len(completion.tokens)], naive, atol=1e-4, rtol=1e-4)
        np.testing.assert_allclose(completion.logprobs, naive.detach().numpy(), atol=1e-4, rtol=1e-4)


def test_energies_are_those_of_the_model_read_naively(policy):
    model, tokenizer = policy
    wanted = requests(tokenizer)
    completions = generate(engine(policy, capacity=5), wanted)
    for request, completion in zip(wanted, completions, strict=True):
        ids = torch.tensor([[*request.prompt, *completion.tokens]])
        logits = model(input_ids=ids).logits[0, len(request.prompt) - 1 : -1].detach().requires_grad_()
        log_p = torch.log_softmax(logits, dim=-1)
        log_p.gather(-1, torch.from_numpy(completion.tokens)[:, None]).sum().backward()
        np.testing.assert_allclose(completion.sum_pi_squared, log_p.exp().square().sum(-1).detach().numpy(), rtol=1e-4)
        assert completion.energy == pytest.approx(float(logits.grad.square().sum()), rel=1e-4)


def test_gradients_through_shared_prompts_are_those_of_the_naive_pass(policy):
    model, tokenizer = policy
    wanted = requests(tokenizer, 8)
    completions = generate(engine(policy), wanted)

    def gradient(loss):
        model.zero_grad()
        loss.backward()
        return torch.cat([p.grad.flatten() for p in model.parameters()])

    shared = completion_logprobs(model, [r.prompt for r in wanted], completions, tokenizer.pad_token_id)
    mine = gradient(sum(row[: len(c.tokens)].sum() for row, c in zip(shared, completions, strict=True)))
    naive = torch.zeros(())
    for request, completion in zip(wanted, completions, strict=True):
        ids = torch.tensor([[*request.prompt, *completion.tokens]])
        logprobs = torch.log_softmax(model(input_ids=ids).logits[0], dim=-1)[len(request.prompt) - 1 : -1]
        naive = naive + logprobs.gather(-1, torch.from_numpy(completion.tokens)[:, None]).sum()
    expected = gradient(naive)
    assert (mine - expected).norm() < 1e-4 * expected.norm()


def test_completions_end_at_the_end_token_or_the_limit(policy):
    _, tokenizer = policy
    completions = generate(engine(policy), requests(tokenizer, 200))
    assert {c.finished for c in completions} == {True, False}
    for completion in completions:
        ends = completion.tokens == tokenizer.eos_token_id
        assert ends[:-1].sum() == 0
        assert ends[-1] == completion.finished
        assert completion.finished or len(completion.tokens) == 6
    assert len(generate(engine(policy, max_new_tokens=1), requests(tokenizer, 1))[0].tokens) == 1


def test_samples_follow_the_models_distribution(policy):
    model, tokenizer = policy
    prompt = tuple(tokenizer("1+1=")["input_ids"])
    completions = generate(engine(policy, max_new_tokens=1, capacity=5000), [Request(prompt, seed) for seed in range(20_000)])
    seen = np.bincount([c.tokens[0] for c in completions], minlength=len(tokenizer)) / 20_000
    expected = torch.softmax(model(input_ids=torch.tensor([prompt])).logits[0, -1], dim=-1).detach().numpy()
    assert np.abs(seen - expected).max() < 5 * np.sqrt(0.25 / 20_000)


def test_training_mode_is_left_as_it_was(policy):
    model, tokenizer = policy
    model.train()
    generate(engine(policy), requests(tokenizer, 1))
    assert model.training
    model.eval()


def test_inverse_cdf_covers_the_unit_interval():
    pi = torch.tensor([[0.25, 0.0, 0.75]], dtype=torch.float64).expand(4, 3)
    tokens = inverse_cdf(pi, torch.tensor([0.0, 0.2499, 0.2501, 1 - 2**-53], dtype=torch.float64))
    assert tokens.tolist() == [0, 0, 2, 2]


def test_uniforms_are_uniform_and_unrelated():
    u = uniforms(np.arange(5000, dtype=np.uint64), 8)
    assert u.min() >= 0
    assert u.max() < 1
    assert abs(u.mean() - 0.5) < 0.01
    assert abs(u.var() - 1 / 12) < 0.005
    correlation = np.corrcoef(np.vstack((u[:-1, 0], u[1:, 0], u[:-1, 1], u[1:, 1])))
    assert np.abs(correlation - np.eye(4)).max() < 0.06


def test_tokenizer_round_trip():
    tokenizer = character_tokenizer()
    text = "012+345=\n-7 (x)"
    ids = tokenizer(text)["input_ids"]
    assert len(ids) == len(text)
    assert tokenizer.decode(ids) == text
    assert tokenizer.decode([*ids, tokenizer.eos_token_id], skip_special_tokens=True) == text


def test_temperature_and_top_p_shape_what_is_sampled_from(policy):
    model, tokenizer = policy
    prompt = tuple(tokenizer("1+1=")["input_ids"])
    logits = model(input_ids=torch.tensor([prompt])).logits[0, -1].detach() / 0.5
    probabilities, order = torch.softmax(logits, -1).sort(descending=True)
    kept = order[probabilities.cumsum(-1) - probabilities < 0.9]  # the fewest tokens that together have probability 0.9
    expected = torch.softmax(logits[kept], -1)
    wanted = [Request(prompt, seed) for seed in range(2000)]
    completions = generate(engine(policy, max_new_tokens=1, temperature=0.5, top_p=0.9), wanted)
    tokens = torch.tensor([int(c.tokens[0]) for c in completions])
    assert set(tokens.tolist()) <= set(kept.tolist())
    seen = torch.stack([(tokens == token).float().mean() for token in kept])
    assert (seen - expected).abs().max() < 5 * (expected.max() / len(wanted)).sqrt()
    logprobs = torch.tensor([float(c.logprobs[0]) for c in completions])
    mine = torch.stack([expected[kept == token].log().squeeze() for token in tokens])
    torch.testing.assert_close(logprobs, mine, rtol=0, atol=1e-4)


def test_temperature_0_takes_the_likeliest_token(policy):
    model, tokenizer = policy
    for request, completion in zip(
        requests(tokenizer), generate(engine(policy, temperature=0.0), requests(tokenizer)), strict=True
    ):
        ids = torch.tensor([[*request.prompt, *completion.tokens]])
        likeliest = model(input_ids=ids).logits[0, len(request.prompt) - 1 : -1].argmax(-1)
        assert completion.tokens.tolist() == likeliest.tolist()
        assert (completion.logprobs == 0).all()
        assert completion.energy == 0


def test_greedy_requests_take_the_likeliest_token_beside_sampled_ones(policy):
    model, tokenizer = policy
    sampled = requests(tokenizer)
    greedy = [Request(r.prompt, r.seed, greedy=True) for r in sampled]
    both = generate(engine(policy), [r for pair in zip(sampled, greedy, strict=True) for r in pair])
    alone = generate(engine(policy), sampled)
    assert [c.tokens.tolist() for c in both[::2]] == [c.tokens.tolist() for c in alone]
    for request, completion in zip(greedy, both[1::2], strict=True):
        ids = torch.tensor([[*request.prompt, *completion.tokens]])
        log_p = torch.log_softmax(model(input_ids=ids).logits[0, len(request.prompt) - 1 : -1], -1)
        assert completion.tokens.tolist() == log_p.argmax(-1).tolist()
        torch.testing.assert_close(torch.tensor(completion.logprobs), log_p.amax(-1), rtol=0, atol=1e-4)
