"""The page shows what the runs recorded. Missing records and refused runs are named."""

import base64
import gzip
import hashlib
import json
import re
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from helpers.made_up_runs import HOSTILE, write_run
from v05.cli import app
from v05.report.figures import SAMPLES, document
from v05.report.page import coloured, write_page
from v05.report.runs import find_runs, names_of, read_runs, seeds_of
from v05.train.compare import rollouts_to
from v05.train.config import OptimizerConfig
from v05.train.metrics import read_metrics


def untracked(items, *_):
    return items


def document_of(*places, baseline=None):
    runs, empty = read_runs(find_runs(list(places)), untracked)
    assert not empty
    return document(seeds_of(runs), runs, baseline, untracked)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """Two methods with two finished seeds each, and one unfinished run."""
    place = tmp_path_factory.mktemp("runs")
    for spec in ("grpo@8", "v05@4..16"):
        for seed in (0, 1):
            write_run(place / f"{spec}-seed{seed}", spec, seed)
    write_run(place / "calibrated@4..16-seed0", "calibrated@4..16", 0, steps=20)
    return place


def test_curves_are_means_over_seeds(place):
    groups = {group["name"]: group for group in document_of(place)["groups"]}
    assert list(groups) == ["v05@4..16", "grpo@8", "calibrated@4..16"]  # in the order of the methods
    evaluations = [read_metrics(place / f"v05@4..16-seed{seed}", "evaluation") for seed in (0, 1)]
    accuracy = np.array([[e["accuracy"] for e in of_run] for of_run in evaluations])
    found = groups["v05@4..16"]["accuracy"]
    np.testing.assert_allclose(found["mean"], accuracy.mean(axis=0))
    np.testing.assert_allclose(found["spread"], accuracy.std(axis=0, ddof=1))
    assert found["rollouts"] == [e["rollouts"] for e in evaluations[0]]
    np.testing.assert_allclose(found["generated_tokens"], 4 * np.array(found["rollouts"]))
    assert found["seconds"][-1] == pytest.approx(np.mean([of_run[-1]["seconds"] for of_run in evaluations]))
    steps = [read_metrics(place / f"grpo@8-seed{seed}", "step") for seed in (0, 1)]
    norms = np.array([[s["grad_norm"] for s in of_run if s["grad_norm"] is not None] for of_run in steps])
    found = groups["grpo@8"]["grad_norm"]
    assert np.mean(found["mean"]) == pytest.approx(norms.mean(), rel=0.01)  # step 3 had no gradient
    assert len(found["mean"]) == 59


def test_an_unfinished_run_is_shown_as_far_as_it_came(place):
    page = document_of(place)
    assert [(run["name"], run["share"]) for run in page["runs"] if not run["finished"]] == [("calibrated@4..16-seed0", 20 / 60)]
    group = page["groups"][2]
    assert not group["finished"]
    assert group["saved"] is None
    assert group["accuracy"]["spread"] is None
    assert group["accuracy"]["rollouts"][-1] <= 20 * 512


def test_an_unfinished_seed_does_not_cut_the_finished_ones_short(place, tmp_path):
    for seed, steps in ((0, 60), (1, 20)):
        write_run(tmp_path / f"seed{seed}", "grpo@8", seed, steps=steps)
    (group,) = document_of(tmp_path)["groups"]
    assert (group["seeds"], group["finished"], group["accuracy"]["rollouts"][-1]) == (1, True, 60 * 512)


def test_rollouts_saved_are_those_of_the_comparison(place):
    runs, _ = read_runs(find_runs([place]), untracked)
    groups = seeds_of(runs)
    page = document(groups, runs, None, untracked)
    v05, grpo = page["groups"][:2]
    target = float(np.mean([run["accuracy_after"] for run in page["runs"] if run["label"] == "grpo@8"]))
    assert v05["saved"]["target"] == pytest.approx(target)
    assert v05["saved"]["rollouts"] == rollouts_to(groups[1].records, groups[0].records).at
    assert v05["saved"]["rollouts"] < grpo["saved"]["needed"] == grpo["saved"]["rollouts"] <= 60 * 512
    assert document(groups, runs, "v05@4..16", untracked)["groups"][1]["saved"]["baseline"] == "v05@4..16"
    with pytest.raises(ValueError, match=r"baseline='rloo' is not among the methods found; choose one of v05@4..16, grpo@8"):
        document(groups, runs, "rloo", untracked)


