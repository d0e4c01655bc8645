"""The command line from a user's side, in processes of its own."""

import functools
import json
import os
import re
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from rich.console import Console
from rich.table import Table
from typer.testing import CliRunner

from helpers import warm
from helpers.rollout_fakes import FakeServer
from v05.cli import app
from v05.cli.shared import print_table
from v05.methods import METHODS
from v05.train.metrics import read_metrics
from v05.train.presets import run_config


@pytest.fixture(scope="module")
def environment():
    return {**os.environ, "COLUMNS": "200"}


def v05(*arguments, environment, directory, largest_file=None):
    """Run the command outside the repository, so that its root hides no package. `largest_file` bytes limit each file, like a full
    disk.
    """
    command = [warm.python(), "-m", "v05", *map(str, arguments)]
    limit = None if largest_file is None else functools.partial(resource.setrlimit, resource.RLIMIT_FSIZE, (largest_file,) * 2)
    return subprocess.run(command, capture_output=True, text=True, env=environment, cwd=directory, timeout=300, preexec_fn=limit)


def test_help_teaches(environment, tmp_path):
    overview = v05("--help", environment=environment, directory=tmp_path)
    assert overview.returncode == 0
    assert "compare" in overview.stdout
    for command in ("train", "compare", "report", "simulate"):
        text = v05(command, "--help", environment=environment, directory=tmp_path).stdout
        assert f"v05 {command}" in text
        assert "Example" in text


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("train", "--preset", "huge"), "preset='huge' is unknown; choose one of tiny, arithmetic, symbols, hard, demo, smoke"),
        (("train", "--method", "ppo"), "method='ppo' is unknown; choose one of v05, grpo"),
        (("compare", "--methods", "grpo,nothing"), "method='nothing' is unknown; choose one of v05, grpo"),
        (("compare", "--suite", "nothing"), "--suite nothing is unknown; choose one of headline, smoke"),
        (("compare", "--suite", "smoke", "--preset", "symbols"), "--preset, --learning-rate and --policy cannot be set beside it"),
        (
            ("compare", "--suite", "smoke", "--methods", "optimal@1"),
            "--methods optimal@1 is not in this suite; choose from grpo@4, v05@4",
        ),
        (("train", "--method", "v05@4+magic"), "prior='magic' is unknown; choose one of history, mean, spo, v0, constant, oracle"),
        (
            ("train", "--prior", "magic"),
            "v05: prior='magic' is unknown; choose one of history, mean, spo, v0, constant, oracle, noise",
        ),
        (("train", "--distributed", "dp"), "distributed='dp' is unknown; choose one of ddp, fsdp2"),
        (("train", "--method", "grpo+oracle"), "prior='oracle': method='grpo' has no prior"),
        (("train", "--method", "v05@4+cost=0.1"), "budget.cost=0.1 with budget.rule='uniform', which has no cost"),
        (("train", "--config", "absent.json"), "absent.json"),
        (("train", "--config", "any.json", "--method", "v05", "--seed", "0"), "so method, seed cannot be set beside it"),
        (("train", "--method", "v05@4+oracle", "--prior", "noise"), "prior='noise' contradicts method='v05@4+oracle'"),
        (("train", "--preset", "gsm"), "asks for a model with a chat template; give its folder: --policy FOLDER"),
        (("train", "--max-new-tokens", "9"), "--max-new-tokens 9 belongs to --policy"),
        (("train", "--learning-rate", "-1"), "optimizer.learning_rate=-1.0: Input should be greater than 0"),
        (("train", "--preset", "smoke", "--engine", "vllm"), "cannot import 'vllm'; install it with: pip install 'v05[vllm]'"),
        (("train", "--preset", "smoke", "--engine", "ray"), "needs the package 'ray'; install it with: pip install 'v05[ray]'"),
        (
            ("train", "--preset", "smoke", "--engine", "tgi"),
            "engine.kind='tgi' is unknown; choose one of transformers, vllm, vllm_server, ray",
        ),
    ],
)
def test_mistakes_are_explained_in_one_line(arguments, message, environment, tmp_path):
    result = v05(*arguments, "--out", tmp_path / "run", environment=environment, directory=tmp_path)
    assert result.returncode == 2
    assert message in result.stderr
    assert "Traceback" not in result.stderr


