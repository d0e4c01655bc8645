"""Prompts, splits and verifiers: right answers pass, junk never does, nothing raises."""

import itertools
import json

import pytest
from pydantic import ValidationError

from v05.tasks import HELDOUT_SHARE, JsonlConfig, ReasoningGymConfig, Source, heldout_set, make_task, split_of
from v05.tasks.jsonl import JsonlTask
from v05.tasks.reasoning_gym import ReasoningGymTask
from v05.train.config import PRESETS

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


@pytest.fixture
def arithmetic_file(tmp_path):
    path = tmp_path / "tasks.jsonl"
    path.write_text("".join(json.dumps({"prompt": f"What is {i}/2?", "answer": f"{i}/2"}) + "\n" for i in range(200)))
    return path


def test_jsonl_verifies_mathematically(arithmetic_file):
    task = JsonlTask(JsonlConfig(path=arithmetic_file))
    prompt = next(p for _, p in task.prompts("train") if p.answer == "5/2")
    assert task.verify(prompt, r"It is $\frac{5}{2}$") == 1.0
    assert task.verify(prompt, "$2.5$") == 1.0
    assert task.verify(prompt, "$2$") == 0.0
    assert task.verify(prompt, "") == 0.0


def test_jsonl_epochs_hold_every_prompt_once(arithmetic_file):
    task = JsonlTask(JsonlConfig(path=arithmetic_file))
    stream = [p.text for _, p in itertools.islice(task.prompts("train"), 400)]
    size = len(set(stream))
    assert len(set(stream[:size])) == size
    assert set(stream[:size]) == set(stream[size : 2 * size])
    assert stream[:size] != stream[size : 2 * size]
    resumed = [p.text for _, p in itertools.islice(task.prompts("train", start=size + 3), 5)]
    assert resumed == stream[size + 3 : size + 8]


@pytest.mark.parametrize("line", ["{", '{"prompt": "a"}', "[1]", '"text"'])
def test_jsonl_names_the_bad_line(tmp_path, line):
    path = tmp_path / "bad.jsonl"
    path.write_text('{"prompt": "a", "answer": "1"}\n' + line + "\n")
    with pytest.raises(ValueError, match=r"line 2: .*give one \{\"prompt\""):
        JsonlTask(JsonlConfig(path=path))


def test_jsonl_needs_both_splits(tmp_path):
    path = tmp_path / "one.jsonl"
    path.write_text('{"prompt": "a", "answer": "1"}\n')
    with pytest.raises(ValueError, match=r"no (train|heldout) prompt among its lines"):
        JsonlTask(JsonlConfig(path=path))


@pytest.mark.parametrize(
    ("answer", "right", "wrong"), [("2x+1", "$1+2x$", "$2$"), ("(3, \\pi)", "$(3, \\pi)$", "$3$"), ("12 apples", "12", "13")]
)
def test_jsonl_reads_bare_formulas_as_formulas(tmp_path, answer, right, wrong):
    path = tmp_path / "tasks.jsonl"
    path.write_text("".join(json.dumps({"prompt": str(i), "answer": answer}) + "\n" for i in range(40)))
    task = JsonlTask(JsonlConfig(path=path))
    _, prompt = next(task.prompts("train"))
    assert task.verify(prompt, right) == 1.0
    assert task.verify(prompt, wrong) == 0.0
