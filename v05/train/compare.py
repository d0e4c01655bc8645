"""The comparison of methods: every (method, seed) as a run of its own, then one table, the plots and compare.json.

    v05 compare --preset tiny

All runs start from the same warm-started policy, read the same prompts in the same order for a seed, and spend the same number
of rollouts. Each is a process of its own with one thread, so a crash costs one run; a run that has finished is not run again,
and one that was interrupted goes on where it stopped.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import threading
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from multiprocessing import connection
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from v05.methods import REFERENCE
from v05.train.config import RunConfig
from v05.train.curves import Curve, Reached, bootstrap_interval, reaching
from v05.train.metrics import RESULT, changed_settings, read_metrics, refuse_to_overwrite

POLL_SECONDS = 2.0


@dataclass(frozen=True)
class RunState:
    """How far one run of a comparison is."""

    name: str
    rollouts: int
    total: int
    accuracy: float | None
    status: str  # "waiting", "running", "done", "failed"


def run_all(configs: Mapping[str, RunConfig], directory: Path, jobs: int, watch: Callable[[list[RunState]], None]) -> list[str]:
    """Run `configs` (name -> run) in `directory`/name, `jobs` at a time; returns the names of those that failed.

    `watch` sees all states every POLL_SECONDS. ValueError if a directory holds a run of another configuration. An exception,
    Ctrl-C included, stops the runs under way; what they wrote stays readable.
    """
    waiting = [name for name, config in configs.items() if not is_finished(config, directory / name)]
    for name in waiting:
        refuse_to_overwrite(configs[name], directory / name)
    running: dict[str, BaseProcess] = {}
    states = {name: _state(name, config, directory / name, False, False) for name, config in configs.items()}
    context = multiprocessing.get_context("forkserver")  # one import of torch and transformers for all runs
    context.set_forkserver_preload(["v05.train.trainer", "reasoning_gym"])
    failed: list[str] = []
    watch(list(states.values()))
    try:
        while waiting or running:
            while waiting and len(running) < jobs:
                name = waiting.pop(0)
                started = context.Process(target=run_one, args=(configs[name], directory / name), name=name)
                started.start()
                running[name] = started
            under_way = set(running)  # whose records may have changed since the last look
            for name, process in list(running.items()):
                if process.exitcode is not None:
                    del running[name]
                    if process.exitcode != 0:
                        failed.append(name)
            for name in under_way:
                states[name] = _state(name, configs[name], directory / name, name in running, name in failed)
            watch(list(states.values()))
            connection.wait([process.sentinel for process in running.values()], POLL_SECONDS)
    finally:
        for process in running.values():
            process.terminate()
        for process in running.values():
            process.join()
    return failed


def is_finished(config: RunConfig, directory: Path) -> bool:
    """The directory holds the finished run of exactly this configuration."""
    try:
        return (directory / RESULT).is_file() and not changed_settings(config, directory)
    except (OSError, json.JSONDecodeError):
        return False


def run_one(config: RunConfig, directory: Path) -> None:
    """A run's own process: one thread, its output in log.txt. It ends with the process that started it, however that ends."""
    import torch

    from v05.train.trainer import train

    parent = multiprocessing.parent_process()
    if parent is not None:
        threading.Thread(target=_end_with, args=(parent.sentinel,), daemon=True).start()
    directory.mkdir(parents=True, exist_ok=True)
    log = os.open(directory / "log.txt", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(log, 1)
    os.dup2(log, 2)
    torch.set_num_threads(1)
    train(config, directory)


def _end_with(sentinel: int) -> None:
    connection.wait([sentinel])
    os._exit(1)  # as if killed: whoever starts the run again must find nobody writing it


def _state(name: str, config: RunConfig, directory: Path, running: bool, failed: bool) -> RunState:
    records = read_metrics(directory)
    rollouts = max((r["rollouts"] for r in records), default=0)
    accuracies = [r["accuracy"] for r in records if r["kind"] == "evaluation"]
    done = is_finished(config, directory)
    status = "failed" if failed else "done" if done else "running" if running else "waiting"
    return RunState(name, rollouts, config.total_rollouts, accuracies[-1] if accuracies else None, status)


@dataclass(frozen=True)
class Run:
    """A finished run as the tables and plots see it."""

    label: str
    result: dict[str, Any]
    evaluations: list[dict[str, Any]]
    steps: list[dict[str, Any]]
    probes: list[dict[str, Any]]

    @property
    def prompt_accuracy(self) -> NDArray[np.float64]:
        """(P,) final accuracy on each held-out prompt."""
        return np.asarray(self.result["heldout_successes"], dtype=np.float64) / float(self.result["heldout_samples"])

    def curve(self, x: str, y: str = "accuracy") -> Curve:
        """An evaluation's `y` ("accuracy", "entropy") over `x` ("rollouts", "seconds")."""
        return np.array([e[x] for e in self.evaluations], dtype=float), np.array([e[y] for e in self.evaluations])


def load_run(label: str, directory: Path) -> Run:
    """A finished run directory; FileNotFoundError where there is none."""
    return Run(
        label,
        json.loads((directory / RESULT).read_text()),
        *(read_metrics(directory, kind) for kind in ("evaluation", "step", "probe")),
    )


def summarise(runs: Sequence[Run]) -> list[dict[str, Any]]:
    """Records for --json: one per (method, seed), then one per method; figures unrounded."""
    by_label: dict[str, list[Run]] = defaultdict(list)
    for run in runs:
        by_label[run.label].append(run)
    records = [_run_record(run) for run in runs]
    baseline = next((group for group in by_label.values() if group[0].result["method"] == REFERENCE.name), None)
    for label, group in by_label.items():
        records.append(_method_record(label, group, baseline))
    return records


def _run_record(run: Run) -> dict[str, Any]:
    keys = ("method", "seed", "accuracy_before", "accuracy_after", "rollouts", "steps", "seconds")
    return {"record": "run", "label": run.label, **{key: run.result[key] for key in keys}, **_means(run)}


def mean_of(records: Sequence[Mapping[str, Any]], key: str) -> float:
    """Mean of a figure over the records that have it; NaN where none has."""
    values = [record[key] for record in records if record[key] is not None]
    return float(np.mean(values)) if values else float("nan")


def _means(run: Run) -> dict[str, float]:
    grad_norms = [step["grad_norm"] for step in run.steps if step["grad_norm"] is not None]
    return {
        "baseline_mse": mean_of(run.probes[1:], "baseline_mse"),  # the first probe precedes all learning, the prior's too
        "grad_norm": mean_of(run.steps, "grad_norm"),
        "grad_norm_std": float(np.std(grad_norms, ddof=1)) if len(grad_norms) > 1 else float("nan"),
        "entropy_before": run.evaluations[0]["entropy"],
        "entropy_after": run.evaluations[-1]["entropy"],
        "group_size": mean_of(run.steps, "group_size"),
        "thrown_away": float(sum(r["thrown_away"] for r in run.steps)),
    }


def _method_record(label: str, group: list[Run], baseline: list[Run] | None) -> dict[str, Any]:
    seeds = [run.result["seed"] for run in group]
    low, high = bootstrap_interval([run.prompt_accuracy for run in group])
    record: dict[str, Any] = {
        "record": "method",
        "label": label,
        "method": group[0].result["method"],
        "seeds": seeds,
        "accuracy_before": float(np.mean([run.result["accuracy_before"] for run in group])),
        "accuracy_after": float(np.mean([run.result["accuracy_after"] for run in group])),
        "accuracy_low": low,
        "accuracy_high": high,
        "rollouts": float(np.mean([run.result["rollouts"] for run in group])),
        "rollouts_to_baseline": None,
        "rollouts_to_baseline_low": None,
        "rollouts_to_baseline_high": None,
        "seconds": float(np.mean([run.result["seconds"] for run in group])),
    }
    for key in _means(group[0]):
        record[key] = float(np.mean([_means(run)[key] for run in group]))
    reached = None if baseline is None else rollouts_to(baseline, group)
    if reached is not None:
        record |= {"rollouts_to_baseline": reached.at, "rollouts_to_baseline_low": reached.low}
        record["rollouts_to_baseline_high"] = reached.high
    if baseline is not None and baseline is not group and [run.result["seed"] for run in baseline] == seeds:
        differences = [a.prompt_accuracy - b.prompt_accuracy for a, b in zip(group, baseline, strict=True)]
        record["gain"] = float(np.mean(differences))
        record["gain_low"], record["gain_high"] = bootstrap_interval(differences)
    return record


def final_accuracy(group: Sequence[Run]) -> float:
    """Mean over seeds of the accuracy at the end."""
    return float(np.mean([run.result["accuracy_after"] for run in group]))


def rollouts_to(baseline: Sequence[Run], group: Sequence[Run]) -> Reached | None:
    """Rollouts that `group` needs for the final accuracy of `baseline`, on the seeds that both have; None if there is none."""
    finals = {run.result["seed"]: float(run.result["accuracy_after"]) for run in baseline}
    both = [run for run in group if run.result["seed"] in finals]
    return reaching([run.curve("rollouts") for run in both], [finals[run.result["seed"]] for run in both]) if both else None
