"""A run with damaged files is named and left unchanged. Other runs can still be compared and resumed."""

import json

import pytest

from helpers.kill_and_resume import smoke
from helpers.made_up_runs import write_run
from v05.train.compare import is_finished, load_run, run_all
from v05.train.metrics import read_metrics, read_result
from v05.train.presets import run_config
from v05.train.trainer import Trainer


def written(directory, **settings):
    """Write a finished run. Returns its configuration."""
    write_run(directory, "grpo@8", settings.get("seed", 0), steps=6, of=6)
    return run_config("tiny", "grpo@8", seed=settings.get("seed", 0), total_rollouts=6 * 512)


def second_line(**changes):
    def damage(directory):
        lines = (directory / "metrics.jsonl").read_text().splitlines(keepends=True)
        record = {name: value for name, value in (json.loads(lines[2]) | changes).items() if value is not ...}
        (directory / "metrics.jsonl").write_text("".join([*lines[:2], json.dumps(record) + "\n", *lines[3:]]))

    return damage


def holding(name, content):
    return lambda directory: (directory / name).write_bytes(content)


DAMAGES = {
    "no JSON": (
        holding("metrics.jsonl", b'{"kind": "probe", "rollouts": 0, "baseline_mse": 1}\nx\n'),
        "metrics.jsonl, line 2: ",
    ),
    "zeros": (holding("metrics.jsonl", b"\0" * 512 + b"\n"), "metrics.jsonl, line 1: "),
    "another encoding": (holding("metrics.jsonl", b"\n\xe9\n"), "metrics.jsonl, line 2 is not UTF-8"),
    "a list": (holding("metrics.jsonl", b"[1]\n"), "metrics.jsonl, line 1 holds no JSON object"),
    "no records": (holding("metrics.jsonl", b""), "metrics.jsonl has 0 evaluations and 0 steps; a finished run has both"),
    "a step without rollouts": (second_line(rollouts=...), "metrics.jsonl, line 3 is not as v05 writes it: rollouts"),
    "no kind": (second_line(kind=...), "metrics.jsonl, line 3 is not as v05 writes it: kind"),
    "a kind that is a number": (second_line(kind=3), "metrics.jsonl, line 3 is not as v05 writes it: kind=3"),
    "rollouts in words": (second_line(rollouts="many"), "line 3 is not as v05 writes it: rollouts='many'"),
    "negative rollouts": (second_line(rollouts=-1), "line 3 is not as v05 writes it: rollouts=-1"),
    "rollouts that are true": (second_line(rollouts=True), "line 3 is not as v05 writes it: rollouts=True"),
    "NaN": (second_line(seconds=float("nan")), "line 3 is not as v05 writes it: seconds=nan"),
    "a histogram of words": (second_line(group_sizes=["a"]), "line 3 is not as v05 writes it: group_sizes.0='a'"),
    "few bins": (second_line(prior_outcomes=[[1, 2, 3]]), "line 3 is not as v05 writes it: prior_outcomes"),
    "a configuration that is a list": (holding("config.json", b"[]"), "config.json holds no JSON object but '[]'"),
    "half a configuration": (holding("config.json", b'{"method":'), "config.json: "),
    "no configuration": (lambda directory: (directory / "config.json").unlink(), "config.json"),
    "inputs that are a list": (holding("inputs.json", b"[]"), "inputs.json holds no JSON object"),
    "an empty result": (holding("result.json", b"{}"), "result.json is not as v05 writes it: method"),
    "a result that is a list": (holding("result.json", b"[]"), "result.json holds no JSON object"),
    "a result in words": (holding("result.json", b'{"rollouts": "many"}'), "result.json is not as v05 writes it"),
    "half a result": (holding("result.json", b'{"rollouts": '), "result.json: "),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_run_is_named_and_keeps_no_other_from_the_comparison(damage, tmp_path):
    inflict, message = DAMAGES[damage]
    configs = {name: written(tmp_path / name, seed=seed) for seed, name in enumerate(("sound", "damaged", "also"))}
    inflict(tmp_path / "damaged")
    before = {path: path.read_bytes() for path in sorted((tmp_path / "damaged").iterdir())}
    states = []
    assert run_all(configs, tmp_path, 1, states.append) == ["damaged"]
    last = {state.name: state for state in states[-1]}
    assert {name: state.status for name, state in last.items()} == {"sound": "done", "damaged": "damaged", "also": "done"}
    assert message in last["damaged"].why
    assert f"or delete {tmp_path / 'damaged'} to run it again" in last["damaged"].why
    assert {path: path.read_bytes() for path in sorted((tmp_path / "damaged").iterdir())} == before


def test_a_result_without_what_a_comparison_needs_is_named(tmp_path):
    config = written(tmp_path / "run")
    result = json.loads((tmp_path / "run" / "result.json").read_text())
    (tmp_path / "run" / "result.json").write_text(json.dumps(result | {"heldout_successes": None}))
    assert read_result(tmp_path / "run")["heldout_successes"] is None  # the report's page does not need it
    with pytest.raises(ValueError, match=r"result\.json has no heldout_samples or heldout_successes"):
        load_run("grpo@8", tmp_path / "run")
    assert run_all({"run": config}, tmp_path, 1, lambda states: None) == ["run"]


def test_other_kinds_and_a_line_being_written_are_passed_over(tmp_path):
    directory = tmp_path / "run"
    written(directory)
    known = read_metrics(directory)
    with (directory / "metrics.jsonl").open("a") as file:
        file.write('{"kind": "of a version to come", "rollouts": "many"}\n{"kind": "st')
    assert read_metrics(directory)[:-1] == known
    assert read_metrics(directory, "step") == [record for record in known if record["kind"] == "step"]


def interrupted(directory):
    for done, _ in enumerate(Trainer(smoke(4), directory, print).run()):
        if done == 2:
            return


def test_what_a_power_cut_left_after_the_checkpoint_is_dropped(tmp_path):
    interrupted(tmp_path / "run")
    with (tmp_path / "run" / "metrics.jsonl").open("ab") as file:
        file.write(b"\0" * 4096 + b"\n\xff\n")
    assert run_all({"run": smoke(4)}, tmp_path, 1, lambda states: None) == []
    assert is_finished(smoke(4), tmp_path / "run")
    steps = [record["step"] for record in read_metrics(tmp_path / "run", "step")]
    assert steps == list(range(len(steps)))


def test_a_run_does_not_go_on_from_records_that_nobody_can_read(tmp_path):
    interrupted(tmp_path / "run")
    path = tmp_path / "run" / "metrics.jsonl"
    data = path.read_bytes()
    path.write_bytes(b"X" + data[1:])
    with pytest.raises(ValueError, match=r"metrics\.jsonl, line 1: .*; repair the line, or give another directory"):
        Trainer(smoke(4), tmp_path / "run", print)
    states = []
    assert run_all({"run": smoke(4), "other": smoke(2)}, tmp_path, 1, states.append) == ["run"]
    last = {state.name: state for state in states[-1]}
    assert last["other"].status == "done"
    assert f"its process ended with status 1, without a result; see {tmp_path / 'run' / 'log.txt'}" in last["run"].why
    assert "metrics.jsonl, line 1: " in (tmp_path / "run" / "log.txt").read_text()
    path.write_bytes(data)
    assert run_all({"run": smoke(4)}, tmp_path, 1, states.append) == []
