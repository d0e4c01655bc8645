"""Comparison of methods: one run per method and seed, then one table, plots and compare.json.

    v05 compare --preset tiny

All runs start from the same warm-started policy and spend the same number of rollouts, and the runs of one seed read the same
prompts in the same order. Each run has its own process with one thread, so a crash costs one run only. Finished runs are not run
again, and interrupted ones are resumed.
"""

from __future__ import annotations

import multiprocessing
import os
import threading
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from multiprocessing import connection
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from v05.methods import REFERENCE
from v05.train.config import RunConfig
from v05.train.curves import Curve, Reached, bootstrap_interval, reaching
from v05.train.metrics import METRICS, RESULT, changed_settings, read_metrics, read_result, refuse_to_overwrite
from v05.train.presets import label_of

POLL_SECONDS = 2.0
LOG = "log.txt"  # output of a run's process, in the run directory


@dataclass(frozen=True)
class RunStatus:
    """The progress of one run of a comparison."""

    name: str
    rollouts: int
    total: int
    accuracy: float | None
    status: str  # "waiting", "running", "done", "failed", "damaged"
    why: str = ""  # for "failed" and "damaged": the reason and the remedy


def run_all(configs: Mapping[str, RunConfig], directory: Path, jobs: int, watch: Callable[[list[RunStatus]], None]) -> list[str]:
    """Run `configs` (name -> run) in `directory`/name, `jobs` at a time; returns the names of the runs that failed.

    `watch` is called with the status of all runs every POLL_SECONDS. A run with damaged files counts as failed; its files are not
    changed. An exception, including Ctrl-C, stops the processes, and their files stay.

    Raises ValueError if a directory holds a run of another configuration.
    """
    damages = {name: damage(config, directory / name) for name, config in configs.items()}
    states = {name: _state(name, config, directory / name, "waiting") for name, config in configs.items()}
    states |= {name: replace(states[name], status="damaged", why=why) for name, why in damages.items() if why}
    waiting = [name for name, state in states.items() if state.status == "waiting"]
    for name in waiting:
        refuse_to_overwrite(configs[name], directory / name)
    running: dict[str, BaseProcess] = {}
    context = multiprocessing.get_context("forkserver")  # imports torch and transformers once for all runs
    context.set_forkserver_preload(["v05.train.trainer", "reasoning_gym"])
    watch(list(states.values()))
    try:
        while waiting or running:
            while waiting and len(running) < jobs:
                name = waiting.pop(0)
                started = context.Process(target=run_one, args=(configs[name], directory / name), name=name)
                started.start()
                running[name] = started
            connection.wait([process.sentinel for process in running.values()], POLL_SECONDS)
            for name, process in list(running.items()):
                states[name] = _state(name, configs[name], directory / name, "running")
                if process.exitcode is not None:
                    del running[name]
                    states[name] = _ended(states[name], process.exitcode, configs[name], directory / name)
            watch(list(states.values()))
    finally:
        for process in running.values():
            process.terminate()
        for process in running.values():
            process.join()
    return [name for name, state in states.items() if state.status in ("failed", "damaged")]


def _ended(state: RunStatus, exit_code: int, config: RunConfig, directory: Path) -> RunStatus:
    """The status of a run whose process has ended. Exit status 0 does not prove success: code that the run calls may end the
    process."""
    why = damage(config, directory)
    if exit_code == 0 and why is None and is_finished(config, directory):
        return replace(state, status="done")
    told = f"its process ended with status {exit_code}, without a result; see {directory / LOG}"
    return replace(state, status="failed", why=why or told)


def is_finished(config: RunConfig, directory: Path) -> bool:
    """Whether the directory holds a finished run of exactly this configuration."""
    try:
        return (directory / RESULT).is_file() and not changed_settings(config, directory)
    except (OSError, ValueError):
        return False


def damage(config: RunConfig, directory: Path) -> str | None:
    """Why the run in `directory` can be neither shown nor resumed, and the remedy. None if it can, if the directory is empty, or if
    it holds a run of another configuration."""
    try:
        if (directory / RESULT).exists():
            if not changed_settings(config, directory):
                load_run(label_of(config), directory)
        elif (directory / METRICS).exists() and (directory / METRICS).stat().st_size:
            changed_settings(config, directory)
    except (OSError, ValueError) as error:
        return f"{error}; repair the file, or delete {directory} to run it again"
    return None