def test_compare_ends_with_a_table_plots_and_records(environment, tmp_path):
    arguments = ("compare", "--preset", "smoke", "--methods", "grpo,dapo,v05", "--seeds", 2, "--out", "runs", "--json", "r.json")
    result = v05(*arguments, environment=environment, directory=tmp_path)
    assert result.returncode == 0, result.stderr
    for label in ("grpo@16", "dapo@16", "v05@4..16"):
        assert label in result.stdout
    records = json.loads((tmp_path / "r.json").read_text())
    assert records == json.loads((tmp_path / "runs" / "compare.json").read_text())
    assert [r["label"] for r in records if r["record"] == "method"] == ["grpo@16", "dapo@16", "v05@4..16"]
    assert {(r["method"], r["seed"]) for r in records if r["record"] == "run"} == {
        (m, s) for m in ("grpo", "dapo", "v05") for s in (0, 1)
    }
    assert all(r["accuracy_before"] == records[0]["accuracy_before"] for r in records)
    assert len(list((tmp_path / "runs").glob("*.png"))) >= 5
    # A second call runs nothing, and only makes the table again.
    runs = sorted((tmp_path / "runs").glob("*/metrics.jsonl"))
    written = [run.stat().st_mtime_ns for run in runs]
    assert v05(*arguments, environment=environment, directory=tmp_path).returncode == 0
    assert [run.stat().st_mtime_ns for run in runs] == written


def test_a_suite_goes_on_from_its_rows(environment, tmp_path):
    arguments = ("compare", "--suite", "smoke", "--seeds", 1, "--out", "suite")
    result = v05(*arguments, environment=environment, directory=tmp_path)
    assert result.returncode == 0, result.stdout + result.stderr
    assert "v05@2..8+oracle" in result.stdout
    file = tmp_path / "suite" / "runs.csv"
    rows = file.read_text().splitlines(keepends=True)
    assert len(rows) == 1 + 4 + 4
    assert len(list((tmp_path / "suite").glob("*.png"))) == 3
    assert not list((tmp_path / "suite").rglob("model.safetensors"))
    # Finished runs are recognised by their rows alone. Only the run whose row is missing gets a new row.
    file.write_text("".join(rows[:-1]))
    ends = sorted((tmp_path / "suite").rglob("result.json"))
    written = [end.stat().st_mtime_ns for end in ends]
    assert v05(*arguments, environment=environment, directory=tmp_path).returncode == 0
    assert file.read_text().splitlines(keepends=True) == rows
    assert [end.stat().st_mtime_ns for end in ends] == written


def test_a_killed_comparison_goes_on(environment, tmp_path):
    arguments = ("compare", "--preset", "smoke", "--methods", "v05", "--seeds", 1, "--rollouts", 2560, "--out", "runs")
    run = tmp_path / "runs" / "v05@4..16-seed0"
    command = [sys.executable, "-m", "v05", *map(str, arguments)]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=environment, cwd=tmp_path) as process:
        deadline = time.monotonic() + 240
        while not list(run.glob("checkpoint-*1")) and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.05)
        process.kill()
    again = v05(*arguments, environment=environment, directory=tmp_path)
    assert again.returncode == 0, again.stdout + again.stderr
    assert "resuming interrupted runs: v05@4..16-seed0" in again.stderr
    assert "resuming from step" in (run / "log.txt").read_text()
    steps = read_metrics(run, "step")
    assert [s["step"] for s in steps] == list(range(len(steps)))


def test_a_finished_run_is_not_overwritten(environment, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "result.json").write_text("{}")
    result = v05("train", "--preset", "smoke", "--out", "run", environment=environment, directory=tmp_path)
    assert result.returncode == 2
    assert "run holds a finished run; give another directory" in result.stderr
    assert (tmp_path / "run" / "result.json").read_text() == "{}"


def test_own_prompts_and_policy(environment, tmp_path):
    lines = [json.dumps({"prompt": f"{i}+1=", "answer": i + 1}) for i in range(200)]
    (tmp_path / "tasks.jsonl").write_text("\n".join(lines) + "\n")
    smoke = v05("train", "--preset", "smoke", "--rollouts", 64, "--out", "one", environment=environment, directory=tmp_path)
    assert smoke.returncode == 0, smoke.stderr
    options = ("--jsonl", "tasks.jsonl", "--policy", "one/policy", "--max-new-tokens", 4, "--rollouts", 64)
    own = v05("train", "--preset", "smoke", *options, "--out", "two", environment=environment, directory=tmp_path)
    assert own.returncode == 0, own.stderr
    again = v05("train", "--config", "two/config.json", "--out", "three", environment=environment, directory=tmp_path)
    assert again.returncode == 0, again.stderr
    both = v05("train", "--config", "two/config.json", *options, "--out", "x", environment=environment, directory=tmp_path)
    assert both.returncode == 2
    assert "--config is complete, so jsonl, max_new_tokens, policy, rollouts cannot be set beside it" in both.stderr


