"""The figures of a comparison, on made-up runs with known answers."""

import json

import numpy as np
import pytest

from v05.train import compare
from v05.train.compare import Run, is_finished, rollouts_to, run_all, summarise
from v05.train.plots import draw_all
from v05.train.presets import run_config


def made_up_run(label, seed, accuracies, prompt_successes, steps=30):
    points = np.linspace(0, 1000, len(accuracies))
    return Run(
        label,
        {
            "method": label.split("@")[0],
            "seed": seed,
            "accuracy_before": accuracies[0],
            "accuracy_after": accuracies[-1],
            "rollouts": 1000,
            "steps": steps,
            "seconds": 10.0,
            "heldout_samples": 2,
            "heldout_successes": prompt_successes,
        },
        [{"rollouts": p, "seconds": p / 100, "accuracy": a, "entropy": 0.5} for p, a in zip(points, accuracies, strict=True)],
        [
            {
                "rollouts": i * 1000 / steps,
                "grad_norm": 1.0 + i % 2,
                "group_size": 4.0,
                "thrown_away": 2,
            }
            for i in range(steps)
        ],
        [{"rollouts": p, "baseline_mse": e} for p, e in ((0, 9.0), (500, 0.02), (1000, 0.04))],
    )


RUNS = [
    made_up_run("grpo@16", 0, [0.4, 0.45, 0.5], [1, 1, 1, 1]),
    made_up_run("grpo@16", 1, [0.4, 0.55, 0.6], [2, 1, 1, 1]),
    made_up_run("v05@4..16", 0, [0.4, 0.55, 0.6], [2, 1, 1, 1]),
    made_up_run("v05@4..16", 1, [0.4, 0.55, 0.7], [2, 2, 1, 1]),
]


def test_summary():
    records = summarise(RUNS)
    runs, methods = records[:4], {r["label"]: r for r in records[4:]}
    assert [(r["label"], r["seed"], r["accuracy_after"]) for r in runs][3] == ("v05@4..16", 1, 0.7)
    assert methods["v05@4..16"]["accuracy_after"] == pytest.approx(0.65)
    assert methods["v05@4..16"]["gain"] == pytest.approx(0.125)
    assert methods["v05@4..16"]["rollouts_to_baseline"] == pytest.approx(500)  # both seeds reach 0.55 there
    assert methods["grpo@16"]["rollouts_to_baseline"] == pytest.approx(1000)
    interval = [methods["v05@4..16"][f"rollouts_to_baseline_{end}"] for end in ("low", "high")]
    assert interval == pytest.approx([1000 / 3, 2000 / 3])  # where the first seed reaches 0.5, and where the second reaches 0.6
    assert "gain" not in methods["grpo@16"]
    assert methods["grpo@16"]["baseline_mse"] == pytest.approx(0.03)  # without the probe from before any learning
    assert methods["grpo@16"]["grad_norm"] == pytest.approx(1.5)
    assert methods["grpo@16"]["grad_norm_std"] == pytest.approx(0.5, abs=0.02)
    assert methods["grpo@16"]["thrown_away"] == 60


def test_summary_without_grpo_has_nothing_to_be_timed_against():
    (method,) = [r for r in summarise(RUNS[2:]) if r["record"] == "method"]
    assert method["rollouts_to_baseline"] is None
    assert "gain" not in method


def test_rollouts_are_counted_on_the_seeds_that_both_have():
    assert rollouts_to(RUNS[:1], RUNS[2:]).at == pytest.approx(1000 / 3)  # where the first seed is at 0.5, on its way to 0.55
    assert rollouts_to(RUNS[:1], RUNS[3:]) is None


def test_plots_are_drawn(tmp_path):
    files = draw_all({"grpo@16": RUNS[:2], "v05@4..16": RUNS[2:]}, tmp_path)
    assert {f.name for f in files} >= {"accuracy_by_rollouts.png", "accuracy_by_time.png", "baseline_mse.png", "entropy.png"}
    assert all(f.read_bytes()[:4] == b"\x89PNG" and f.stat().st_size > 10_000 for f in files)


def test_a_run_is_neither_repeated_nor_overwritten(tmp_path):
    config = run_config("smoke", "grpo", total_rollouts=64)
    failed = run_all({"one": config}, tmp_path, 1, lambda states: None)
    assert failed == []
    assert is_finished(config, tmp_path / "one")
    written = (tmp_path / "one" / "metrics.jsonl").stat().st_mtime_ns
    states = []
    run_all({"one": config}, tmp_path, 1, states.append)
    assert (tmp_path / "one" / "metrics.jsonl").stat().st_mtime_ns == written
    stored = json.loads((tmp_path / "one" / "config.json").read_text())
    del stored["chat"]  # as in a file of an earlier version
    (tmp_path / "one" / "config.json").write_text(json.dumps(stored))
    assert is_finished(config, tmp_path / "one")
    (tmp_path / "one" / "config.json").write_text(json.dumps(stored | {"later": 1}))  # as in a file of a later version
    assert not is_finished(config, tmp_path / "one")
    (tmp_path / "one" / "config.json").write_text(json.dumps(stored))
    other = run_config("smoke", "grpo", total_rollouts=128)
    with pytest.raises(ValueError, match="one holds a finished run; give another directory"):
        run_all({"one": other}, tmp_path, 1, states.append)
    (tmp_path / "one" / "result.json").unlink()  # as if the run had been interrupted
    with pytest.raises(ValueError, match="differs in total_rollouts"):
        run_all({"one": other}, tmp_path, 1, states.append)
    assert (tmp_path / "one" / "metrics.jsonl").stat().st_mtime_ns == written


def test_no_time_is_lost_between_runs(tmp_path, monkeypatch):
    wait, idle = compare.connection.wait, []

    def counted(objects, timeout=None):
        idle.extend([timeout] if not objects else [])
        return wait(objects, timeout)

    monkeypatch.setattr(compare.connection, "wait", counted)
    configs = {str(seed): run_config("smoke", "grpo", seed=seed, total_rollouts=64) for seed in (0, 1)}
    assert run_all(configs, tmp_path, 1, lambda states: None) == []
    assert idle == []


def test_a_failed_run_is_named_and_leaves_its_log(tmp_path):
    config = run_config("smoke", "grpo", policy={"path": str(tmp_path / "nowhere")})
    states = []
    assert run_all({"bad": config}, tmp_path, 1, states.append) == ["bad"]
    assert states[-1][0].status == "failed"
    assert "no config.json there" in (tmp_path / "bad" / "log.txt").read_text()
