"""Suites: tuning picks the rate that ends highest, rows hold everything that tables and figures need, and a suite resumes where it
stopped.
"""

import json
from dataclasses import replace

import numpy as np
import pytest

from v05.tasks import heldout_set, make_task
from v05.train.presets import run_config
from v05.train.suite import SUITES, counted_runs, tuning_runs
from v05.train.suite_plots import draw_suite
from v05.train.suite_rows import Row, append_row, in_order, read_rows, row_of
from v05.train.suite_summary import best_size, difference, over, over_best_rival, summarise, tuned_rates
from v05.train.trainer import Trainer

HEADLINE = SUITES["headline"]


def made_up_row(
    label, seed=0, accuracies=(0.4, 0.5, 0.6), stage="count", mix="arithmetic", rate=1e-4, total=1000, successes="2101"
):
    points = np.linspace(0, 1000, len(accuracies))
    return Row(
        stage=stage,
        mix=mix,
        label=label,
        seed=seed,
        learning_rate=rate,
        total_rollouts=total,
        rollouts=1000,
        tokens=5000,
        steps=10,
        accuracy_before=accuracies[0],
        accuracy_after=accuracies[-1],
        group_size=4.0,
        prior_rejected=float("nan"),
        baseline_mse=0.01,
        grad_norm=0.5,
        entropy_before=0.5,
        entropy_after=0.4,
        greedy=0.7,
        mean_at_k=0.6,
        pass_at_k=0.9,
        k=8,
        prior_auc=float("nan"),
        thrown_away=0,
        seconds=10.0,
        generate_seconds=5.0,
        verify_seconds=1.0,
        advantage_seconds=0.1,
        update_seconds=3.0,
        sync_seconds=0.0,
        samples=2,
        successes=successes,
        curve=json.dumps([[p, 5 * p, p / 100, a] for p, a in zip(points.tolist(), accuracies, strict=True)]),
    )


def test_the_headline_suite_is_what_it_claims():
    runs = counted_runs(HEADLINE, {(mix, spec): 1e-4 for mix in HEADLINE.mixes for spec in HEADLINE.tuned}, HEADLINE.seeds)
    names = [run.name for run in runs]
    assert len(set(names)) == len(names)
    assert len(HEADLINE.mixes) >= 3
    assert HEADLINE.seeds >= 5
    for mix in HEADLINE.mixes:
        labels = {run.label for run in runs if run.mix == mix}
        assert labels >= {f"{rival}@{k}" for rival in ("grpo", "dr_grpo", "dapo") for k in (2, 4, 8, 16)}
        assert labels >= {"v05@4..16", "v05@4..16+oracle", "v05@4..16+noise", "calibrated@1", "calibrated@2..16", "prior@1"}
    assert {run.config.total_rollouts for run in runs} == {HEADLINE.rollouts}
    assert {run.config.evaluation.prompts for run in runs} == {1024}
    assert all(run.config.seed not in range(HEADLINE.seeds) for run in tuning_runs(HEADLINE))


@pytest.mark.parametrize("mix", HEADLINE.mixes)
def test_tuning_sees_no_prompt_that_counts(mix):
    rates = {(mix, spec): 1e-4 for mix in HEADLINE.mixes for spec in HEADLINE.tuned}
    texts = []
    for runs in (tuning_runs(HEADLINE), counted_runs(HEADLINE, rates, 1)):
        config = next(run.config for run in runs if run.mix == mix)
        evaluation = config.evaluation
        texts.append({p.text for p in heldout_set(make_task(config.task), evaluation.prompts, skip=evaluation.skip)})
        assert len(texts[-1]) == 1024
    assert not texts[0] & texts[1]


@pytest.mark.parametrize("mix", HEADLINE.mixes)
def test_no_right_answer_is_punished_for_its_length(mix):
    config = run_config(mix, "dapo")
    limit = config.policy.max_new_tokens
    lengths = [len(prompt.answer) for prompt in heldout_set(make_task(config.task), 1024)]  # one token per character
    assert max(lengths) + 1 <= limit  # plus the end token
    assert max(lengths) <= limit - config.overlong.tokens(limit)


def test_tuning_takes_the_rate_whose_end_is_highest():
    suite = replace(HEADLINE, mixes=("arithmetic",), tuned={"grpo@4": ("grpo@4",)}, learning_rates=(1e-4, 1e-3))
    seed, total = tuning_runs(suite)[0].key[3], suite.tuning_rollouts
    ends = {1e-4: (0.4, 0.6, 0.6), 1e-3: (0.4, 0.4, 0.7)}  # the mean of the last two evaluations decides
    rows = [made_up_row("grpo@4", seed, ends[rate], "tune", rate=rate, total=total) for rate in ends]
    rows.append(made_up_row("grpo@4", 0, (0.4, 0.9, 0.9), rate=1e-3, total=total))  # a run that counts must not affect tuning
    assert tuned_rates(suite, rows) == {("arithmetic", "grpo@4"): 1e-4}


