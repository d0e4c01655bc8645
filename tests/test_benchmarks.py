"""Benchmarks: how problems are read and asked, how pass@k is counted, and how an interrupted evaluation resumes."""

import itertools
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from helpers import warm
from helpers.rollout_fakes import CoinEngine
from v05.benchmarks import (
    TEMPLATE,
    EvalConfig,
    Problem,
    Sample,
    SampleLog,
    _verified,
    pass_at_k,
    prompt_tokens,
    read_benchmark,
    sample_benchmarks,
    score,
    seed_of,
    write_results,
)
from v05.cli import app
from v05.prior.v0.logs import read_logs
from v05.rollout import Failure, Request
from v05.rollout.verifier import InlineVerifier
from v05.tasks import Prompt
from v05.tasks.answers import read_answer
from v05.tasks.jsonl import AnswerScorer
from v05.tasks.rows import ANSWER_FIELDS, PROBLEM_FIELDS
from v05.train.config import PolicyConfig
from v05.train.policy import character_decoder, character_tokenizer

CHAT = "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A random decoder over characters, with a chat template."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("policy") / "model"
    tokenizer = character_tokenizer()
    tokenizer.chat_template = CHAT
    character_decoder(PolicyConfig(hidden_size=32, layers=1, heads=2, intermediate_size=32), len(tokenizer)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    write(folder / "sums.jsonl", *({"problem": f"{i}+1=", "answer": i + 1} for i in range(6)))
    write(folder / "more.jsonl", {"question": "1+1=", "answer": "2"})
    return folder


def write(path, *rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def config_of(model, **changed):
    settings = {"weights": "made", "temperature": 1.0, "top_p": 1.0, "max_new_tokens": 6, "template": "{problem}"}
    return EvalConfig(**{"model": model} | settings | changed)


def run(config, data, directory, samples, names=("sums",), watch=lambda sample: None):
    """Evaluate in this process; returns the samples and the records."""
    benchmarks = {name: read_benchmark(data, name, config.template, print) for name in names}
    log = SampleLog(directory, config)
    try:
        sample_benchmarks(config, benchmarks, samples, log, InlineVerifier(AnswerScorer()), capacity=4, watch=watch)
        return log.samples, write_results(directory, config, benchmarks, samples, log)
    finally:
        log.close()


@pytest.mark.parametrize("samples", [1, 3, 6])
def test_pass_at_k_is_the_share_of_subsets_with_a_right_sample(samples):
    for right, k in itertools.product(range(samples + 1), range(1, samples + 1)):
        subsets = list(itertools.combinations([True] * right + [False] * (samples - right), k))
        expected = sum(map(any, subsets)) / len(subsets)
        assert pass_at_k(np.array([right]), samples, k) == pytest.approx(expected)


def test_pass_at_k_of_many_samples_does_not_overflow():
    assert pass_at_k(np.array([0, 4, 2048]), 2048, 512) == pytest.approx([0, 1 - (3 / 4) ** 4, 1], rel=1e-2)


def test_scores(tmp_path, model):
    problems = [Problem("b", key, Prompt(key, "", [])) for key in "xyz"]
    log = SampleLog(tmp_path, config_of(model))
    for key, rewards in zip("xyz", ([1, 1, 1, 1], [1, 0, 0, 0], [0, 0, 0, 0]), strict=True):
        for i, reward in enumerate(rewards):
            log.add(Sample("b", key, i, float(reward), tokens=10 * (i + 1), finished=i > 0, completion=""))
    record = score("b", problems, 4, log)
    log.close()
    assert (record["problems"], record["samples"]) == (3, 4)
    assert record["mean"] == pytest.approx(5 / 12)
    assert record["pass@2"] == pytest.approx((1 + 0.5) / 3)
    assert record["pass@4"] == pytest.approx(2 / 3)
    assert "pass@3" not in record
    assert record["mean_low"] == 0.0
    assert record["mean_high"] == 1.0
    assert record["tokens"] == 25
    assert record["cut_off"] == 0.25


@pytest.mark.parametrize(
    ("row", "asked", "right", "wrong"),
    [
        ({"problem": "2+2=", "answer": "4"}, "2+2=", "\\boxed{4}", "\\boxed{5}"),
        ({"Problem": "2+2=", "Answer": 4, "ID": 1}, "2+2=", "so it is $4$", "so it is $-4$"),
        ({"question": "q", "answer": 27.0, "url": "u"}, "q", "\\boxed{27}", "\\boxed{2.7}"),
        ({"question": "q", "final_answer": ["\\frac{1}{2}"], "solution": ["long"]}, "q", "\\boxed{0.5}", "\\boxed{2}"),
        ({"prompt": "p", "solution": "It is \\boxed{7}, no, \\boxed{\\frac{3}{4}}."}, "p", "\\boxed{0.75}", "\\boxed{7}"),
        ({"problem": "p", "answer": "2x+1"}, "p", "\\boxed{1+2x}", "\\boxed{2}"),
        ({"problem": "p", "answer": "\\left( 3, \\frac{\\pi}{2} \\right)"}, "p", "\\boxed{(3, \\pi/2)}", "\\boxed{3}"),
        ({"problem": "p", "answer": "\\text{Evelyn}"}, "p", "\\boxed{\\text{Evelyn}}", "\\boxed{\\text{Eve}}"),
        ({"problem": "p", "answer": "$1$, $2$"}, "p", "\\boxed{2, 1}", "\\boxed{2}"),
    ],
)
def test_fields_of_public_files(tmp_path, row, asked, right, wrong):
    write(tmp_path / "b.jsonl", row)
    (problem,) = read_benchmark(tmp_path, "b", TEMPLATE, print)
    assert problem.prompt.text == asked + "\nPlease reason step by step, and put your final answer within \\boxed{}."
    assert AnswerScorer().verify(problem.prompt, right) == 1.0
    for completion in (wrong, "", "I do not know."):
        assert AnswerScorer().verify(problem.prompt, completion) == 0.0


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", r"b\.jsonl, line 2: .*give one JSON object a line"),
        ("[1]", r"line 2 holds no JSON object but .*give one a line"),
        ('{"text": "a", "answer": 1}', r"line 2: none of problem, question, prompt is among the fields text, answer; rename one"),
        ('{"problem": "a", "label": 1}', r"line 2: none of answer, final_answer, solution is among the fields problem, label"),
        ('{"problem": [{"role": "user"}], "answer": 1}', r"line 2: problem: .* is not a message"),
        ('{"problem": "a", "answer": " "}', r"line 2: answer: the answer ' ' is empty"),
        ('{"problem": "a", "solution": "so it is 4"}', r"line 2: the solution marks no answer"),
    ],
)
def test_a_bad_line_is_named(tmp_path, line, message):
    (tmp_path / "b.jsonl").write_text('{"problem": "a", "answer": "1"}\n' + line + "\n")
    with pytest.raises(ValueError, match=message):
        read_benchmark(tmp_path, "b", TEMPLATE, print)


