"""Prompts, splits and verifiers: right answers pass, junk never does, nothing raises."""

import itertools

import pytest
from pydantic import ValidationError

from v05.tasks import HELDOUT_SHARE, ReasoningGymConfig, Source, heldout_set, make_task, split_of
from v05.tasks.reasoning_gym import ReasoningGymTask
from v05.train.presets import PRESETS

JUNK = ["", " ", "x", "-", "=", "0.5.1", "nan", "1e", "[]", "\n", "9" * 40, "()", "None", "\x00", "½"]


@pytest.mark.parametrize("preset", PRESETS)
def test_preset_verifiers_take_answers_and_refuse_junk(preset):
    task = make_task(PRESETS[preset]["task"])
    for _, prompt in itertools.islice(task.prompts("train"), 300):
        assert task.verify(prompt, prompt.answer) == 1.0
        for junk in [*JUNK, prompt.answer + "x", prompt.answer + " 1", prompt.answer * 2 + "1"]:
            right = junk.strip() == prompt.answer == ""  # symbols can cancel out until nothing is left
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