def test_a_part_of_a_suite_is_tuned_as_the_whole():
    part = HEADLINE.only(["optimal@2", "rloo@4", "none@1"])
    assert part.tuned == {"dr_grpo@4": (), "optimal@1": ("optimal@2",), "none@1": ("none@1",)}
    assert part.ablations == {"dr_grpo@4": ("rloo@4",)}
    whole, rates = {run.key for run in tuning_runs(HEADLINE)}, {(mix, spec): 1e-4 for mix in part.mixes for spec in part.tuned}
    assert {run.key for run in tuning_runs(part)} < whole
    assert {run.label for run in counted_runs(part, rates, 1)} == {"optimal@2", "rloo@4", "none@1"}
    with pytest.raises(ValueError, match=r"--methods grpo@3 is not in this suite; choose from "):
        HEADLINE.only(["grpo@3"])


def test_rows_come_back_as_they_went(tmp_path):
    rows = [made_up_row("grpo@4"), made_up_row("v05@4..16", 3, successes="0022")]
    assert read_rows(tmp_path) == []
    for row in rows:
        append_row(tmp_path, row)
    again = read_rows(tmp_path)
    assert [row.key for row in again] == [row.key for row in rows]
    assert str(again) == str(rows)  # as text, because NaN is unequal to itself
    (tmp_path / "runs.csv").write_text("a,b\n1,2\n")
    with pytest.raises(ValueError, match="columns"):
        read_rows(tmp_path)


def test_a_row_that_was_cut_is_named(tmp_path):
    append_row(tmp_path, made_up_row("grpo@4"))
    file = tmp_path / "runs.csv"
    file.write_text(file.read_text()[:-40])
    with pytest.raises(ValueError, match=r"runs\.csv:2 is not a complete row"):
        read_rows(tmp_path)


@pytest.mark.parametrize(
    "damage",
    [
        ("0.6,4.0", "nan,4.0"),  # the column accuracy_after
        ("2101", "21o1"),
        (",2,2101", ",0,2101"),  # the column samples
        ('"[[0.0', '"[0.0'),
        ('"[[0.0', '"[[null'),
        ("\n", ",one more\n"),
        ('"[[', '[["'),
    ],
)
def test_a_row_with_other_values_is_named(tmp_path, damage):
    append_row(tmp_path, made_up_row("grpo@4"))
    append_row(tmp_path, made_up_row("v05@4"))
    head, first, second = (tmp_path / "runs.csv").read_text().splitlines(keepends=True)
    assert damage[0] in second
    (tmp_path / "runs.csv").write_text(head + first + second.replace(*damage))
    with pytest.raises(ValueError, match=r"runs\.csv:3 is not a complete row; delete the line, and its run will be read"):
        read_rows(tmp_path)


def test_rows_in_another_encoding_are_named(tmp_path):
    (tmp_path / "runs.csv").write_bytes("stage,mix\n\xe9".encode("latin-1"))
    with pytest.raises(ValueError, match=r"runs\.csv, line 2 is not UTF-8"):
        read_rows(tmp_path)


def test_rows_of_another_suite_are_refused():
    with pytest.raises(ValueError, match="a run of grpo@4 on arithmetic, which this suite does not have"):
        in_order(SUITES["smoke"], [made_up_row("grpo@4")])


def test_times_are_medians():
    """A run that was delayed takes long, which says nothing about its method."""
    seconds = (3.0, 5.0, 600.0)
    rows = [replace(made_up_row("grpo@4", seed, (0.4, 0.5)), update_seconds=taken) for seed, taken in enumerate(seconds)]
    record = summarise(rows)[0]
    assert record["update_seconds"] == 5.0
    assert record["accuracy_after"] == pytest.approx(0.5)


def test_summary_compares_with_each_rival_at_its_best(tmp_path):
    rows = [
        *(made_up_row("grpo@4", seed, (0.4, 0.5, 0.6), successes="2110") for seed in range(2)),
        *(made_up_row("grpo@16", seed, (0.4, 0.45, 0.5), successes="1110") for seed in range(2)),
        made_up_row("grpo@2", 0, (0.4, 0.9, 0.9)),  # the highest on seed 0, the only one that all sizes have
        *(made_up_row("v05@4..16", seed, (0.4, 0.5, 0.7), successes="2211") for seed in range(2)),
    ]
    records = {record["label"]: record for record in summarise(rows)}
    record = records["v05@4..16"]
    assert record["over_grpo_size"] == "grpo@2"
    complete = {r["label"]: r for r in summarise([row for row in rows if row.label != "grpo@2"])}["v05@4..16"]
    assert complete["over_grpo_size"] == "grpo@4"
    assert complete["over_grpo"] == pytest.approx(0.25)
    assert complete["over_grpo_low"] <= 0.25 <= complete["over_grpo_high"]
    assert complete["rollouts_to_grpo"] == pytest.approx(500)
    assert complete["rollouts_to_grpo_low"] == complete["rollouts_to_grpo_high"] == pytest.approx(500)  # both seeds agree
    assert "rollouts_to_grpo_low" not in {r["label"]: r for r in summarise(rows)}["grpo@2"]  # one seed has no interval
    assert complete["tokens_to_grpo"] == pytest.approx(2500)
    assert "over_dapo" not in complete
    assert "over_grpo" not in {r["label"]: r for r in summarise(rows)}["grpo@2"]
    assert all(file.stat().st_size > 10_000 for file in draw_suite(rows, tmp_path))