def test_mistakes_say_what_to_do(tmp_path, data, model):
    with pytest.raises(ValueError, match=r"benchmarks='aime42': no file .*aime42\.jsonl; benchmarks in .*: more, sums"):
        read_benchmark(data, "aime42", TEMPLATE, print)
    (tmp_path / "empty.jsonl").write_text("\n")
    with pytest.raises(ValueError, match="holds no problem"):
        read_benchmark(tmp_path, "empty", TEMPLATE, print)
    with pytest.raises(ValueError, match=r"template='ask' has no \{problem\}"):
        config_of(model, template="ask")
    with pytest.raises(ValueError, match=r"max_new_tokens=255 after a prompt of 21 tokens does not fit .* 256 .*; at most 235 fit"):
        run(config_of(model, max_new_tokens=255), data, tmp_path / "long", 1)


@pytest.mark.parametrize(
    "line",
    [
        '{"a": 1}',
        '{"benchmark": "sums", "problem": "x", "sample": "0", "reward": 1.0, "tokens": 1, "finished": true, "completion": ""}',
    ],
)
def test_a_foreign_line_among_the_samples_is_named(tmp_path, data, model, line):
    config = config_of(model)
    log = SampleLog(tmp_path / "out", config)
    log.add(Sample("sums", "x", 0, 1.0, 1, True, "2"))
    log.close()
    with (tmp_path / "out" / "samples.jsonl").open("a") as file:
        file.write(line + "\n")
    with pytest.raises(ValueError, match=r"samples\.jsonl, line 2 is not a sample of an evaluation; delete the line"):
        SampleLog(tmp_path / "out", config)