def run_one(config: RunConfig, directory: Path) -> None:
    """The main function of a run's process: one thread, output to log.txt. The process ends when its parent ends, for any
    reason."""
    import torch

    from v05.train.trainer import train

    parent = multiprocessing.parent_process()
    if parent is not None:
        threading.Thread(target=_end_with, args=(parent.sentinel,), daemon=True).start()
    directory.mkdir(parents=True, exist_ok=True)
    log = os.open(directory / LOG, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(log, 1)
    os.dup2(log, 2)
    torch.set_num_threads(1)
    train(config, directory)


def _end_with(sentinel: int) -> None:
    connection.wait([sentinel])
    os._exit(1)  # ends at once, so that a new parent can start the same run without two processes writing it


def _state(name: str, config: RunConfig, directory: Path, status: str) -> RunStatus:
    """The status of a run from its files. "waiting" becomes "done" if the run is finished."""
    try:
        records = read_metrics(directory)
    except (OSError, ValueError):  # a half-written line after a crash of the machine, which resuming drops
        records = []
    rollouts = max((r["rollouts"] for r in records if r["kind"] in ("step", "evaluation")), default=0)
    accuracies = [r["accuracy"] for r in records if r["kind"] == "evaluation"]
    status = "done" if status == "waiting" and is_finished(config, directory) else status
    return RunStatus(name, rollouts, config.total_rollouts, accuracies[-1] if accuracies else None, status)


@dataclass(frozen=True)
class Run:
    """The records of a finished run, for tables and plots."""

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
        """The evaluations' `y` ("accuracy" or "entropy") over `x` ("rollouts" or "seconds")."""
        return np.array([e[x] for e in self.evaluations], dtype=float), np.array([e[y] for e in self.evaluations], dtype=float)


def load_run(label: str, directory: Path) -> Run:
    """Read a finished run. Raises FileNotFoundError if there is no result.json, ValueError if a file is damaged."""
    result = read_result(directory)
    if result.get("heldout_samples") is None or result.get("heldout_successes") is None:
        raise ValueError(f"{directory / RESULT} has no heldout_samples or heldout_successes")
    records = read_metrics(directory)
    evaluations, steps, probes = ([r for r in records if r["kind"] == kind] for kind in ("evaluation", "step", "probe"))
    if not evaluations or not steps:
        raise ValueError(
            f"{directory / METRICS} has {len(evaluations)} evaluations and {len(steps)} steps; a finished run has both"
        )
    return Run(label, result, evaluations, steps, probes)


def summarise(runs: Sequence[Run]) -> list[dict[str, Any]]:
    """Records for --json: one per run, then one per method. Numbers are not rounded."""
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
    """Mean of records' values under `key`, ignoring records without one; NaN if no record has one."""
    values = [record[key] for record in records if record.get(key) is not None]
    return float(np.mean(values)) if values else float("nan")


def _means(run: Run) -> dict[str, float]:
    grad_norms = [step["grad_norm"] for step in run.steps if step.get("grad_norm") is not None]
    return {
        "baseline_mse": mean_of(run.probes[1:], "baseline_mse"),  # skips the first probe, at which the prior has learnt nothing yet
        "grad_norm": mean_of(run.steps, "grad_norm"),
        "grad_norm_std": float(np.std(grad_norms, ddof=1)) if len(grad_norms) > 1 else float("nan"),
        "entropy_before": mean_of(run.evaluations[:1], "entropy"),
        "entropy_after": mean_of(run.evaluations[-1:], "entropy"),
        **{name: mean_of([run.result], name) for name in ("greedy", "mean_at_k", "pass_at_k", "k")},
        "group_size": mean_of(run.steps, "group_size"),
        "thrown_away": float(sum(r.get("thrown_away") or 0 for r in run.steps)),
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
    """Mean over seeds of the final held-out accuracy."""
    return float(np.mean([run.result["accuracy_after"] for run in group]))


def rollouts_to(baseline: Sequence[Run], group: Sequence[Run]) -> Reached | None:
    """Rollouts that `group` needs to reach the final accuracy of `baseline`, on the seeds that both have; None without such
    seeds."""
    finals = {run.result["seed"]: float(run.result["accuracy_after"]) for run in baseline}
    both = [run for run in group if run.result["seed"] in finals]
    return reaching([run.curve("rollouts") for run in both], [finals[run.result["seed"]] for run in both]) if both else None