def test_all_mixes_together_against_the_best_rival_of_each():
    def ends(mix, **successes):
        return [
            made_up_row(label, seed, mix=mix, successes=text, accuracies=(0.0, sum(map(int, text)) / 8))
            for label, text in successes.items()
            for seed in range(2)
        ]

    rows = ends("arithmetic", **{"grpo@4": "1100", "dapo@4": "1110", "v05@2": "2210"})
    rows += ends("hard", **{"grpo@4": "2000", "dapo@4": "1000", "v05@2": "2100"})
    record = over_best_rival(rows, "v05@2")
    assert record["over_best"] == pytest.approx((2 / 8 + 1 / 8) / 2)  # over dapo@4, and over grpo@4
    assert record["over_best_low"] < record["over_best"] < record["over_best_high"]
    assert over_best_rival(rows, "grpo@4")["over_best"] == pytest.approx(-1 / 16)
    assert over_best_rival(rows[:-2], "v05@2") == {}
    compared = over(rows, "v05@2", "grpo@4", ("arithmetic", "hard"))
    assert compared["over"] == pytest.approx((3 / 8 + 1 / 8) / 2)
    assert compared["over_low"] < compared["over"] < compared["over_high"]
    assert over(rows, "v05@2", "grpo@4", ("hard",))["over"] == pytest.approx(1 / 8)
    assert over(rows, "v05@2", "grpo@16", ("hard",)) == {}
    more = [made_up_row(label, 2, mix="arithmetic", successes=got) for label, got in (("grpo@4", "1100"), ("v05@2", "2222"))]
    assert over([*rows, *more], "v05@2", "grpo@4", ("arithmetic", "hard"))["over"] == pytest.approx(
        ((3 + 3 + 6) / 3 / 8 + 1 / 8) / 2  # each mix counts all of its own seeds, and mixes weigh alike
    )
    assert difference(record, "over_best").startswith("+0.188 [")
    assert difference(over_best_rival(rows[::2], "v05@2"), "over_best") == "+0.188"  # one seed has no interval


def test_rows_are_listed_as_the_suite_lists_them():
    rows = [made_up_row("v05@2", mix="hard"), made_up_row("rloo@4"), made_up_row("grpo@4"), made_up_row("grpo@2")]
    assert [row.label for row in in_order(HEADLINE, rows)] == ["grpo@2", "grpo@4", "rloo@4", "v05@2"]


def test_best_size_ignores_tests_and_priors():
    rows = {label: {0: made_up_row(label, 0, (0.4, end))} for label, end in (("v05@2", 0.5), ("v05@4", 0.6), ("v05@4..16", 0.9))}
    assert best_size("v05", rows) == "v05@4"
    assert best_size("rloo", rows) is None


def test_a_row_holds_what_the_run_came_to(tmp_path):
    (planned, *_) = counted_runs(SUITES["smoke"], {("smoke", "grpo@4"): 1e-4, ("smoke", "v05@4"): 1e-4}, 1)
    for _ in Trainer(planned.config, tmp_path, lambda line: None).run():
        pass
    row = row_of(planned, tmp_path)
    assert row.key == planned.key
    assert row.prompt_accuracy.mean() == pytest.approx(row.accuracy_after)
    curve = row.evaluations()
    assert curve[0].tolist()[:3] == [0, 0, 0]
    assert curve[-1, 0] == row.rollouts
    assert curve[-1, 1] == row.tokens
    assert curve[-1, 3] == row.accuracy_after


def test_rloo_is_dr_grpo_where_groups_have_one_size(tmp_path):
    """This is why no suite runs both: the advantages differ by the factor k / (k - 1), which AdamW cancels."""
    ends = {}
    for method in ("dr_grpo@4", "rloo@4"):
        trainer = Trainer(run_config("smoke", method), tmp_path / method, lambda line: None)
        for _ in range(3):
            trainer.step(probe=False)
        ends[method] = np.concatenate([p.detach().numpy().ravel() for p in trainer.learner.model.parameters()])
        start = Trainer(run_config("smoke", method), tmp_path / f"{method}-start", lambda line: None)
        moved = ends[method] - np.concatenate([p.detach().numpy().ravel() for p in start.learner.model.parameters()])
    assert np.linalg.norm(ends["dr_grpo@4"] - ends["rloo@4"]) < 0.02 * np.linalg.norm(moved)