def test_a_repeated_problem_counts_once(tmp_path):
    write(tmp_path / "b.jsonl", *[{"problem": "a", "answer": "1"}] * 2, {"problem": "b", "answer": "1"})
    said = []
    assert [problem.prompt.text for problem in read_benchmark(tmp_path, "b", "{problem}", said.append)] == ["a", "b"]
    assert said == [f"{tmp_path / 'b.jsonl'}: 1 of 3 problems are repeated, and count once"]


def test_the_chat_template_is_applied():
    tokenizer = character_tokenizer()
    prompt = Prompt("1+1=", "2", None)
    assert tokenizer.decode(prompt_tokens(tokenizer, prompt)) == "1+1="
    tokenizer.chat_template = CHAT
    assert tokenizer.decode(prompt_tokens(tokenizer, prompt)) == "<user>1+1=<assistant>"


def test_a_chat_is_asked_with_its_messages(tmp_path):
    chat = [{"role": "system", "content": "short"}, {"role": "user", "content": "1+1="}]
    write(tmp_path / "b.jsonl", {"prompt": chat, "answer": 2})
    (problem,) = read_benchmark(tmp_path, "b", "{problem}?", print)
    tokenizer = character_tokenizer()
    with pytest.raises(ValueError, match=r"is a chat, but the tokenizer has no chat template; add one"):
        prompt_tokens(tokenizer, problem.prompt)
    tokenizer.chat_template = CHAT
    assert tokenizer.decode(prompt_tokens(tokenizer, problem.prompt)) == "<system>short<user>1+1=?<assistant>"


def test_seeds_differ_by_all_they_depend_on():
    seeds = {seed_of(*place) for place in itertools.product((0, 1), "ab", "xy", range(50))}
    assert len(seeds) == 2 * 2 * 2 * 50
    assert all(0 <= seed < 2**63 for seed in seeds)


def test_interrupted_it_samples_only_what_is_missing(tmp_path, data, model):
    config = config_of(model)
    whole, records = run(config, data, tmp_path / "whole", 4)
    assert len(whole) == 24
    assert len({sample.completion for sample in whole.values()}) > 12

    def interrupt(sample):
        if len((tmp_path / "two" / "samples.jsonl").read_text().splitlines()) == 7:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(config, data, tmp_path / "two", 4, watch=interrupt)
    file = tmp_path / "two" / "samples.jsonl"
    kept = file.read_text()
    file.write_text(kept + kept.splitlines()[0][:20])  # an interruption left half a line
    seen = []
    again, same = run(config, data, tmp_path / "two", 4, watch=seen.append)
    assert file.read_text().startswith(kept)
    assert len(file.read_text().splitlines()) == len(seen) == 24
    assert again == whole
    assert same == records
    assert json.loads((tmp_path / "two" / "result.json").read_text()) == records
    before = file.read_text()
    run(config, data, tmp_path / "two", 4)  # the run is finished, so that only the scores are computed again
    assert file.read_text() == before


def test_more_samples_and_benchmarks_join_those_there_are(tmp_path, data, model):
    few, _ = run(config_of(model), data, tmp_path, 2)
    few = dict(few)
    more, records = run(config_of(model), data, tmp_path, 3, names=("sums", "more"))
    assert few.items() < more.items()
    assert [(r["benchmark"], r["problems"], r["samples"]) for r in records] == [("sums", 6, 3), ("more", 1, 3)]
    assert len(more) == 6 * 3 + 3
    rows = read_logs([tmp_path / "outcomes.jsonl"])
    assert [(row.prompt, row.trials) for row in rows] == [(f"{i}+1=", 3) for i in range(6)] + [("1+1=", 3)]
    assert np.mean([row.rate for row in rows[:6]]) == pytest.approx(records[0]["mean"])


