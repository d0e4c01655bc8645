"""examples/llm_on_one_gpu.sh without its download: a tiny model with a chat template replaces SmolLM2."""

import csv
import hashlib
import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from helpers import warm
from v05.train.compare import load_run
from v05.train.config import PolicyConfig
from v05.train.policy import character_decoder, character_tokenizer

ROOT = Path(__file__).parents[2]
CHAT = "{% for message in messages %}{{ message['role'] }}:{{ message['content'] }}\n{% endfor %}a:"


@pytest.fixture(scope="module")
def script():
    spec = importlib.util.spec_from_file_location("llm_on_one_gpu", ROOT / "examples" / "llm_on_one_gpu.py")
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)  # the script's dataclasses look up their module there
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def out(tmp_path_factory):
    """The output of the script with all its methods, at a tenth of the rollouts of a GPU run."""
    folder = tmp_path_factory.mktemp("llm")
    tokenizer = character_tokenizer()
    tokenizer.chat_template = CHAT
    model = character_decoder(PolicyConfig(hidden_size=32, layers=1, heads=2, intermediate_size=32), len(tokenizer))
    for part in (model, tokenizer):
        part.save_pretrained(folder / "model")
    settings = "rollouts_per_step=64 evaluation.prompts=16 evaluation.evaluations=2"
    settings += " policy.max_new_tokens=4 task.size=32 verifier.workers=0"
    environment = {"PYTHON": warm.python(), "MODEL": folder / "model", "ROLLOUTS": 400, "JOBS": 2, "SETTINGS": settings}
    command = [ROOT / "examples" / "llm_on_one_gpu.sh", folder / "out"]
    environment = {**os.environ, **{name: str(value) for name, value in environment.items()}}
    result = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=600)
    assert result.returncode == 0, result.stderr
    return folder / "out"


def rows_of(file):
    return list(csv.DictReader(file.read_text().splitlines()))


def test_all_methods_are_trained_for_equal_rollouts(out):
    summary = rows_of(out / "summary.csv")
    methods = ["grpo@16", "dr_grpo@4", "v05@4..16", "calibrated@1", "batch@1", "optimal@1", "optimal@2"]
    assert [row["method"] for row in summary] == methods
    for row in summary:
        result = json.loads((out / f"{row['method']}-seed0" / "result.json").read_text())
        assert 350 <= result["rollouts"] <= 450
        assert float(row["before"]) == pytest.approx(result["accuracy_before"], abs=1e-4)
        assert float(row["before_low"]) <= float(row["before"]) <= float(row["before_high"])
        assert float(row["seconds_in_all"]) >= float(row["seconds"]) > 0
        if result["rollouts"] == float(row["rollouts"]):  # every other run has at least as many rollouts
            assert float(row["after_rollouts"]) == pytest.approx(result["accuracy_after"], abs=1e-4)
    assert float(summary[3]["group_size"]) == 1
    assert (out / "curves.png").stat().st_size > 10_000


def test_every_evaluation_is_a_row(out):
    rows = [row for row in rows_of(out / "rows.csv") if row["method"] == "optimal@2"]
    evaluations = load_run("optimal@2", out / "optimal@2-seed0").evaluations
    assert len(rows) == len(evaluations) == 3
    for row, evaluation in zip(rows, evaluations, strict=True):
        assert (int(row["rollouts"]), int(row["tokens"])) == (evaluation["rollouts"], evaluation["generated_tokens"])
        assert float(row["accuracy"]) == pytest.approx(evaluation["accuracy"], abs=1e-4)
        assert (row["prompts"], row["samples"]) == ("16", "2")


def test_prompts_return(out):
    config = json.loads((out / "optimal@1-seed0" / "config.json").read_text())
    assert (config["task"]["size"], config["chat"]) == (32, True)


def test_a_file_in_parts_is_joined_and_compared(script, tmp_path, monkeypatch):
    whole = bytes(range(256)) * 9
    monkeypatch.setitem(script.SHA256, "a.gguf", hashlib.sha256(whole).hexdigest())
    for folder, name, content in (("x", "a.gguf.00", whole[:999]), ("y", "a.gguf.01", whole[999:])):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / name).write_bytes(content)
    (tmp_path / "out").mkdir()
    assert script.whole_file(tmp_path, tmp_path / "out").read_bytes() == whole
    (tmp_path / "out" / "a.gguf").unlink()
    (tmp_path / "y" / "a.gguf.01").unlink()
    with pytest.raises(ValueError, match=r"a.gguf has the SHA-256 \w+ in place of \w+; a part is missing or damaged"):
        script.whole_file(tmp_path, tmp_path / "out")


def test_a_folder_without_one_file_is_refused(script, tmp_path):
    with pytest.raises(ValueError, match=r"has 0 files \*.gguf and parts of 0 others; exactly one file is needed"):
        script.whole_file(tmp_path, tmp_path)
