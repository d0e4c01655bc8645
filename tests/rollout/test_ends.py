"""Where completions end, which prompts fit, and policies that cannot be sampled."""

import pytest
import torch

from helpers.tiny_policy import tiny_model, tiny_tokenizer
from v05.rollout import NotFiniteError, Request, generate
from v05.rollout.transformers_engine import TransformersEngine


def ending_model(generation_config_ids):
    """A model that writes 4, then "+", then only sevens, whatever the prompt."""
    model, tokenizer = tiny_model(), tiny_tokenizer()
    after = {
        tokenizer.convert_tokens_to_ids(a): tokenizer.convert_tokens_to_ids(b) for a, b in (("=", "4"), ("4", "+"), ("+", "7"))
    }
    after[tokenizer.convert_tokens_to_ids("7")] = tokenizer.convert_tokens_to_ids("7")
    with torch.no_grad():
        for parameter in model.model.layers.parameters():  # the layers add nothing to the embeddings
            parameter.zero_()
        embedding = torch.eye(len(tokenizer), model.config.hidden_size)
        model.model.embed_tokens.weight.copy_(embedding)
        model.lm_head.weight.zero_()
        for before, then in after.items():
            model.lm_head.weight[then, before] = 100.0
    model.generation_config.eos_token_id = generation_config_ids
    return model, tokenizer


def test_a_completion_ends_at_every_id_of_the_generation_config():
    plus = tiny_tokenizer().convert_tokens_to_ids("+")
    for ids in ([1, plus], [plus], plus):
        model, tokenizer = ending_model(ids)
        engine = TransformersEngine(model, tokenizer, max_new_tokens=7)
        prompt = tuple(tokenizer("1=")["input_ids"])
        (completion,) = generate(engine, [Request(prompt, 0)])
        assert engine.decode(completion) == "4"
        assert completion.finished
        written = model.generate(torch.tensor([prompt]), max_new_tokens=7, do_sample=False)[0, len(prompt) :]
        assert completion.tokens.tolist() == written.tolist()
    model, tokenizer = ending_model(1)
    engine = TransformersEngine(model, tokenizer, max_new_tokens=7)
    (completion,) = generate(engine, [Request(prompt, 0)])
    assert (engine.decode(completion), completion.finished) == ("4 + 7 7 7 7 7", False)


def test_a_tokenizer_without_end_or_padding():
    model, tokenizer = tiny_model(), tiny_tokenizer()
    tokenizer.pad_token = None
    wanted = [Request(prompt, 0) for prompt in ((3, 4), (5, 6, 7))]
    expected = generate(TransformersEngine(model, tiny_tokenizer(), max_new_tokens=4), wanted)
    without = generate(TransformersEngine(model, tokenizer, max_new_tokens=4), wanted)
    assert [c.tokens.tolist() for c in without] == [c.tokens.tolist() for c in expected]
    tokenizer.eos_token = None
    TransformersEngine(model, tokenizer, max_new_tokens=4)  # the model's generation_config names an end token
    model.generation_config.eos_token_id = None
    with pytest.raises(ValueError, match=r"has no end-of-sequence token, and generation_config names none.*set eos_token in"):
        TransformersEngine(model, tokenizer, max_new_tokens=4)


def test_a_prompt_that_does_not_fit_is_refused_before_it_is_sampled():
    engine = TransformersEngine(tiny_model(), tiny_tokenizer(), max_new_tokens=10)
    engine.submit([0], [Request((3,) * 54, 0)])
    assert len(engine.poll()) == 1
    with pytest.raises(ValueError, match="max_new_tokens=10 after a prompt of 55 tokens does not fit the model's 64 positions; at"):
        engine.submit([0], [Request((3,) * 55, 0)])
    with pytest.raises(ValueError, match="a prompt of 64 tokens does not fit the model's 64 positions; shorten the prompt"):
        engine.submit([0], [Request((3,) * 64, 0)])
    with pytest.raises(ValueError, match="a prompt has no tokens"):
        engine.submit([0], [Request((), 0)])
    assert engine.poll() == []


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_policy_that_is_not_finite(temperature, value):
    model = tiny_model()
    engine = TransformersEngine(model, tiny_tokenizer(), max_new_tokens=10, temperature=temperature)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(value)
    engine.submit([0], [Request((3, 4), 0)])
    with pytest.raises(NotFiniteError, match="the policy is not finite: token 1 of a completion has no log-probability"):
        engine.poll()
    with pytest.raises(NotFiniteError, match="the policy is not finite: a pass over random tokens"):
        TransformersEngine(model, tiny_tokenizer(), max_new_tokens=10)