def test_a_model_folder_may_be_moved(tmp_path, data, model):
    first = dict(run(config_of(model), data, tmp_path / "out", 1)[0])
    moved = shutil.copytree(model, tmp_path / "moved")
    assert run(config_of(moved), data, tmp_path / "out", 1)[0] == first
    assert json.loads((tmp_path / "out" / "config.json").read_text())["model"] == str(moved)


def test_samples_of_another_configuration_are_kept_apart(tmp_path, data, model):
    run(config_of(model), data, tmp_path, 1)
    with pytest.raises(ValueError, match="holds samples that differ in temperature, seed; give another directory"):
        run(config_of(model, temperature=0.5, seed=1), data, tmp_path, 1)
    log = SampleLog(tmp_path, config_of(model))
    with pytest.raises(ValueError, match="is being written by another process"):
        SampleLog(tmp_path, config_of(model))
    log.close()


def test_the_seed_reproduces_and_matters(tmp_path, data, model):
    one, two, other = (
        run(config_of(model, seed=seed), data, tmp_path / name, 2)[0] for name, seed in (("one", 0), ("two", 0), ("other", 1))
    )
    assert one == two
    assert one != other


def test_temperature_0_repeats_itself(tmp_path, data, model):
    samples, _ = run(config_of(model, temperature=0.0), data, tmp_path, 3)
    for _, same in itertools.groupby(sorted(samples.values(), key=lambda s: s.place), key=lambda s: s.problem):
        assert len({sample.completion for sample in same}) == 1


def test_help_names_the_fields():
    output = CliRunner().invoke(app, ["eval", "--help"]).output
    for name in (*PROBLEM_FIELDS, *ANSWER_FIELDS):
        assert name in output
    assert "Example: v05 eval" in output


def verified(engine, prompts):
    requests = [Request((0.5,), seed) for seed in range(len(prompts))]
    return list(_verified(engine, InlineVerifier(AnswerScorer()), prompts, requests))


def test_every_completion_is_verified_once_whatever_fails_and_whenever_it_comes():
    prompts = [Prompt(str(i), "1", read_answer(1)) for i in range(50)]
    engine = CoinEngine(capacity=7, order=0, fails=lambda request, attempts: request.seed % 3 == 0 and attempts == 0)
    found = verified(engine, prompts)
    assert sorted(index for index, *_ in found) == list(range(50))
    assert {reward == float(text) for _, _, text, reward in found} == {True}
    assert {reward for *_, reward in found} == {0.0, 1.0}
    assert engine.most_in_flight == 7


def test_a_failure_of_the_verifier_is_not_a_wrong_answer():
    """A failed verification is tried again. If it fails three times, the run ends with an error that names the problem."""

    class Fails(InlineVerifier):
        def __init__(self, always):
            super().__init__(AnswerScorer())
            self.always, self.seen = always, Counter()

        def submit(self, items):
            super().submit(items)
            for i, item in enumerate(items, len(self._results) - len(items)):
                self.seen[item.key] += 1
                if item.key == self.always or (item.key % 2 and self.seen[item.key] == 1):
                    self._results[i] = item.key, Failure("killed")

    prompts = [Prompt(str(i), "1", read_answer(1)) for i in range(8)]
    requests = [Request((0,), seed=i) for i in range(8)]
    found = list(_verified(CoinEngine(), Fails(always=None), prompts, requests))
    assert sorted(index for index, *_ in found) == list(range(8))
    assert all(reward == float(text) for _, _, text, reward in found)
    verifier = Fails(always=3)
    with pytest.raises(RuntimeError, match=r"could not be verified in 3 attempts; the last error: killed"):
        list(_verified(CoinEngine(), verifier, prompts, requests))
    assert verifier.seen[3] == 3


