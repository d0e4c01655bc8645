"""What examples/smollm2.sh needs around `v05 train`; the model itself is not downloaded here."""

import csv
import importlib.util
import json
from pathlib import Path

import numpy as np
import pytest

from v05.tasks import make_task
from v05.train.config import RunConfig
from v05.train.evaluation import write_outcomes
from v05.train.metrics import write_json

SCRIPT = Path(__file__).parents[2] / "examples" / "smollm2.py"


@pytest.fixture(scope="module")
def script():
    spec = importlib.util.spec_from_file_location("smollm2", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_a_run_is_configured_on_the_prompts_that_are_written(script, tmp_path):
    script.write_prompts(tmp_path)
    script.configure(tmp_path, "calibrated@4")
    config = RunConfig.model_validate_json((tmp_path / "calibrated@4.json").read_text())
    assert (config.method, config.budget.rule, config.budget.initial) == ("calibrated", "uniform", 4)
    assert config.policy.path == tmp_path / "start"
    task = make_task(config.task)
    _, prompt = next(task.prompts("heldout"))
    a, b = (int(number) for number in prompt.text.splitlines()[-1].rstrip(" =").split(" + "))
    assert task.verify(prompt, f" {a + b}") == 1.0
    assert task.verify(prompt, f" {a + b + 1}") == task.verify(prompt, "") == 0.0


def test_the_table_says_what_was_gained(script, tmp_path, capsys):
    run = tmp_path / "grpo@4"
    script.configure(tmp_path, "grpo@4")
    config = RunConfig.model_validate_json((tmp_path / "grpo@4.json").read_text())
    run.mkdir()
    before = np.array([0.0, 0.5] * 20)
    write_outcomes(run, config, 0, [str(i) for i in range(40)], before, 2)
    result = {"rollouts": 128, "steps": 2, "seconds": 1.6, "heldout_samples": 2, "heldout_successes": [1] * 40}
    write_json(run / "result.json", result)
    steps = [{"kind": "step", "rollouts": 64, "seconds": 0.8, "tokens": tokens} for tokens in (200, 256)]
    (run / "metrics.jsonl").write_text("".join(json.dumps(step) + "\n" for step in steps))
    script.table(tmp_path, ["grpo@4"])
    (row,) = csv.DictReader((tmp_path / "smollm2.csv").read_text().splitlines())
    assert row["method"] == "grpo@4"
    assert [int(row[name]) for name in ("rollouts", "steps", "tokens", "prompts", "samples")] == [128, 2, 456, 40, 2]
    assert [float(row[name]) for name in ("before", "after", "after_low", "after_high", "gain")] == [0.25, 0.5, 0.5, 0.5, 0.25]
    assert 0.15 < float(row["gain_low"]) < 0.25 < float(row["gain_high"]) < 0.35
    assert "0.25" in capsys.readouterr().out
