"""Prompts, splits and verifiers: right answers pass, junk never passes, and nothing raises."""

import itertools

import pytest
from pydantic import ValidationError

from v05.tasks import HELDOUT_SHARE, ReasoningGymConfig, Source, heldout_set, make_task, split_of
from v05.tasks.reasoning_gym import ReasoningGymTask
from v05.tasks.scorers import STATED
from v05.train.presets import PRESETS

JUNK = ["", " ", "x", "-", "=", "0.5.1", "nan", "1e", "[]", "\n", "9" * 40, "()", "None", "\x00", "½"]


@pytest.mark.parametrize("preset", [name for name, fields in PRESETS.items() if not fields.get("chat")])
def test_preset_verifiers_take_answers_and_refuse_junk(preset):
    task = make_task(PRESETS[preset]["task"])
    for _, prompt in itertools.islice(task.prompts("train"), 300):
        assert task.verify(prompt, prompt.answer) == 1.0
        for junk in [*JUNK, prompt.answer + "x", prompt.answer + " 1", prompt.answer * 2 + "1"]:
            right = junk.strip() == prompt.answer == ""  # symbols can cancel out until the answer is empty
            assert task.verify(prompt, junk) == float(right), (prompt, junk)


@pytest.mark.parametrize("dataset", ["chain_sum", "products", "spell_backward", "prime_factorization", "gcd"])
def test_question_surface_never_raises_and_gives_no_partial_credit(dataset):
    task = ReasoningGymTask(ReasoningGymConfig(mix=(Source(dataset=dataset),)))
    for _, prompt in itertools.islice(task.prompts("train"), 20):
        assert task.verify(prompt, prompt.answer) == 1.0
        for junk in [*JUNK, f"the answer is {prompt.answer}, I think"]:
            assert task.verify(prompt, junk) == 0.0, junk


def test_splits_are_disjoint_and_stable():
    task = make_task(PRESETS["tiny"]["task"])
    heldout = heldout_set(task, 200)
    assert len({p.text for p in heldout}) == 200
    train = {p.text for _, p in itertools.islice(task.prompts("train"), 5000)}
    assert train.isdisjoint(p.text for p in heldout)
    assert [p.text for p in heldout_set(task, 200)] == [p.text for p in heldout]
    shares = [split_of(str(i)) == "heldout" for i in range(20_000)]
    assert sum(shares) / len(shares) == pytest.approx(HELDOUT_SHARE, abs=0.01)


def test_prompts_resume_where_they_stopped():
    task = make_task(PRESETS["tiny"]["task"])
    first = list(itertools.islice(task.prompts("train", start=7), 20))
    resumed = list(itertools.islice(task.prompts("train", start=first[9][0] + 1), 10))
    assert resumed == first[10:]


def test_a_small_source_gives_what_it_has():
    task = make_task(PRESETS["smoke"]["task"])
    assert 0 < len(heldout_set(task, 10_000, patience=1)) < 100


def test_prompts_of_a_size_return_in_another_order():
    mix = (Source(dataset="gsm_symbolic"), Source(dataset="gcd"))
    task = ReasoningGymTask(ReasoningGymConfig(mix=mix, size=40, surface="instruct"))
    stream = [p.text for _, p in itertools.islice(task.prompts("train"), 120)]
    epochs = [stream[i : i + 40] for i in (0, 40, 80)]
    assert len(set(epochs[0])) == 40
    assert sorted(epochs[0]) == sorted(epochs[1]) == sorted(epochs[2])
    assert epochs[0] != epochs[1] != epochs[2]
    assert [p.text for _, p in itertools.islice(task.prompts("train", start=53), 5)] == stream[53:58]
    heldout = {p.text for p in heldout_set(task, 100)}  # `size` does not limit held-out prompts
    assert len(heldout) == 100
    assert heldout.isdisjoint(stream)


def test_a_size_that_the_mix_has_not_is_refused():
    task = ReasoningGymTask(ReasoningGymConfig(mix=(Source(dataset="coin_flip", settings=dict(max_trials=4)),), size=1000))
    with pytest.raises(ValueError, match=r"task.size=1000, but the mix has only \d+ different training prompts; lower it"):
        next(task.prompts("train"))


def test_instruct_surface_asks_in_prose_and_reads_prose():
    config = ReasoningGymConfig(mix=(Source(dataset="chain_sum"),), surface="instruct", instruction="Think first.")
    task = ReasoningGymTask(config)
    assert task.may_stall
    _, prompt = next(task.prompts("train"))
    assert prompt.text.startswith(prompt.item[1]["question"])
    assert prompt.text.endswith("\nThink first.")
    for form in ("{}", "First 1 + 1 = 2. #### {}", r"It is $\boxed{{{}}}$.", "The answer is {}.", "The sum comes to {}."):
        assert task.verify(prompt, form.format(prompt.answer)) == 1.0, form
        assert task.verify(prompt, form.format(int(prompt.answer) + 1)) == 0.0, form
    assert task.verify(prompt, f"#### {prompt.answer}\nNo, the answer is #### 123456789.") == 0.0


@pytest.mark.parametrize("preset", [name for name, fields in PRESETS.items() if fields.get("chat")])
def test_presets_for_language_models_hold_their_prompts(preset):
    config = PRESETS[preset]["task"]
    task = make_task(config)
    training = {p.text for _, p in itertools.islice(task.prompts("train"), config.size)}
    heldout = heldout_set(task, PRESETS[preset]["evaluation"].prompts)
    assert len(training) == config.size
    assert len(heldout) >= 64
    assert training.isdisjoint(p.text for p in heldout)
    for prompt in heldout[:20]:
        assert task.verify(prompt, f"#### {prompt.answer}") == 1.0
        assert task.verify(prompt, f"#### {int(prompt.answer) + 1}") == 0.0


def test_instruct_surface_refuses_what_has_several_answers():
    with pytest.raises(ValueError, match=r"surface='instruct' .* 'countdown' has others; use 'question', or one of .*, chain_sum"):
        ReasoningGymTask(ReasoningGymConfig(mix=(Source(dataset="countdown"),), surface="instruct"))


@pytest.mark.parametrize("dataset", sorted(STATED))
def test_instruct_surface_takes_every_answer_of_its_data_sets(dataset):
    task = ReasoningGymTask(ReasoningGymConfig(mix=(Source(dataset=dataset),), surface="instruct"))
    for _, prompt in itertools.islice(task.prompts("train"), 10):
        assert task.verify(prompt, f"I think it is so. #### {prompt.answer}") == 1.0, prompt
        assert task.verify(prompt, "I do not know.") == 0.0


def test_sum_surface_is_padded_and_reversed():
    config = ReasoningGymConfig(
        surface="terse",
        operand_width=3,
        mix=(Source(dataset="chain_sum", settings=dict(min_terms=2, max_terms=2, min_digits=2, max_digits=2)),),
    )
    _, prompt = next(ReasoningGymTask(config).prompts("train"))
    left, right = prompt.text[:3], prompt.text[4:7]
    assert prompt.text[3] in "+-"
    assert prompt.text[7] == "="
    assert int(prompt.answer[::-1]) == (int(left) + int(right) if prompt.text[3] == "+" else int(left) - int(right))


def test_unknown_settings_are_refused():
    with pytest.raises(ValidationError, match="surfaces"):
        ReasoningGymConfig.model_validate({"mix": [{"dataset": "gcd"}], "surfaces": "sum"})