def test_the_lead_is_over_the_rival_that_ends_highest(place, tmp_path):
    write_run(tmp_path / "dr_grpo@4-seed0", "dr_grpo@4", 0)
    groups = {group["name"]: group for group in document_of(place, tmp_path)["groups"]}
    ends = {name: group["final"] for name, group in groups.items()}
    assert ends["v05@4..16"] > ends["dr_grpo@4"] > ends["grpo@8"]  # v05 does not count as a rival
    found = groups["v05@4..16"]["lead"]
    assert {group["lead"]["rival"] for group in groups.values()} == {"dr_grpo@4"}
    expected = np.subtract(groups["v05@4..16"]["accuracy"]["mean"], groups["dr_grpo@4"]["accuracy"]["mean"])
    np.testing.assert_allclose(found["mean"], expected, atol=1e-12)
    assert found["rollouts"] == groups["v05@4..16"]["accuracy"]["rollouts"]
    assert max(map(abs, groups["dr_grpo@4"]["lead"]["mean"])) < 1e-12
    assert document_of(place / "v05@4..16-seed0")["groups"][0]["lead"] is None


def test_nothing_is_saved_where_the_baseline_learnt_nothing(tmp_path):
    write_run(tmp_path / "v05", "v05@4..16", 0)
    write_run(tmp_path / "grpo", "grpo@8", 0)
    path = tmp_path / "grpo" / "result.json"
    result = json.loads(path.read_text())
    path.write_text(json.dumps(result | {"accuracy_after": result["accuracy_before"]}))
    page = document_of(tmp_path)
    assert [group["saved"] for group in page["groups"]] == [None, None]
    assert page["missing"] == [
        "rollouts saved in chain_sum + products: cannot be computed, because grpo@8 ends no higher than it began"
    ]


def test_histograms_and_calibration_add_up(place):
    group = document_of(place)["groups"][0]
    steps = [read_metrics(place / f"v05@4..16-seed{seed}", "step") for seed in (0, 1)]
    counts = np.sum([step["group_sizes"] for of_run in steps for step in of_run], axis=0)
    np.testing.assert_allclose(group["group_sizes"], counts / counts.sum())
    assert sum(group["weights"]) == pytest.approx(1)
    late = np.sum([step["prior_outcomes"] for of_run in steps for step in of_run[30:]], axis=0)
    assert sum(groups for groups, _, _ in group["calibration"]) == late[:, 0].sum()
    for (_, prior, outcome), middle in zip(group["calibration"], np.arange(10) / 10 + 0.05, strict=True):
        assert prior == pytest.approx(middle)
        assert outcome == pytest.approx(0.8 * middle + 0.1, abs=0.02)
    assert sum(group["stages"].values()) == pytest.approx(1000 * group["seconds"] / group["rollouts"], rel=1e-6)


def test_runs_of_an_earlier_version_say_what_they_lack(place, tmp_path):
    write_run(tmp_path / "old", "v05@4..16", 7, new=False)
    settings = json.loads((tmp_path / "old" / "config.json").read_text())
    settings["task"]["surface"] = "retired"
    settings["gone"] = settings.pop("evaluation")
    (tmp_path / "old" / "config.json").write_text(json.dumps(settings))
    page = document_of(tmp_path)
    (group,) = page["groups"]
    assert set(group["accuracy"]) == {"mean", "spread", "rollouts", "seconds"}
    assert group["group_sizes"] is group["weights"] is group["calibration"] is None
    assert page["samples"] == []
    assert page["missing"] == [
        "the distribution of group sizes: not recorded by old",
        "curves over tokens: not recorded by old",
        "the noise of the gradient: not recorded by old",
        "completions: not recorded by old",
    ]
    assert document_of(place)["missing"] == []


def test_names_tell_apart_what_differs(tmp_path):
    write_run(tmp_path / "a" / "one", "grpo@8", 0)
    write_run(tmp_path / "b" / "one", "grpo@8", 0, optimizer=OptimizerConfig(learning_rate=1e-3))
    write_run(tmp_path / "b" / "two", "grpo@8", 1, evaluation={"prompts": 64})
    page = document_of(tmp_path)
    assert [run["name"] for run in page["runs"]] == ["a/one", "b/one", "two"]
    assert [(group["name"], group["setting"]) for group in page["groups"]] == [
        ("grpo@8 (learning_rate 0.0003)", "chain_sum + products (prompts 1024)"),
        ("grpo@8 (learning_rate 0.001)", "chain_sum + products (prompts 1024)"),
        ("grpo@8", "chain_sum + products (prompts 64)"),
    ]
    assert [group["saved"]["baseline"] for group in page["groups"]] == [page["groups"][0]["name"]] * 2 + ["grpo@8"]
    assert len({tuple(group["colours"]) for group in coloured(page)["groups"]}) == 3
    assert names_of([Path("/x/y"), Path("/z")]) == ["y", "z"]


def test_a_run_that_was_repeated_is_one_seed(place, tmp_path):
    for name in ("first", "again"):
        write_run(tmp_path / name, "grpo@8", 0)
    page = document_of(tmp_path)
    assert [group["seeds"] for group in page["groups"]] == [1]
    assert len(page["runs"]) == 2