def test_single_fields_are_set(environment, tmp_path):
    smallest = ("--preset", "smoke", "--rollouts", 64)
    settings = ("--set", "loss.clip_high=0.28", "--set", "task.mix.0.settings.max_terms=3", "--set", "scale=none")
    one = v05("train", *smallest, *settings, "--out", "one", environment=environment, directory=tmp_path)
    assert one.returncode == 0, one.stderr
    written = json.loads((tmp_path / "one" / "config.json").read_text())
    (source,) = written["task"]["mix"]
    assert (written["loss"]["clip_high"], written["scale"], source["settings"]["max_terms"]) == (0.28, "none", 3)
    # All other settings are the defaults.
    defaults = json.loads(run_config("smoke", "v05", total_rollouts=64).model_dump_json())
    source["settings"]["max_terms"] = 2
    assert written == defaults | {"loss": defaults["loss"] | {"clip_high": 0.28}, "scale": "none", "task": written["task"]}
    assert written["task"] == defaults["task"]
    beside = ("--config", "one/config.json", "--set", "seed=3")
    two = v05("train", *beside, "--out", "two", environment=environment, directory=tmp_path)
    assert two.returncode == 0, two.stderr
    again = json.loads((tmp_path / "two" / "config.json").read_text())
    assert again == json.loads((tmp_path / "one" / "config.json").read_text()) | {"seed": 3}


def test_single_fields_of_a_comparison_are_set(environment, tmp_path):
    arguments = (
        "compare",
        "--preset",
        "smoke",
        "--methods",
        "grpo",
        "--seeds",
        1,
        "--rollouts",
        64,
        "--set",
        "loss.clip_high=0.28",
    )
    result = v05(*arguments, "--out", "runs", environment=environment, directory=tmp_path)
    assert result.returncode == 0, result.stderr
    assert json.loads((tmp_path / "runs" / "grpo@16-seed0" / "config.json").read_text())["loss"]["clip_high"] == 0.28


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("train", "--set", "loss.clip_high"), "--set loss.clip_high: a setting is NAME=VALUE; write for example --set loss.clip"),
        (("train", "--set", "loss.clip_high=-1"), "--set loss.clip_high=-1: loss.clip_high=-1: Input should be greater than 0"),
        (("train", "--set", "loss.clip_high=high"), "--set loss.clip_high=high: loss.clip_high='high': Input should be a valid"),
        (("train", "--set", "loss.clip_hihg=0.28"), "there is no field loss.clip_hihg; close names are loss.clip_high"),
        (("train", "--set", "clip_high=0.28"), "--set clip_high=0.28: there is no field clip_high; close names are loss.clip_high"),
        (("train", "--set", "los.clip_high=0.28"), "there is no field los.clip_high; close names are loss.clip_high"),
        (("train", "--set", 'loss={"clip_hihg": 0.28}'), "there is no field loss.clip_hihg; close names are loss.clip_high"),
        (
            ("train", "--set", "task.mix.0.wieght=2"),
            "--set task.mix.0.wieght=2: there is no field task.mix.0.wieght; close names are task.mix.0.weight",
        ),
        (("train", "--set", "xyz=1"), "there is no field xyz; the config.json of a run shows all"),
        (("train", "--set", "seed.x=1"), "--set seed.x=1: seed={'x': 1}: Input should be a valid integer"),
        (("train", "--set", "optimizer.max_grad_norm=Infinity"), "optimizer.max_grad_norm=inf: Input should be a finite number"),
        (("train", "--set", "seed=1", "--set", "loss.clip_low=2"), "v05: --set loss.clip_low=2: loss.clip_low=2: Input should be"),
        (("train", "--set", "budget.maximum=2"), "--set budget.maximum=2: budget.maximum=2 is below budget.initial=4"),
        (("train", "--method", "ppo", "--set", "seed=1"), "v05: method='ppo' is unknown"),
        (
            ("train", "--learning-rate", "-1", "--set", "seed=1"),
            "v05: optimizer.learning_rate=-1.0: Input should be greater than 0",
        ),
        (("compare", "--set", "loss.clip_hihg=0.28"), "there is no field loss.clip_hihg; close names are loss.clip_high"),
        (("compare", "--set", "seed=1"), "--set seed=1: a comparison chooses methods and seeds itself; use --methods and --seeds"),
        (("compare", "--set", "method=v05"), "--set method=v05: a comparison chooses methods and seeds itself"),
        (
            ("compare", "--methods", "rloo,grpo@16,grpo"),
            "--methods rloo,grpo@16,grpo names a method twice: in full, the methods are rloo",
        ),
        (("compare", "--methods", "v05@4,v05@8", "--set", "budget.initial=8", "--set", "budget.maximum=8"), "names a method twice"),
        (("train", "--set", "task.mix.0.weight=Infinity"), "mix.0.weight=inf: Input should be a finite number"),
        (
            ("train", "--set", "budget.rule=best"),
            "budget.rule='best' is unknown; choose one of uniform, osla, calibrated, variance",
        ),
        (("train", "--set", "task.kind=csv"), "task.kind='csv' is unknown; choose one of reasoning_gym, jsonl"),
        (("train", "--set", "budget.chunk=loo"), "budget.chunk='loo': chunk='loo'; give an integer or 'look'"),
        (("train", "--set", "budget.chunk=0"), "budget.chunk=0: chunk=0 is not positive"),
        (("compare", "--suite", "smoke", "--set", "loss.clip_high=1"), "so --set loss.clip_high=1 cannot be set beside it"),
    ],
)
def test_settings_at_fault_are_named(arguments, message, tmp_path):
    result = CliRunner().invoke(app, [*arguments, "--out", str(tmp_path / "run")])
    assert result.exit_code == 2
    assert message in result.output
    assert not (tmp_path / "run" / "config.json").exists()


