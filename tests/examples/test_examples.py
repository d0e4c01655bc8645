"""The small examples and the notebook run, and reach the results that they claim."""

import importlib.util
import json
import os
import re
import shlex
import subprocess

import nbclient
import nbformat
import pytest

from helpers import warm
from helpers.documents import ROOT
from helpers.tiny_policy import tiny_model, tiny_tokenizer

EXAMPLES = ROOT / "examples"


@pytest.fixture
def run(tmp_path):
    """Runs an example outside the repository, and returns its output."""

    def run(name, *arguments, status=0):
        command = [warm.python(), EXAMPLES / name, *arguments]
        environment = os.environ | {"V05_CACHE": str(tmp_path / "cache"), "COLUMNS": "200"}
        done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=environment)
        assert done.returncode == status, done.stdout + done.stderr
        return done.stdout + done.stderr

    return run


@pytest.fixture
def model(tmp_path):
    tiny_model().save_pretrained(tmp_path / "model")
    tiny_tokenizer().save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def figures(printed):
    """The first number in each line, by the line's name."""
    found = re.findall(r"^(.*?)(?:: success rate)? +(\d\.\d+)", printed, re.MULTILINE)
    return {name.strip(): float(value) for name, value in found}


def test_the_op_in_a_loop(run):
    rates = figures(run("own_loop.py"))
    assert rates["step 15"] < rates["step 30"] < rates["step 60"]
    assert rates["step 60"] > 0.9


def test_one_rollout_a_prompt(run):
    rates = figures(run("single_rollout.py", "--steps", "120", "--seeds", "1"))
    assert list(rates) == ["grpo@8", "none@1", "batch@1", "batch_energy@1", "optimal@1"]
    assert min(rates.values()) > 2 / 19  # an untrained network is right once in 19


def test_a_value_model(run, model):
    errors = figures(run("value_model.py", "--backbone", model, "--steps", "12"))
    assert list(errors) == ["1/2 for every prompt", "mean of 2 rollouts", "V0", "V0 fused with the mean"]
    assert errors["V0"] < errors["mean of 2 rollouts"]
    assert "absent: no config.json there" in run("value_model.py", "--backbone", "absent", status=1)


def test_logs_of_ones_own(run, tmp_path):
    printed = run("simulate_my_logs.py", "--out", tmp_path / "out", "--maximum", "6")
    assert "read rollouts: 3,200 rollouts in 200 groups" in printed
    assert {record["method"] for record in json.loads((tmp_path / "out" / "records.json").read_text())} >= {"grpo", "v05"}
    assert (tmp_path / "out" / "error.png").stat().st_size > 10_000


def test_a_budget_in_verl(run, model, tmp_path):
    arguments = ("--model", model, "--out", tmp_path / "out")
    words = shlex.split(run("budget_with_verl.py", *arguments, "--print", "--", "trainer.total_training_steps=3"))
    assert words[1:3] == ["-m", "verl.trainer.main_ppo"]
    assert words[-1] == "trainer.total_training_steps=3"
    if importlib.util.find_spec("verl") is None:
        assert "verl is not installed here; pip install '.[verl]'" in run("budget_with_verl.py", *arguments, status=1)
    assert "no config.json there" in run("budget_with_verl.py", "--model", tmp_path, status=1)

    spec = importlib.util.spec_from_file_location("budget_with_verl", EXAMPLES / "budget_with_verl.py")
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    rows = [json.loads(line) for line in (tmp_path / "out" / "train.jsonl").read_text().splitlines()]
    assert len(rows) == 4096
    for row in rows[:100]:
        a, b = map(int, re.findall(r"\d+", row["prompt"][0]["content"]))
        assert row["reward_model"]["ground_truth"] == str(a + b)
        for text, reward in ((f"It is {a + b:,}.", 1.0), (f"{a + b + 1}", 0.0), ("I do not know.", 0.0)):
            assert script.compute_score("sums", text, str(a + b)) == reward


@pytest.mark.filterwarnings("default")
def test_the_tour(tmp_path):
    """The notebook runs. Its committed pictures match its cells, and the file is small enough for a page."""
    path = EXAMPLES / "tour.ipynb"
    committed = nbformat.read(path, 4)
    nbformat.validate(committed)
    assert path.stat().st_size < 400_000
    tour = nbformat.from_dict(committed)
    nbclient.NotebookClient(tour, timeout=600, kernel_name="python3", resources={"metadata": {"path": str(tmp_path)}}).execute()
    drawn = [[kinds(cell) for cell in notebook.cells if cell.cell_type == "code"] for notebook in (committed, tour)]
    assert drawn[0] == drawn[1] == [[], *[["image/png"]] * 4]


def kinds(cell):
    """The kinds of a cell's outputs, which would include errors and warnings."""
    return [kind for output in cell.outputs for kind in output.get("data", {output.output_type: ""}) if kind != "text/plain"]


def test_the_list_names_every_example():
    listed = set(re.findall(r"\]\(([\w.]+)\)", (EXAMPLES / "README.md").read_text()))
    scripts = {path.name for path in EXAMPLES.iterdir() if path.suffix in (".py", ".sh", ".ipynb")}
    helpers = {path.name for path in EXAMPLES.glob("*.py") if path.with_suffix(".sh").exists()}
    assert listed == scripts - helpers