def test_a_prior_that_is_not_learnt_is_named(tmp_path):
    write_run(tmp_path / "run", "v05@4+oracle", 0)
    (run,), _ = read_runs(find_runs([tmp_path]), untracked)
    assert run.run.label == "v05@4+oracle"


def test_a_hundred_runs_stay_small(tmp_path):
    for seed in range(100):
        write_run(tmp_path / "runs" / str(seed), "v05@4..16", seed, steps=16, of=16, samples=16)
    page = document_of(tmp_path / "runs")
    assert len(page["samples"]) <= SAMPLES < page["sampled"]
    assert len({sample["run"] for sample in page["samples"]}) == 100
    write_page(page, "many", tmp_path / "page.html")
    assert (tmp_path / "page.html").stat().st_size < 3_000_000


def test_nothing_that_a_policy_wrote_is_markup(place, tmp_path):
    page = document_of(place)
    assert any(c["text"] == HOSTILE for sample in page["samples"] for c in sample["completions"])
    write_page(page, HOSTILE, tmp_path / "page.html")
    text = (tmp_path / "page.html").read_text()
    assert text.count("<script") == text.count("</script>") == 3  # the three scripts of the page itself
    assert "<img" not in text
    packed = re.search(r'id="document">(.*?)</script>', text)[1]
    assert json.loads(gzip.decompress(base64.b64decode(packed)))["title"] == HOSTILE
    assert "://" not in text


def rewritten(directory, name, **changes):
    file = directory / name
    values = json.loads(file.read_text()) | changes
    file.write_text(json.dumps({key: value for key, value in values.items() if value is not ...}))


def last_group(**changes):
    def damage(directory):
        lines = (directory / "metrics.jsonl").read_text().splitlines()
        at = max(i for i, line in enumerate(lines) if json.loads(line)["kind"] == "group")
        lines[at] = json.dumps({key: value for key, value in (json.loads(lines[at]) | changes).items() if value is not ...})
        (directory / "metrics.jsonl").write_text("\n".join(lines) + "\n")

    return damage


def spoilt(run):
    with (run / "metrics.jsonl").open("a") as file:
        file.write("spoilt\n")


def settings(**changes):
    return lambda run: rewritten(run, "config.json", **changes)


