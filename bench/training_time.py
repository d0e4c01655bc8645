"""Measures the time and the accuracy of a sequential budget: `python bench/training_time.py OUT --write`.

Trains one policy with grpo@16 and with v05@4..16. The rounds of v05 run in three ways: one rollout at a time, looking ahead
(`budget.chunk=look`), and looking ahead while free slots already sample the next step's first rollouts (`overlap`). Finished runs
in OUT are not repeated. Without a GPU, seconds are processor time of the process, so that other load on the machine does not count.
With a GPU they are wall time.
"""

from __future__ import annotations

import csv
import json
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
import typer
from machine import commit, processor, versions
from marks import replaced

from v05.train.metrics import RESULT, read_metrics, write_json
from v05.train.presets import run_config
from v05.train.trainer import Trainer

RESULTS = Path(__file__).parent / "results" / "training_time.csv"
PAGE = Path(__file__).parents[1] / "docs" / "training.md"
LOOK = "budget.chunk=look"
RUNS = {
    "grpo@16": ("grpo@16", []),
    "v05@4..16": ("v05@4..16", []),
    "v05@4..16, look": ("v05@4..16", [LOOK]),
    "v05@4..16, look, overlap": ("v05@4..16", [LOOK, "overlap=true"]),
}
STAGES = ("sample", "update")


@dataclass(frozen=True)
class Run:
    """Figures of one run: milliseconds per rollout in total and by stage, accuracy at E evaluations by rollouts and by seconds, and
    rollouts per prompt."""

    milliseconds: dict[str, float]
    rollouts: list[float]
    seconds: list[float]
    accuracy: list[float]
    group_size: float
    final: float


def train(directory: Path, preset: str, name: str, seed: int, rollouts: int) -> Run:
    """The figures of the run in `directory`, which is trained first if it does not exist."""
    timing = directory / "timing.json"
    if not timing.exists():
        spec, settings = RUNS[name]
        trainer = Trainer(run_config(preset, spec, settings, seed=seed, total_rollouts=rollouts), directory, print)
        if trainer.state.rollouts:
            raise ValueError(f"{directory} was interrupted, and its time before that is lost; delete it")
        for _ in trainer.run():
            pass
        write_json(timing, {"clock": clock()})
    steps, evaluations = read_metrics(directory, "step"), read_metrics(directory, "evaluation")
    spent = steps[-1]["rollouts"]
    milliseconds = {stage: 1e3 * sum(step[f"{stage}_seconds"] for step in steps) / spent for stage in STAGES}
    return Run(
        milliseconds={**milliseconds, "all": 1e3 * steps[-1]["seconds"] / spent},
        rollouts=[e["rollouts"] for e in evaluations],
        seconds=[e["seconds"] for e in evaluations],
        accuracy=[e["accuracy"] for e in evaluations],
        group_size=spent / sum(step["prompts"] for step in steps),
        final=json.loads((directory / RESULT).read_text())["mean_at_k"],
    )


def clock() -> str:
    return "wall" if torch.cuda.is_available() else "processor"


def rows_of(preset: str, runs: dict[str, list[Run]]) -> list[dict[str, object]]:
    """One row per kind of run, with means over seeds. Accuracies are at equal rollouts and at the fastest run's seconds."""
    equal = min(run.seconds[-1] for some in runs.values() for run in some)
    base = np.mean([run.milliseconds["all"] for run in runs["grpo@16"]])
    rows: list[dict[str, object]] = []
    for name, some in runs.items():
        row: dict[str, object] = {"preset": preset, "run": name, "seeds": len(some)}
        row["rollouts_per_prompt"] = round(float(np.mean([run.group_size for run in some])), 2)
        for part in (*STAGES, "all"):
            row[f"{part}_ms"] = round(float(np.mean([run.milliseconds[part] for run in some])), 3)
        row["times_grpo"] = round(float(np.mean([run.milliseconds["all"] for run in some]) / base), 2)
        at_equal = [np.interp(equal, run.seconds, run.accuracy) for run in some]
        for key, values in (("accuracy", [run.final for run in some]), ("accuracy_at_equal_seconds", at_equal)):
            row[key] = round(float(np.mean(values)), 4)
            row[f"{key}_half_range"] = round(float(np.ptp(values)) / 2, 4)
        row["equal_seconds"] = round(equal, 1)
        rows.append(row)
    return rows


def table(rows: list[dict[str, str]]) -> str:
    lines = [
        "| preset | run | rollouts a prompt | sampling, ms a rollout | update | all | times `grpo@16` | accuracy, equal rollouts | "
        "equal seconds |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        accuracies = " | ".join(
            f"{float(row[key]):.3f} ± {float(row[key + '_half_range']):.3f}" for key in ("accuracy", "accuracy_at_equal_seconds")
        )
        times = " | ".join(f"{float(row[key]):.2f}" for key in ("sample_ms", "update_ms", "all_ms"))
        lines.append(
            f"| `{row['preset']}` | `{row['run']}` | {float(row['rollouts_per_prompt']):.1f} | {times} | {row['times_grpo']} "
            f"| {accuracies} |"
        )
    about = rows[0]
    lines += [
        "",
        f"(`python bench/training_time.py OUT --write` at commit {about['commit']}: {about['rollouts']} rollouts, means over "
        f"{about['seeds']} seeds and half of their range; {about['clock']} time of one thread on {about['device']}; "
        f"{about['versions']}.)",
    ]
    return "\n".join(lines) + "\n"


def main(
    out: Annotated[Path, typer.Argument(help="Directory of the runs.")],
    presets: Annotated[str, typer.Option(help="Comma-separated.")] = "arithmetic,symbols",
    seeds: Annotated[int, typer.Option(min=1)] = 3,
    rollouts: Annotated[int, typer.Option(min=256)] = 16_384,
    write: Annotated[bool, typer.Option("--write", help="Write bench/results/training_time.csv and docs/training.md.")] = False,
) -> None:
    """Train the missing runs and print the table."""
    if clock() == "processor":
        torch.set_num_threads(1)
        time.perf_counter = time.process_time
    rows = []
    for preset in presets.split(","):
        runs = {
            name: [
                train(out / preset / f"{name.replace(', ', '-')}-seed{seed}", preset, name, seed, rollouts) for seed in range(seeds)
            ]
            for name in RUNS
        }
        rows += rows_of(preset, runs)
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else processor()
    about = {"rollouts": rollouts, "clock": clock(), "device": device, "versions": versions("torch", "transformers")}
    records = [{key: str(value) for key, value in (row | about | {"commit": commit()}).items()} for row in rows]
    print(table(records))
    if write:
        with RESULTS.open("w", newline="") as file:
            writer = csv.DictWriter(file, records[0], lineterminator="\n")
            writer.writeheader()
            writer.writerows(records)
        PAGE.write_text(replaced(PAGE.read_text(), "training time", table(records)))


if __name__ == "__main__":
    typer.run(main)
