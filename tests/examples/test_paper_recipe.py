"""The stages of examples/paper_qwen3_4b.sh: all are printed, and those without a GPU run on a tiny model and made-up files."""

import json
import os
import shlex
import subprocess
from pathlib import Path

import pytest
import torch
import typer

from helpers import warm
from v05.benchmarks import TEMPLATE
from v05.cli import app
from v05.prior.v0.logs import read_logs
from v05.train.config import PolicyConfig
from v05.train.policy import character_decoder, character_tokenizer

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "examples" / "paper_qwen3_4b.sh"
BEFORE = (
    "Solve the following math problem step by step. The last line of your response should be of the form Answer: $Answer (without "
    "quotes) where $Answer is the answer to the problem.\n\n"
)
AFTER = '\n\nRemember to put your answer on its own line after "Answer:".'


def script(*arguments, **environment):
    command = [SCRIPT, *arguments]
    environment = {**os.environ, "PATH": warm.path(), "COLUMNS": "200", **{name: str(value) for name, value in environment.items()}}
    return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=900)


def commands(*arguments, **environment):
    """The commands that a dry run prints, each split into words."""
    result = script("--dry-run", *arguments, **environment)
    assert result.returncode == 0, result.stderr
    return [shlex.split(line) for line in result.stdout.splitlines()]


@pytest.mark.parametrize("stage", ["prepare", "train v05", "train grpo", "train dapo", "eval start", "eval v05", "report"])
def test_a_dry_run_prints_and_does_nothing(stage, tmp_path):
    printed = commands(*stage.split(), OUT=tmp_path / "out", BACKBONE=tmp_path, ADAPTER=tmp_path / "a")
    assert not (tmp_path / "out").exists()
    assert printed
    for command in printed:
        if command[0] == "v05":  # the command line's own parser accepts it
            group = typer.main.get_command(app)
            group.commands[command[1]].make_context(command[1], command[2:], resilient_parsing=False)
        if command[0] == "env":
            assert ("+algorithm.v05.outcomes=" in " ".join(command)) == (stage == "train v05")
            method = stage.split()[1]
            assert f"method={method}" in command
            assert (ROOT / "examples" / "paper_qwen3_4b" / "method" / f"{method}.yaml").is_file()


def test_a_dry_run_is_one_wherever_it_is_said(tmp_path):
    result = script("report", "--dry-run", OUT=tmp_path / "out")
    assert result.returncode == 0
    assert "examples/paper_qwen3_4b.py report" in result.stdout
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("stage", ["", "train", "train ppo", "eval", "evaluate"])
def test_a_wrong_stage_gets_the_usage(stage):
    result = script("--dry-run", *stage.split())
    assert result.returncode == 2
    assert "train v05|grpo|dapo" in result.stderr


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A random model over characters, a file like DAPO-Math-17k with every problem twice, and a benchmark."""
    folder = tmp_path_factory.mktemp("made")
    torch.manual_seed(0)
    tokenizer = character_tokenizer()
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }}{% endfor %}\n"
    character_decoder(PolicyConfig(hidden_size=32, layers=1, heads=2, intermediate_size=32), len(tokenizer)).save_pretrained(
        folder / "model"
    )
    tokenizer.save_pretrained(folder / "model")
    rows = [
        {
            "data_source": "math_dapo",
            "prompt": [{"role": "user", "content": f"{BEFORE}What is {i} + {i}?{AFTER}"}] if i % 2 else f"What is {i} + {i}?",
            "ability": "MATH",
            "reward_model": {"ground_truth": str(2 * i), "style": "rule-lighteval/MATH_v2"},
            "extra_info": {"index": f"id{i}"},
        }
        for i in range(30)
    ]
    (folder / "dapo.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows * 2))
    (folder / "aime24.jsonl").write_text("".join(json.dumps({"problem": f"{i}?", "answer": i}) + "\n" for i in range(3)))
    return folder


def test_the_stages_without_a_gpu(made, tmp_path):
    given = dict(
        MODEL=made / "model", DAPO=made / "dapo.jsonl", BENCHMARKS=made, NAMES="aime24", OUT=tmp_path, ENGINE="transformers"
    )
    given |= dict(LENGTH=8, CONTEXT=24, SAMPLES=2, BACKBONE=made / "model", V05_CACHE=tmp_path / "cache")
    for stage in ("prepare", "eval start"):
        result = script(*stage.split(), **given)
        assert result.returncode == 0, result.stdout + result.stderr
    train = [json.loads(line) for line in (tmp_path / "data" / "train.jsonl").read_text().splitlines()]
    assert [row["prompt"][0]["content"] for row in train] == [
        TEMPLATE.replace("{problem}", f"What is {i} + {i}?") for i in range(30)
    ]
    assert [row["reward_model"]["ground_truth"] for row in train] == [str(2 * i) for i in range(30)]
    assert {row["data_source"] for row in train} == {"math_dapo"}
    outcomes = read_logs([tmp_path / "context" / "outcomes.jsonl"])
    assert len(outcomes) == 24
    assert {row.prompt for row in outcomes} <= {row["prompt"][0]["content"] for row in train}  # V0 reads training's own texts
    assert {row.trials for row in outcomes} == {8}
    assert json.loads((tmp_path / "prior.json").read_text())
    for arm in ("grpo", "dapo", "v05"):
        (tmp_path / arm).mkdir()
        (tmp_path / arm / "eval-300").symlink_to(tmp_path / "start" / "eval")
    result = script("report", **given)
    assert result.returncode == 0, result.stderr
    records = json.loads((tmp_path / "report.json").read_text())
    assert [r["arm"] for r in records] == ["grpo", "dapo", "v05", "start"]
    assert {(r["gain"], r["gain_low"], r["gain_high"]) for r in records} == {(0.0, 0.0, 0.0)}