DAMAGES = {
    "a bad line": (spoilt, "metrics.jsonl, line "),
    "configuration []": (lambda run: (run / "config.json").write_text("[]"), "config.json holds no JSON object but '[]'"),
    "no configuration": (lambda run: (run / "config.json").unlink(), "config.json"),
    "a total of 0": (settings(total_rollouts=0), "total_rollouts=0: Input should be greater"),
    "no total": (settings(total_rollouts=...), "is not the configuration of a run"),
    "a budget of words": (
        settings(budget="small"),
        "is not the configuration of a run",
    ),
    "a size of words": (settings(budget={"initial": "4", "maximum": 4}), "budget.initial='4'"),
    "a task that is a list": (settings(task=[]), "task=[]"),
    "a task without sources": (settings(task={"mix": []}), "task.mix=[]"),
    "another method": (settings(method="ppo"), "is not the configuration of a run"),
    "result {}": (lambda run: (run / "result.json").write_text("{}"), "result.json is not as v05 writes it: method"),
    "result of a list": (lambda run: (run / "result.json").write_text("[]"), "result.json holds no JSON object"),
    "result in words": (
        lambda run: rewritten(run, "result.json", rollouts="all"),
        "not as v05 writes it: rollouts='all'",
    ),
    "no kind": (last_group(kind=...), "metrics.jsonl, line "),
    "no completions": (last_group(completions=...), "is not as v05 writes it: completions"),
    "a text that is none": (last_group(completions=[{"text": 3, "reward": 1, "advantage": 0}]), "completions.0.text=3"),
    "a prompt that is none": (last_group(prompt=None), "prompt=None"),
    "inputs": (lambda run: (run / "inputs.json").write_text("{"), "inputs.json: "),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_run_is_named_and_keeps_no_other_from_the_page(damage, tmp_path):
    inflict, message = DAMAGES[damage]
    for name, seed in (("sound", 0), ("damaged", 1)):
        write_run(tmp_path / "runs" / name, "v05@4..16", seed, steps=12, of=12)
    inflict(tmp_path / "runs" / "damaged")
    places = [tmp_path / "runs" / name for name in ("sound", "damaged")]
    runs, left_out = read_runs(places, untracked)
    assert [run.name for run in runs] == ["sound"]
    assert list(left_out) == ["damaged"]
    assert message in left_out["damaged"]
    page = document(seeds_of(runs), runs, None, untracked, left_out)
    assert page["missing"][0] == f"damaged is left out: {left_out['damaged']}"
    done = CliRunner().invoke(app, ["report", *map(str, places), "--out", str(tmp_path / "page.html")])
    assert done.exit_code == 0, done.output
    assert "left out: damaged: " in done.output
    alone = CliRunner().invoke(app, ["report", str(places[1])])
    assert alone.exit_code == 2
    assert "no run can be shown" in alone.output


def test_a_run_with_nothing_measured_is_drawn(tmp_path):
    """If all rollouts failed, there are no rewards, and the records have null for NaN."""
    write_run(tmp_path / "run", "v05@4..16", 0, steps=12, of=12)
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    empty = dict.fromkeys(("group_size", "weight", "prior_rejected", "grad_norm", "entropy", "prior_auc", "baseline_mse", "mean"))
    for record in lines:
        record |= {name: None for name in empty if name in record}
        record |= {"rollouts": 0} if record["kind"] != "group" else {}
    (tmp_path / "run" / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (group,) = document_of(tmp_path)["groups"]
    assert group["group_size"] is group["grad_norm"] is group["entropy"] is None


def test_prompts_are_told_apart_by_their_content_and_not_by_their_place(tmp_path):
    for seed, (name, folder, digest) in enumerate((("one", "a", "1" * 64), ("moved", "b", "1" * 64), ("other", "a", "2" * 64))):
        write_run(tmp_path / name, "grpo@8", seed, task={"kind": "jsonl", "path": f"{folder}/sums.jsonl"})
        (tmp_path / name / "inputs.json").write_text(json.dumps({"task.path": digest}))
    found = [(group["setting"], group["seeds"]) for group in document_of(tmp_path)["groups"]]
    assert found == [("sums (path 111111111111)", 2), ("sums (path 222222222222)", 1)]


def test_a_run_that_is_called_as_a_part_of_the_page_is_one(place, tmp_path):
    for name in ("{{script}}", "{{document}}", "\\1{{plotly}}"):
        write_page(document_of(place), name, tmp_path / "page.html")
        text = (tmp_path / "page.html").read_text()
        assert f"<title>{name}</title>" in text
        assert f"<h1>{name}</h1>" in text
        assert text.count("<script") == 3


def test_the_page_runs_its_own_scripts_and_asks_for_nothing(place, tmp_path):
    write_page(document_of(place), "runs", tmp_path / "page.html")
    text = (tmp_path / "page.html").read_text()
    stated = re.search(r'http-equiv="Content-Security-Policy" content="(.*?)"', text)[1]
    policy = dict(part.split(" ", 1) for part in stated.split("; "))
    assert policy["default-src"] == "'none'"
    assert text.index("Content-Security-Policy") < text.index("<title>")
    own = re.search(r"<script>(.*?)</script>", text, re.S)[1]
    plotly = gzip.decompress(base64.b64decode(re.search(r'id="plotly">(.*?)</script>', text)[1])).decode()
    hashes = [f"'sha256-{base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()}'" for script in (own, plotly)]
    assert policy["script-src"].split() == hashes
    assert not policy.keys() & {"connect-src", "font-src", "frame-src", "worker-src"}  # default-src applies to these


def test_the_command(place, tmp_path):
    runner = CliRunner()
    done = runner.invoke(app, ["report", str(place), "--out", str(tmp_path / "new" / "page.html")])
    assert done.exit_code == 0, done.output
    assert "5 runs on" in done.output
    assert (tmp_path / "new" / "page.html").is_file()
    (tmp_path / "empty").mkdir()
    wrong = runner.invoke(app, ["report", str(tmp_path / "empty")])
    assert wrong.exit_code == 2
    assert "holds no run" in wrong.output
    write_run(tmp_path / "early", "grpo@8", 0, steps=0)
    (tmp_path / "early" / "metrics.jsonl").write_text("")
    early = runner.invoke(app, ["report", str(tmp_path / "early")])
    assert early.exit_code == 2
    assert "none of early has been evaluated yet" in early.output
    (tmp_path / "foreign").mkdir()
    (tmp_path / "foreign" / "metrics.jsonl").write_text("")
    (tmp_path / "foreign" / "config.json").write_text('{"model_type": "llama"}')
    foreign = runner.invoke(app, ["report", str(tmp_path / "foreign")])
    assert foreign.exit_code == 2
    assert "is not the configuration of a run (KeyError('budget')); leave the directory out" in foreign.output.replace("\n", "")
    both = runner.invoke(app, ["report", str(tmp_path / "early"), str(place / "grpo@8-seed0"), "--out", str(tmp_path / "p.html")])
    assert both.exit_code == 0, both.output
    assert "left out: early" in both.output
