"""Logs of other trainers and of v05 eval are read in the form in which they are written. The tests' columns are those of real
files.
"""

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from v05.benchmarks import EvalConfig, Problem, Sample, SampleLog, write_results
from v05.cli import app
from v05.simulate import replay as module
from v05.simulate.outcomes import read_outcomes
from v05.tasks import Prompt


def write_lines(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    return path


def cells(path, **options):
    """(model, question, successes, trials) of every cell."""
    read = read_outcomes(path, **options)
    return [tuple(map(int, cell)) for cell in zip(read.model, read.question, read.successes, read.trials, strict=True)]


def verl(step, prompt, score, **extra):
    return {"input": f"user\n{prompt}\nassistant\n", "output": "so 4", "gts": "4", "score": score, "step": step, **extra}


def test_verl_dumps_are_read_in_the_order_of_steps(tmp_path):
    for step in (10, 9, 1):
        rows = [verl(step, prompt, float(step > 8 and prompt == "2+2?")) for prompt in ("2+2?", "3+3?") for _ in range(2)]
        write_lines(tmp_path / f"{step}.jsonl", rows)
    read = read_outcomes(tmp_path)
    assert read.source == "rollouts of verl"
    assert read.remarks == ()
    assert cells(tmp_path) == [(0, 0, 0, 2), (0, 1, 0, 2), (1, 0, 2, 2), (1, 1, 0, 2), (2, 0, 2, 2), (2, 1, 0, 2)]
    assert cells(tmp_path / "9.jsonl") == [(0, 0, 2, 2), (0, 1, 0, 2)]


def test_two_runs_of_a_folder_have_policies_of_their_own(tmp_path):
    for run in ("one", "two"):
        write_lines(tmp_path / run / "1.jsonl", [verl(1, "2+2?", 1.0)])
    assert cells(tmp_path) == [(0, 0, 1, 1), (1, 0, 1, 1)]


@pytest.mark.parametrize(
    ("scores", "successes"),
    [
        ([0, 1, 1.0], 2),
        ([-1, 1, -1.0], 1),
        ([1, 1], 2),
        ([-1, -1], 0),
        ([True, False], 1),
        ([1, None, float("nan")], 1),
        ([[0, 1]], 1),
    ],
    ids=str,
)
def test_rewards_of_two_values_are_successes_and_failures(tmp_path, scores, successes):
    file = write_lines(tmp_path / "1.jsonl", [verl(1, "2+2?", score) for score in scores])
    read = read_outcomes(file)
    scored = sum(score is not None and score == score for score in scores)
    assert (read.successes.tolist(), read.trials.tolist(), read.left_out) == ([successes], [scored], len(scores) - scored)
    assert read.remarks == ((f"{read.left_out} rows without a reward left out",) if read.left_out else ())


@pytest.mark.parametrize("scores", [[0, 0.1, 1], [-1, 0, 1], [0, 5], [2, 2], [0, float("inf")]], ids=str)
def test_other_rewards_need_a_threshold_or_another_column(tmp_path, scores):
    file = write_lines(tmp_path / "1.jsonl", [verl(1, "2+2?", score, acc=score > 0.5) for score in scores])
    with pytest.raises(ValueError, match=r"1\.jsonl, line \d: rewards are .*--success-above X.*--reward: acc"):
        read_outcomes(file)
    assert cells(file, success_above=0.5) == [(0, 0, sum(score > 0.5 for score in scores), len(scores))]
    assert cells(file, reward="Acc ") == [(0, 0, sum(score > 0.5 for score in scores), len(scores))]
    with pytest.raises(ValueError, match=rf"none of the {len(scores)} rows has a reward in the column accuracy; .*--reward: acc"):
        read_outcomes(file, reward="accuracy")


def test_rows_without_a_score_are_left_out_and_counted(tmp_path):
    row = verl(1, "2+2?", 1.0)
    del row["score"]
    file = write_lines(tmp_path / "1.jsonl", [row, verl(1, "2+2?", 0.0)])
    assert (read_outcomes(file).trials.tolist(), read_outcomes(file).left_out) == ([1], 1)


def write_parquet(path, rows):
    import pyarrow
    import pyarrow.parquet

    path.parent.mkdir(parents=True, exist_ok=True)
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    return path


def trl(step, prompt, **rewards):
    return {"step": step, "prompt": prompt, "completion": "so 4", **rewards, "advantage": 0.5}


def test_completions_of_trl(tmp_path):
    for step in (5, 10):
        rows = [trl(step, prompt, accuracy_reward=float(prompt == "2+2?")) for prompt in ("2+2?", "3+3?") for _ in range(4)]
        write_parquet(tmp_path / "completions" / f"completions_{step:05d}.parquet", rows)
    assert cells(tmp_path / "completions") == [(0, 0, 4, 4), (0, 1, 0, 4), (1, 0, 4, 4), (1, 1, 0, 4)]
    assert read_outcomes(tmp_path).source == "completions of TRL"


def test_several_reward_functions_of_trl_are_told_apart(tmp_path):
    rows = [trl(1, "2+2?", accuracy_reward=float(right), format_reward=1.0, extracted="4") for right in (0, 1, 1)]
    file = write_parquet(tmp_path / "completions_00001.parquet", rows)
    with pytest.raises(ValueError, match=r"parquet, row 1 has numbers in the columns accuracy_reward, format_reward; .*--reward"):
        read_outcomes(file)
    assert cells(file, reward="accuracy_reward") == [(0, 0, 2, 3)]
    total = write_parquet(tmp_path / "total.parquet", [trl(1, "2+2?", reward=1.0, format_reward=0.0)])
    assert cells(total) == [(0, 0, 1, 1)]


def test_reward_functions_that_apply_to_some_rows(tmp_path):
    rows = [trl(1, "2+2?", maths=1.0, code=None), trl(1, "sort!", maths=None, code=0.0), trl(1, "?", maths=None, code=None)]
    read = read_outcomes(write_parquet(tmp_path / "completions_00001.parquet", rows))
    assert (read.successes.tolist(), read.trials.tolist(), read.left_out) == ([1, 0], [1, 1], 1)


def test_a_batch_that_trl_logs_again_counts_once(tmp_path):
    for step in (1, 2, 3):
        batch = (step + 1) // 2
        rows = [{**trl(step, f"{batch}+{row // 8}?", right=float(row % 2)), "completion": str(row)} for row in range(32)]
        write_parquet(tmp_path / f"completions_{step:05d}.parquet", rows)
    read = read_outcomes(tmp_path)
    assert read.trials.sum() == 64
    assert read.remarks == ("1 files left out, which repeat the batch of the step before (completions_00002.parquet)",)


def test_parquet_says_what_to_install_and_which_file_is_damaged(tmp_path, monkeypatch):
    file = write_parquet(tmp_path / "completions_00001.parquet", [trl(1, "2+2?", right=1.0)])
    (tmp_path / "torn.parquet").write_bytes(file.read_bytes()[:-20])
    with pytest.raises(ValueError, match=r"torn\.parquet is not a whole parquet file"):
        read_outcomes(tmp_path)
    monkeypatch.setitem(__import__("sys").modules, "pyarrow", None)
    with pytest.raises(ImportError, match=r"00001\.parquet: .* pip install 'v05\[parquet\]'"):
        read_outcomes(file)


def episode(step, prompt, reward, **changed):
    trace = {"task": {"type": "Sum", "data": {"idx": 0, "prompt": prompt}}, "agent": {"name": "agent", "trainable": True}}
    trace |= {"rewards": {"correct": {"score": reward, "weight": 1.0}, "length": {"score": 0.3, "weight": 0.0}}, "ok": True}
    work = {"type": "train", "step": step}
    run = {"type": "train", "id": "r", "work": work}
    return {"id": "e", "env": {"id": "sums"}, "task": trace["task"], "run": run, "ok": True, "traces": [trace], **changed}


def test_episodes_of_prime_rl(tmp_path):
    rollouts = tmp_path / "rollouts"
    for step in (2, 10):
        rows = [episode(step, prompt, float(prompt == "2+2?")) for prompt in ("2+2?", "3+3?") for _ in range(2)]
        failed = episode(step, "3+3?", 0.0, ok=False, traces=[])
        write_lines(rollouts / f"step_{step}" / "train" / "all" / "traces.jsonl", [*rows, failed])
        write_lines(rollouts / f"step_{step}" / "train" / "effective" / "traces.jsonl", rows)
        write_lines(rollouts / f"step_{step}" / "eval" / "all" / "traces.jsonl", rows[:1])
    assert cells(rollouts) == [(0, 0, 2, 2), (0, 1, 0, 2), (1, 0, 2, 2), (1, 1, 0, 2)]
    read = read_outcomes(rollouts)
    assert read.source == "episodes of prime-rl"
    assert read.remarks == (
        "4 files left out, which repeat other files or hold evaluations beside training (step_2/eval/all/traces.jsonl, ...)",
        "2 rows without a reward left out",
    )
    assert cells(rollouts / "step_2" / "eval") == [(0, 0, 1, 1)]
    with pytest.raises(ValueError, match=r"rewards are 0\.3"):
        read_outcomes(rollouts, reward="length")


def test_traces_that_are_not_trained_or_unscored_do_not_count(tmp_path):
    judge = episode(1, "2+2?", 1.0)["traces"][0] | {"agent": {"name": "judge", "trainable": False}}
    unscored = episode(1, "2+2?", 1.0)["traces"][0] | {"rewards": {"correct": None}}
    rows = [episode(1, "2+2?", 1.0), episode(1, "2+2?", 1.0, traces=[judge]), episode(1, "2+2?", 1.0, traces=[unscored])]
    read = read_outcomes(write_lines(tmp_path / "traces.jsonl", rows))
    assert (read.trials.sum(), read.left_out) == (1, 2)


def test_earlier_files_of_prime_rl(tmp_path):
    trace = {"task": {"idx": 3, "prompt": "2+2?"}, "nodes": [], "errors": [], "env_name": "sums", "rewards": {"correct": 1.0}}
    write_lines(tmp_path / "traces" / "step_1" / "train" / "all" / "traces.jsonl", [trace, {**trace, "errors": ["timeout"]}])
    read = read_outcomes(tmp_path / "traces")
    assert (read.source, read.trials.sum(), read.left_out) == ("traces of prime-rl", 1, 1)
    row = {"example_id": 3, "task": "sums", "prompt": [{"role": "user", "content": "2+2?"}], "completion": [], "reward": 1.0}
    for step in (1, 2):
        write_lines(tmp_path / "old" / f"step_{step}" / "train_rollouts.jsonl", [row, {**row, "example_id": 4, "reward": 0.0}])
        write_lines(tmp_path / "old" / f"step_{step}" / "eval_rollouts.jsonl", [row])
    assert cells(tmp_path / "old") == [(0, 0, 1, 1), (0, 1, 0, 1), (1, 0, 1, 1), (1, 1, 0, 1)]


def test_evaluations_of_skyrl_and_plain_rollouts(tmp_path):
    row = {"input_prompt": "2+2?", "output_response": "4", "score": [0.0, 1.0], "stop_reason": "stop", "data_source": "sums"}
    for step in (5, 10):
        write_lines(tmp_path / "skyrl" / f"global_step_{step}_evals" / "sums.jsonl", [row, {**row, "score": 0.0}])
        write_lines(tmp_path / "skyrl" / f"global_step_{step}_evals" / "aggregated_results.jsonl", [{"eval/all/avg_score": 0.5}])
    assert cells(tmp_path / "skyrl") == [(0, 0, 1, 2), (1, 0, 1, 2)]
    assert "2 files left out, which are not logs of rollouts" in read_outcomes(tmp_path / "skyrl").remarks[0]
    assert cells(write_lines(tmp_path / "mine.jsonl", [{"prompt": "2+2?", "reward": 1}, {"prompt": "3+3?", "reward": 0}])) == [
        (0, 0, 1, 1),
        (0, 1, 0, 1),
    ]


def write_evaluation(directory, model, rewards, seed=0):
    config = EvalConfig(model=Path("models") / model, weights=model, seed=seed)
    log = SampleLog(directory, config)
    for problem, samples in enumerate(rewards):
        for number, reward in enumerate(samples):
            log.add(Sample("sums", f"key{problem}", number, reward, 3, True, "4"))
    problems = [Problem("sums", f"key{problem}", Prompt(f"{problem}+2?", "4", None)) for problem in range(len(rewards))]
    write_results(directory, config, {"sums": problems}, len(rewards[0]), log)
    log.close()


def test_folders_of_v05_eval(tmp_path):
    write_evaluation(tmp_path / "eval" / "small", "small", [[1.0, 0.0], [0.0, 0.0]])
    write_evaluation(tmp_path / "eval" / "large", "large", [[1.0, 1.0], [1.0, 0.0]])
    assert cells(tmp_path / "eval" / "small") == [(0, 0, 1, 2), (0, 1, 0, 2)]
    assert cells(tmp_path / "eval" / "small" / "result.json") == [(0, 0, 1, 2), (0, 1, 0, 2)]
    assert cells(tmp_path / "eval" / "large" / "samples.jsonl") == [(0, 0, 2, 2), (0, 1, 1, 2)]
    assert cells(tmp_path / "eval") == cells(tmp_path) == [(0, 0, 2, 2), (0, 1, 1, 2), (1, 0, 1, 2), (1, 1, 0, 2)]
    assert read_outcomes(tmp_path / "eval").source == "samples of v05 eval"
    write_evaluation(tmp_path / "eval" / "again", "small", [[1.0, 1.0]], seed=1)
    assert (0, 0, 3, 4) in cells(tmp_path / "eval")  # the seed does not make another model


def test_evaluations_beside_runs_are_left_out_and_named(tmp_path):
    write_evaluation(tmp_path / "small", "small", [[1.0, 0.0]])
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.json").write_text(json.dumps({"task": {"kind": "sums"}}))
    (tmp_path / "run" / "result.json").write_text(json.dumps({"heldout_successes": [3], "heldout_samples": 4}))
    assert cells(tmp_path) == [(0, 0, 3, 4)]
    assert read_outcomes(tmp_path).remarks == ("1 folders of v05 eval left out; name one to replay it",)


@pytest.mark.parametrize("successes", [[5], [-1], [0.5], ["1"], {"1": 1}, [None]], ids=str)
def test_a_run_of_impossible_successes_is_named(tmp_path, successes):
    (tmp_path / "config.json").write_text(json.dumps({"task": {"kind": "sums"}}))
    (tmp_path / "result.json").write_text(json.dumps({"heldout_successes": successes, "heldout_samples": 4}))
    with pytest.raises(
        ValueError, match=r"result\.json: heldout_successes is not a list of whole numbers from 0 to heldout_samples=4"
    ):
        read_outcomes(tmp_path)


def test_an_evaluation_may_be_under_way(tmp_path):
    write_evaluation(tmp_path, "small", [[1.0, 0.0]])
    with (tmp_path / "samples.jsonl").open("a") as file:
        file.write('{"benchmark": "sums", "prob')
    (tmp_path / "result.json").unlink()
    assert cells(tmp_path) == [(0, 0, 1, 2)]


def test_outcomes_of_v05_are_read_with_their_mean_rewards(tmp_path):
    rows = [{"policy": f"run@{step}", "prompt": "2+2?", "score": -0.5, "trials": 4} for step in (0, 8)]
    assert cells(write_lines(tmp_path / "outcomes" / "0.jsonl", rows)) == [(0, 0, 1, 4), (1, 0, 1, 4)]
    write_lines(tmp_path / "outcomes" / "0.jsonl", [{**rows[0], "score": 0.1}])
    with pytest.raises(ValueError, match=r"0\.jsonl, line 1: row 1 has successes=2.2, trials=4 instead of whole numbers"):
        read_outcomes(tmp_path)
    with pytest.raises(ValueError, match="--reward and --success-above are for logs of rollouts"):
        read_outcomes(tmp_path, success_above=0.5)


def test_logs_of_several_kinds_are_not_mixed(tmp_path):
    write_lines(tmp_path / "1.jsonl", [verl(1, "2+2?", 1.0)])
    write_lines(tmp_path / "mine.jsonl", [{"prompt": "2+2?", "reward": 1}])
    with pytest.raises(ValueError, match=r"holds rollouts of verl \(.*1\.jsonl\) and rollouts \(.*mine\.jsonl\); give"):
        read_outcomes(tmp_path)


@pytest.fixture
def _short(monkeypatch):
    monkeypatch.setattr(module, "STEP", 256)
    monkeypatch.setattr(module, "WARM_UP", 1)
    monkeypatch.setattr(module, "MEASURED", 4)


@pytest.mark.usefixtures("_short")
def test_command_says_what_was_read_and_what_it_comes_to(tmp_path):
    for step in range(1, 4):
        rows = [verl(step, f"{i}+{i}?", float((i + j) % 4 < 3)) for i in range(8 * step, 8 * step + 8) for j in range(4)]
        write_lines(tmp_path / "rollouts" / f"{step}.jsonl", [*rows, verl(step, "unscored", None)])
    arguments = ("simulate", tmp_path / "rollouts", "--maximum", 5, "--plot", tmp_path / "plot.png")
    result = CliRunner().invoke(app, list(map(str, arguments)))
    assert result.exit_code == 0, result.output
    assert "read rollouts of verl: 96 rollouts in 24 groups, of 3 models or steps and 24 prompts" in result.output
    assert "3 rows without a reward left out" in result.output
    assert "no prompt is in two groups, so the prior cannot tell prompts apart" in result.output
    assert result.output.splitlines()[-1].startswith("On these logs, ")


@pytest.mark.usefixtures("_short")
def test_command_takes_a_threshold_and_a_column(tmp_path):
    rows = [verl(1, f"{i}?", 0.1 * j, acc=j > 2) for i in range(8) for j in range(5)]
    file = write_lines(tmp_path / "1.jsonl", rows)
    plot = ("--maximum", "5", "--plot", str(tmp_path / "plot.png"))
    refused = CliRunner().invoke(app, ["simulate", str(file), *plot])
    assert refused.exit_code == 2
    assert "--success-above" in refused.output
    for option in (("--success-above", "0.25"), ("--reward", "acc")):
        result = CliRunner().invoke(app, ["simulate", str(file), *option, *plot])
        assert result.exit_code == 0, result.output
