"""Whatever ends a command, its exit status is 0 only if there is a result."""

import pytest
from typer.testing import CliRunner

from helpers import exits
from helpers.kill_and_resume import smoke
from v05.cli import app
from v05.tasks import make_task
from v05.train.compare import run_all
from v05.train.policy import policy_folder


def end(code):
    def raise_exit(*arguments, **named):
        raise SystemExit(code)

    return raise_exit


@pytest.mark.parametrize("code", [0, None, 3, "words"])
@pytest.mark.parametrize("place", ["__init__", "run", "evaluate_heldout", "step"])
def test_training_that_something_ends_fails(place, code, tmp_path, monkeypatch):
    monkeypatch.setattr(f"v05.train.trainer.Trainer.{place}", end(code))
    ended = CliRunner().invoke(app, ["train", "--preset", "smoke", "--rollouts", "64", "--out", str(tmp_path / "run")])
    assert ended.exit_code == 2, ended.output
    assert f"exit({code!r}) was called before there was a result" in ended.output
    assert not (tmp_path / "run" / "result.json").exists()


def test_training_that_ends_without_a_result_fails(tmp_path, monkeypatch):
    monkeypatch.setattr("v05.train.trainer.Trainer.finish", lambda trainer: None)
    ended = CliRunner().invoke(app, ["train", "--preset", "smoke", "--rollouts", "64", "--out", str(tmp_path / "run")])
    assert ended.exit_code == 2, ended.output
    assert "the run ended without" in ended.output


@pytest.mark.parametrize("function", ["exit_at_once", "end_at_once"])
def test_a_run_of_a_comparison_that_something_ends_has_failed(function, tmp_path, monkeypatch):
    monkeypatch.setattr("v05.train.compare.run_one", getattr(exits, function))
    states = []
    assert run_all({"run": smoke(1)}, tmp_path, 1, states.append) == ["run"]
    assert states[-1][0].status == "failed"
    assert "its process ended with status 0, without a result" in states[-1][0].why


def test_a_comparison_whose_warm_start_something_ends_fails(tmp_path, monkeypatch):
    monkeypatch.setattr("v05.train.policy.policy_folder", end(0))
    ended = CliRunner().invoke(app, ["compare", "--preset", "smoke", "--methods", "grpo", "--out", str(tmp_path)])
    assert ended.exit_code == 2
    assert "exit(0) was called before there was a result" in ended.output


def test_a_comparison_says_why_a_run_failed(tmp_path, monkeypatch):
    monkeypatch.setattr("v05.train.compare.run_one", exits.exit_at_once)
    arguments = ["compare", "--preset", "smoke", "--methods", "grpo", "--seeds", "1", "--rollouts", "64", "--out", str(tmp_path)]
    ended = CliRunner().invoke(app, arguments)
    assert ended.exit_code == 1
    assert "failed: grpo@16-seed0: its process ended with status 0, without a result; see" in ended.output


def test_an_evaluation_that_something_ends_fails(tmp_path, monkeypatch):
    config = smoke(1)
    folder = policy_folder(config.policy, config.task, make_task(config.task), print)
    (tmp_path / "sums.jsonl").write_text('{"problem": "1+1=", "answer": "2"}\n')
    monkeypatch.setattr("v05.benchmarks.sample_benchmarks", end(0))
    arguments = ["eval", str(folder), "--benchmarks", "sums", "--data", str(tmp_path), "--samples", "1", "--max-new-tokens", "4"]
    ended = CliRunner().invoke(app, [*arguments, "--out", str(tmp_path / "out")])
    assert ended.exit_code == 2, ended.output
    assert "exit(0) was called before there was a result" in ended.output
    assert not (tmp_path / "out" / "result.json").exists()