MODEL_FOLDER = "no config.json there; give a Hugging Face model folder"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("simulate", "absent"), "v05: OUTCOMES absent does not exist; give a log of rollouts or a folder of logs"),
        (
            ("check-task", "absent"),
            'v05: FILE absent does not exist; give a JSON-lines file with one {"prompt": ..., "answer": ...}',
        ),
        (("check-task", "folder"), "v05: FILE folder is a folder, not a file; give a JSON-lines file"),
        (("fit-prior", "absent"), "v05: LOGS absent does not exist; give JSON-lines files with policy, prompt, score and trials"),
        (("fit-prior", "folder"), "v05: LOGS folder is a folder, not a file; give JSON-lines files"),
        (("fit-prior", "log", "--tabpfn", "absent"), "v05: --tabpfn absent does not exist; give the checkpoint file"),
        (("fit-prior", "log", "--backbone", "absent"), "v05: --backbone absent does not exist; give the folder of a Hugging Face"),
        (("report", "absent"), "v05: RUN_DIR=absent holds no run"),
        (("eval", "absent", "--benchmarks", "any", "--data", "folder"), f"v05: model=absent: {MODEL_FOLDER}"),
        (("train", "--out", "run", "--config", "absent"), "v05: --config absent does not exist; give the config.json of a run"),
        (("train", "--out", "run", "--config", "folder"), "v05: --config folder is a folder, not a file; give the config.json"),
        (("train", "--out", "run", "--jsonl", "absent"), "v05: --jsonl absent does not exist; give a JSON-lines file"),
        (
            ("train", "--out", "run", "--set", 'task={"kind": "jsonl", "path": "absent"}'),
            "v05: task.path absent does not exist; give a JSON-lines file",
        ),
        (("train", "--out", "run", "--policy", "absent"), f"v05: policy.path=absent: {MODEL_FOLDER}"),
        (("compare", "--out", "runs", "--methods", "grpo", "--policy", "absent"), f"v05: policy.path=absent: {MODEL_FOLDER}"),
        (
            ("compare", "--out", "runs", "--methods", "grpo", "--set", 'task={"kind": "jsonl", "path": "absent"}'),
            "v05: task.path absent does not exist; give a JSON-lines file",
        ),
    ],
)
def test_a_missing_input_is_named_with_what_to_give(arguments, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder").mkdir()
    (tmp_path / "log").touch()
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 2
    assert message in result.output
    assert "Errno" not in result.output


def test_an_unknown_replay_is_refused_before_the_log_is_read(tmp_path):
    result = CliRunner().invoke(app, ["simulate", str(tmp_path), "--replay", "magic"])
    assert result.exit_code == 2
    assert "replay='magic' is unknown; choose one of superpopulation, finite" in result.output


def test_settings_come_after_all_else_and_are_checked_together():
    # Each setting alone would be refused: the preset's step cannot hold a prompt of 100 rollouts, and rule 'total' needs a mean.
    assert run_config("smoke", "v05@100", ["rollouts_per_step=200"]).budget.initial == 100
    assert run_config("smoke", "v05", ["budget.rule=total", "budget.unbiased=false", "budget.mean=6"]).budget.mean == 6
    overlong = run_config("smoke", "grpo", ["overlong.buffer=2", "overlong.buffer=1"]).overlong
    assert overlong is not None
    assert overlong.buffer == 1
    assert run_config("smoke", "dapo", ["overlong=null"]).overlong is None
    own = run_config("smoke", "v05", ['task={"kind": "jsonl"}', "task.path=a=b.jsonl"]).task
    assert str(own.path) == "a=b.jsonl"


def test_an_interrupted_run_is_readable_and_goes_on(environment, tmp_path):
    total = 16_000  # with 6,400 rollouts a run once ended before the signal arrived
    arguments = ("train", "--preset", "smoke", "--rollouts", total, "--out", "run")
    command = [warm.python(), "-m", "v05", *map(str, arguments)]
    # A shell that runs the tests in the background makes them and their children ignore the signal.
    heed = functools.partial(signal.signal, signal.SIGINT, signal.SIG_DFL)
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment, cwd=tmp_path, preexec_fn=heed) as process:
        try:
            deadline = time.monotonic() + 240
            while len(read_metrics(tmp_path / "run", "step")) < 3 and process.poll() is None and time.monotonic() < deadline:
                time.sleep(0.01)
            process.send_signal(signal.SIGINT)
            _, stderr = process.communicate(timeout=60)
        finally:
            process.kill()
    assert process.returncode == 130, stderr
    assert "interrupted; the results so far are in run, and the same command resumes from there" in stderr
    assert "Traceback" not in stderr
    steps = read_metrics(tmp_path / "run", "step")
    assert [s["step"] for s in steps] == list(range(len(steps)))
    assert json.loads((tmp_path / "run" / "config.json").read_text())["method"] == "v05"
    assert not (tmp_path / "run" / "result.json").exists()
    full = v05(*arguments, environment=environment, directory=tmp_path, largest_file=100_000)
    assert full.returncode == 2
    assert "cannot be written" in full.stderr
    assert "make room" in full.stderr
    assert "Traceback" not in full.stderr
    again = v05(*arguments, environment=environment, directory=tmp_path)
    assert again.returncode == 0, again.stderr
    assert "resuming from step " in again.stderr
    steps = read_metrics(tmp_path / "run", "step")
    assert [s["step"] for s in steps] == list(range(len(steps)))
    assert steps[-1]["rollouts"] > total - 64 / 2


