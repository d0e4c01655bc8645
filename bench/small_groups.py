"""Training at one, two and four rollouts a prompt, equal rollouts: `nice python bench/small_groups.py`, minutes on one core.

A policy of 60 thousand parameters, warm-started on sums of two digits, is trained by every method on the same prompts, three seeds
each. Writes bench/results/small_groups.csv: held-out accuracy at the end, accuracy of the last quarter's training rollouts, and the
baseline's error against fresh rollouts. Interrupted, it goes on where it stopped.
"""

from __future__ import annotations

import csv
from collections import defaultdict
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
import typer
from machine import commit, processor

from v05.tasks import make_task
from v05.train.compare import Run, load_run, run_all, summarise
from v05.train.config import EvaluationConfig, OptimizerConfig, PolicyConfig, RunConfig, WarmStartConfig, label_of, run_config
from v05.train.policy import policy_folder

RESULTS = Path(__file__).parent / "results" / "small_groups.csv"
RUNS = Path("runs") / "small-groups"
SPECS = ("rloo@2", "v05@2", "calibrated@1", "calibrated@2", "calibrated@4")
SEEDS, ROLLOUTS, LAST = 3, 5000, 0.75
WARM_START = WarmStartConfig(target_accuracy=0.3, batch_size=64, decay_steps=0, validate_every=25)


def config_of(spec: str, seed: int) -> RunConfig:
    return run_config(
        "smoke",
        spec,
        seed=seed,
        policy=PolicyConfig(hidden_size=64, layers=2, heads=2, intermediate_size=128, max_new_tokens=4, warm_start=WARM_START),
        optimizer=OptimizerConfig(learning_rate=1e-3),
        evaluation=EvaluationConfig(evaluations=4, prompts=100, samples=4, probe_prompts=16, probe_samples=32),
        rollouts_per_step=64,
        total_rollouts=ROLLOUTS,
    )


def late_accuracy(run: Run) -> float:
    """Of the training rollouts after three quarters of them: more rollouts than an evaluation has."""
    late = [(step["accuracy"], step["spent"]) for step in run.steps if step["rollouts"] > LAST * ROLLOUTS]
    accuracy, spent = np.array(late).T
    return float(np.average(accuracy, weights=spent))


def main(out: Annotated[Path, typer.Option(help="Where the runs go.")] = RUNS) -> None:
    torch.set_num_threads(1)
    configs = {f"{spec}-seed{seed}": config_of(spec, seed) for seed in range(SEEDS) for spec in SPECS}
    first = next(iter(configs.values()))
    policy_folder(first.policy, first.task, make_task(first.task), print)
    seen: set[str] = set()

    def watch(states: list) -> None:  # type: ignore[type-arg]
        for state in states:
            if state.status in ("done", "failed") and state.name not in seen:
                print(f"{state.name}: {state.status}, held-out accuracy {state.accuracy:.3f}", flush=True)
                seen.add(state.name)

    failed = run_all(configs, out, 1, watch)
    if failed:
        raise SystemExit(f"failed: {', '.join(failed)}; see log.txt in {out}")
    runs = [load_run(label_of(config), out / name) for name, config in configs.items()]
    by_label: dict[str, list[Run]] = defaultdict(list)
    for run in runs:
        by_label[run.label].append(run)
    with RESULTS.open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        names = ("accuracy_before", "accuracy_after", "accuracy_low", "accuracy_high", "baseline_mse", "grad_norm", "grad_norm_std")
        writer.writerow(["label", "seeds", "rollouts", "late_accuracy", "late_accuracy_std", *names, "device", "commit"])
        for record in summarise(runs):
            if record["record"] == "method":
                late = [late_accuracy(run) for run in by_label[record["label"]]]
                figures = [record["rollouts"], np.mean(late), np.std(late, ddof=1), *(record[name] for name in names)]
                rounded = [f"{figure:.4f}" for figure in figures]
                writer.writerow([record["label"], len(late), *rounded, processor(), commit()])
    print(RESULTS.read_text())


if __name__ == "__main__":
    typer.run(main)