def test_a_completion_that_always_fails_ends_the_run():
    engine = CoinEngine(fails=lambda request, attempts: request.seed == 1)
    with pytest.raises(RuntimeError, match="a completion failed 3 times; the last error: the coin rolled under the table"):
        verified(engine, [Prompt(str(i), "1", read_answer(1)) for i in range(3)])


def test_killed_from_the_command_line_it_goes_on(tmp_path, data, model):
    options = ["--samples", "15", "--max-new-tokens", "40", "--sampling-batch", "2", "--workers", "1", "--template", "{problem}"]
    options += ["--out", "out", "--json", "r.json"]
    command = [sys.executable, "-m", "v05", "eval", str(model), "--benchmarks", "sums", "--data", str(data), *options]
    environment = {**os.environ, "COLUMNS": "200"}
    file = tmp_path / "out" / "samples.jsonl"
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, cwd=tmp_path) as process:
        deadline = time.monotonic() + 600
        while not (file.exists() and file.read_text().count("\n") > 5) and process.poll() is None:
            assert time.monotonic() < deadline
            time.sleep(0.02)
        process.send_signal(signal.SIGKILL)
    kept = file.read_text().rpartition("\n")[0]
    assert 5 <= kept.count("\n") < 89
    command[0] = warm.python()
    again = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=environment, timeout=600)
    assert again.returncode == 0, again.stderr
    assert "mean@15" in again.stdout
    assert file.read_text().startswith(kept)
    assert file.read_text().count("\n") == 90
    (record,) = json.loads((tmp_path / "r.json").read_text())
    assert record == json.loads((tmp_path / "out" / "result.json").read_text())[0]


def test_a_model_is_not_overwritten_by_its_evaluation(data, model):
    files = {path: path.read_bytes() for path in model.iterdir()}
    arguments = ["eval", str(model), "--benchmarks", "sums", "--data", str(data), "--samples", "1", "--out", str(model)]
    ended = CliRunner().invoke(app, arguments)
    assert ended.exit_code == 2
    assert "holds config.json of something else, which the evaluation would replace" in ended.output
    assert {path: path.read_bytes() for path in model.iterdir()} == files


def test_samples_end_at_every_id_of_the_generation_config(tmp_path, data, model):
    folder = tmp_path / "policy"
    shutil.copytree(model, folder)
    settings = json.loads((folder / "generation_config.json").read_text())
    (folder / "generation_config.json").write_text(json.dumps(settings | {"eos_token_id": list(range(60))}))
    samples, _ = run(config_of(folder, max_new_tokens=60), data, tmp_path / "run", 2)
    assert {sample.finished for sample in samples.values()} == {True}
    tokenizer = character_tokenizer()
    written = [tokenizer(sample.completion)["input_ids"] for sample in samples.values()]  # without the end, a character
    assert all(min(tokens, default=60) >= 60 for tokens in written)
    assert [len(tokens) for tokens in written] == [sample.tokens - 1 for sample in samples.values()]


def test_a_policy_that_cannot_be_sampled_is_named_before_the_first_sample(tmp_path, data, model):
    folder = tmp_path / "policy"
    shutil.copytree(model, folder)
    weights = load_file(folder / "model.safetensors")
    save_file({name: torch.full_like(value, torch.nan) for name, value in weights.items()}, folder / "model.safetensors")
    with pytest.raises(RuntimeError, match="the policy is not finite: a pass over random tokens gives no log-probabilities"):
        run(config_of(folder), data, tmp_path / "run", 1)
    for file in ("config.json", "generation_config.json", "tokenizer_config.json"):
        settings = json.loads((folder / file).read_text())
        (folder / file).write_text(json.dumps(settings | {"eos_token_id": None, "eos_token": None}))
    with pytest.raises(
        ValueError, match=r"the tokenizer of .*policy has no end-of-sequence token, and generation_config names none"
    ):
        run(config_of(folder), data, tmp_path / "other", 1)