def test_a_directory_that_cannot_be_written_is_explained(environment, tmp_path):
    (tmp_path / "file").write_text("")
    result = v05("train", "--preset", "smoke", "--out", "file/run", environment=environment, directory=tmp_path)
    assert result.returncode == 2
    assert "Not a directory: 'file/run'" in result.stderr
    assert "Traceback" not in result.stderr


def test_what_ends_a_run_is_explained_in_one_line(environment, tmp_path):
    with FakeServer(lambda path, body, before: 404 if path == "/collective_rpc" else None) as server:
        config = run_config("smoke", "v05", engine={"kind": "vllm_server", "url": server.url})
        (tmp_path / "config.json").write_text(config.model_dump_json())
        result = v05("train", "--config", "config.json", "--out", "run", environment=environment, directory=tmp_path)
    assert result.returncode == 2
    assert "the server does not reload weights" in result.stderr
    assert "have it run, with VLLM_SERVER_DEV_MODE=1" in result.stderr
    assert "Traceback" not in result.stderr
    assert not (tmp_path / "run" / "engine_weights").exists()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("[]", "config.json holds no JSON object but '[]'"),
        ("{", "config.json: Expecting property name"),
        ('{"method": "v05"}', "--config config.json: task: Field required"),
        ('{"method": "v05", "seed": "\\u001b[31mred"}', "--config config.json: "),
    ],
)
def test_a_configuration_at_fault_is_named(content, message, environment, tmp_path):
    (tmp_path / "config.json").write_text(content)
    result = v05("train", "--config", "config.json", "--out", "run", environment=environment, directory=tmp_path)
    assert result.returncode == 2
    assert message in result.stderr
    assert "\x1b" not in result.stderr
    assert "Traceback" not in result.stderr


