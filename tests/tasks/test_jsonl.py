"""Tasks from JSON-lines files: rows in the form of published files, messages that name a bad row, and epochs."""

import codecs
import itertools
import json

import pytest

from v05.tasks import JsonlConfig
from v05.tasks.answers import verify_answer
from v05.tasks.check import check_task
from v05.tasks.jsonl import JsonlTask
from v05.tasks.rows import PROBLEM_FIELDS, TRAINING_FIELDS, read_rows


def written(path, *rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


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


def test_jsonl_needs_both_splits(tmp_path):
    path = tmp_path / "one.jsonl"
    path.write_text('{"prompt": "a", "answer": "1"}\n')
    with pytest.raises(ValueError, match=r"no (train|heldout) prompt in the file"):
        JsonlTask(JsonlConfig(path=path))


ROWS = {
    "prompt and answer": ({"prompt": "p", "answer": "4"}, "p", "4"),
    "capitals": ({"Problem": "p", "Answer": 4, "ID": 1}, "p", "4"),
    "question": ({"question": "p", "final_answer": ["4"]}, "p", "4"),
    "worked solution": ({"problem": "p", "solution": "It is \\boxed{3}, no, \\boxed{4}."}, "p", "4"),
    "gsm8k": ({"question": "p", "answer": "2+2=4\n#### 4"}, "p", "4"),
    "asdiv": (
        {"Body": "Two and two apples.", "Question": "How many?", "Answer": "4 (apples)"},
        "Two and two apples. How many?",
        "4",
    ),
    "svamp": ({"ID": "c", "Body": "Two and two.", "Question": "Sum?", "Answer": 4.0}, "Two and two. Sum?", "4"),
    "chat": ({"prompt": [{"role": "system", "content": "s"}, {"role": "user", "content": "u"}], "answer": "4"}, "s\n\nu", "4"),
    "truth": ({"prompt": "p", "answer": True}, "p", "true"),
}


@pytest.mark.parametrize(("row", "prompt", "right"), ROWS.values(), ids=ROWS)
def test_rows_as_published_files_have_them(tmp_path, row, prompt, right):
    (read,) = read_rows(written(tmp_path / "rows.jsonl", row), TRAINING_FIELDS)
    assert read.prompt == prompt
    assert verify_answer(read.reference, right) == 1.0
    assert verify_answer(read.reference, "3") == 0.0


def test_the_first_field_that_is_asked_for_counts(tmp_path):
    path = written(tmp_path / "rows.jsonl", {"prompt": "long", "problem": "short", "answer": "4"})
    assert [row.prompt for row in read_rows(path, TRAINING_FIELDS)] == ["long"]
    assert [row.prompt for row in read_rows(path, PROBLEM_FIELDS)] == ["short"]


def test_a_chat_keeps_its_messages(tmp_path):
    parts = [{"type": "text", "text": "1+"}, {"type": "text", "text": "1"}]
    chat = [{"role": "system", "content": "be short"}, {"role": "user", "content": parts}]
    (row,) = read_rows(written(tmp_path / "rows.jsonl", {"prompt": chat, "answer": 2}), TRAINING_FIELDS)
    assert row.messages == (("system", "be short"), ("user", "1+1"))


def test_a_byte_order_mark_and_blank_lines_are_nothing(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(codecs.BOM_UTF8 + b'{"prompt": "p", "answer": 4}\r\n\r\n{"prompt": "q", "answer": 5}')
    assert [row.prompt for row in read_rows(path, TRAINING_FIELDS)] == ["p", "q"]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "give one JSON object a line"),
        ("[1]", "holds no JSON object but .*give one a line"),
        ('"text"', "holds no JSON object"),
        ('{"prompt": "a"}', "none of answer, final_answer, solution is among the fields prompt; rename one"),
        ('{"text": "a", "answer": 1}', "none of prompt, problem, question is among the fields text, answer; rename one"),
        ('{"prompt": "a", "answer": ""}', "answer is empty"),
        ('{"prompt": "a", "answer": "  "}', "answer: the answer '  ' is empty"),
        ('{"prompt": "a", "answer": {"value": 1}}', "is neither text nor a finite number"),
        ('{"prompt": "a", "answer": NaN}', "nan is neither text nor a finite number"),
        ('{"prompt": {"a": 1}, "answer": 1}', "prompt=.* is neither text nor a list of messages"),
        ('{"prompt": [{"role": "user"}], "answer": 1}', "is not a message; give"),
        ('{"prompt": "a", "solution": "so it is 4"}', "the solution marks no answer"),
        ('{"prompt": "a", "answer": ' + "1" * 5000 + "}", "Exceeds the limit"),
        ('{"prompt": "\\ud800", "answer": 1}', "surrogates not allowed"),
    ],
)
def test_a_bad_line_is_named(tmp_path, line, message):
    path = tmp_path / "bad.jsonl"
    path.write_text('{"prompt": "a", "answer": "1"}\n' + line + "\n")
    with pytest.raises(ValueError, match=rf"bad\.jsonl, line 2.*{message}"):
        JsonlTask(JsonlConfig(path=path))


def test_another_encoding_is_named(tmp_path):
    path = tmp_path / "bad.jsonl"
    path.write_text('{"prompt": "a", "answer": "1"}\n', encoding="utf-16")
    with pytest.raises(ValueError, match=r"bad\.jsonl, line 1 is UTF-16; convert the file to UTF-8"):
        JsonlTask(JsonlConfig(path=path))


def test_a_task_is_checked_before_it_is_trained_on(tmp_path):
    rows = [("a", "41"), ("a", "42"), ("b", "Evelyn"), ("c", ""), ("d", "x^2 + 1"), ("e", "1; 2"), ("f", "a } b"), ("b", "evelyn")]
    checked = check_task(written(tmp_path / "rows.jsonl", *({"prompt": p, "answer": a} for p, a in rows)))
    assert [row.kind for row in checked] == ["number", "number", "text", "unreadable", "formula", "parts", "text", "text"]
    assert [row.line for row in checked if row.cannot_earn] == [4, 7]
    assert checked[3].reads == "line 4: answer is empty; give it a value"
    assert [(row.line, row.repeats, row.contradicts) for row in checked if row.repeats] == [(2, 1, True), (8, 3, False)]
    assert checked[5].reads == "number 1 and number 2"