def test_what_a_server_says_does_not_drive_the_terminal(environment, tmp_path):
    words = b"\x1b[31mno\x1b]0;taken over\x07 vLLM"
    with FakeServer(lambda path, body, before: words) as server:
        config = run_config("smoke", "v05", engine={"kind": "vllm_server", "url": server.url})
        (tmp_path / "config.json").write_text(config.model_dump_json())
        result = v05("train", "--config", "config.json", "--out", "run", environment=environment, directory=tmp_path)
    assert result.returncode == 2
    assert f"engine.url={server.url}: no vLLM server answers there" in result.stderr
    assert "\x1b" not in result.stderr
    assert "\x07" not in result.stderr
    assert "Traceback" not in result.stderr


def test_a_comparison_under_torchrun_is_refused(environment, tmp_path):
    result = v05("compare", "--preset", "smoke", environment={**environment, "WORLD_SIZE": "2"}, directory=tmp_path)
    assert result.returncode == 2
    assert "call it without torchrun" in result.stderr


def test_a_missing_extra_says_which(tmp_path):
    script = "import sys; sys.modules['typer'] = None; import v05.cli"
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=tmp_path)
    assert result.returncode == 1
    assert "pip install 'v05[train]'" in result.stderr


def test_the_source_tree_says_how_to_install_it(tmp_path):
    # What a Python without v05 sees in the repository's root.
    root = Path(__file__).parents[2]
    script = f"import sys; sys.meta_path[:] = sys.meta_path[-3:]; sys.path[:] = [{str(root)!r}, *sys.path]; import v05"
    result = subprocess.run([sys.executable, "-I", "-S", "-c", script], capture_output=True, text=True, cwd=tmp_path)
    assert result.returncode == 1
    assert "pip install -e ." in result.stderr


def test_a_policy_without_a_preset_is_trained_as_a_pretrained_one(environment, tmp_path):
    (tmp_path / "model").mkdir()
    for options, rate, rollouts in (
        ((), 1e-5, 4096),
        (("--preset", "tiny"), 3e-4, 80_000),
        (("--learning-rate", 2e-5), 2e-5, 4096),
    ):
        out = tmp_path / f"run{rate}"
        arguments = ("train", "--policy", "model", *options, "--out", out)
        result = v05(*arguments, environment=environment, directory=tmp_path)
        assert "no config.json there" in result.stderr  # the run fails after its settings are written
        config = json.loads((out / "config.json").read_text())
        assert (config["optimizer"]["learning_rate"], config["total_rollouts"]) == (rate, rollouts)


@pytest.mark.parametrize(("width", "shown"), [(200, 4), (36, 3), (30, 2), (12, 1)])
def test_a_table_too_wide_for_the_terminal_leaves_out_its_last_columns(width, shown, monkeypatch, capsys):
    heads = ["method", "accuracy", "greedy", "seconds"]
    table = Table()
    for head in heads:
        table.add_column(head, no_wrap=True)
    table.add_row("grpo@16", "0.439", "0.468", "3")
    monkeypatch.setattr("v05.cli.shared.output", lambda: Console(width=width))
    print_table(table)
    printed = capsys.readouterr()
    assert [head for head in heads if head in printed.out] == heads[:shown]
    assert "…" not in printed.out or shown == 1  # the first column stays, even cut
    told = f"left out, as the terminal is {width} columns wide: {', '.join(heads[shown:])}\n"
    assert printed.err == ("" if shown == len(heads) else told)


def test_the_help_names_every_method(environment, tmp_path):
    told = v05("train", "--help", environment=environment | {"COLUMNS": "200"}, directory=tmp_path).stdout
    missing = [name for name in METHODS if not re.search(rf"\b{name}\b", told)]
    assert not missing
