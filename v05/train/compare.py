"""The comparison of methods: every (method, seed) as a run of its own, then one table, the plots and compare.json.

    v05 compare --preset tiny

All runs start from the same warm-started policy, read the same prompts in the same order for a seed, and spend the same number
of rollouts. Each is a process of its own with one thread, so a crash costs one run; a run that has finished is not run again,
and one that was interrupted goes on where it stopped.
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
LOG = "log.txt"  # of a run's process


@dataclass(frozen=True)
class RunStatus:
    """How far one run of a comparison is."""

    name: str
    rollouts: int
    total: int
    accuracy: float | None
    status: str  # "waiting", "running", "done", "failed", "damaged"
    why: str = ""  # it failed, or is damaged, and what to do


def run_all(configs: Mapping[str, RunConfig], directory: Path, jobs: int, watch: Callable[[list[RunStatus]], None]) -> list[str]:
    """Run `configs` (name -> run) in `directory`/name, `jobs` at a time; returns the names of those that failed.

    `watch` sees all states every POLL_SECONDS. A run whose files are damaged counts as failed and is left as it is. ValueError if a
    directory holds a run of another configuration. An exception, Ctrl-C included, stops the runs under way; what they wrote stays.
    """
    damages = {name: damage(config, directory / name) for name, config in configs.items()}
    states = {name: _state(name, config, directory / name, "waiting") for name, config in configs.items()}
    states |= {name: replace(states[name], status="damaged", why=why) for name, why in damages.items() if why}
    waiting = [name for name, state in states.items() if state.status == "waiting"]
    for name in waiting:
        refuse_to_overwrite(configs[name], directory / name)
    running: dict[str, BaseProcess] = {}
    context = multiprocessing.get_context("forkserver")  # one import of torch and transformers for all runs
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
    """The state of a run whose process has ended. A status of 0 alone is no success: whatever a run calls may end its process."""
    why = damage(config, directory)
    if exit_code == 0 and why is None and is_finished(config, directory):
        return replace(state, status="done")
    told = f"its process ended with status {exit_code}, without a result; see {directory / LOG}"
    return replace(state, status="failed", why=why or told)


def is_finished(config: RunConfig, directory: Path) -> bool:
    """The directory holds the finished run of exactly this configuration."""
    try:
        return (directory / RESULT).is_file() and not changed_settings(config, directory)
    except (OSError, ValueError):
        return False


def damage(config: RunConfig, directory: Path) -> str | None:
    """Why the run in `directory` can neither be shown nor go on, and what to do; None for a sound one, another one, or none."""
    try:
        if (directory / RESULT).exists():
            if not changed_settings(config, directory):
                load_run(label_of(config), directory)
        elif (directory / METRICS).exists() and (directory / METRICS).stat().st_size:
            changed_settings(config, directory)
    except (OSError, ValueError) as error:
        return f"{error}; mend it, or delete {directory} to have the run run again"
    return None


def run_one(config: RunConfig, directory: Path) -> None:
    """A run's own process: one thread, its output in log.txt. It ends with the process that started it, however that ends."""
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
    os._exit(1)  # as if killed: whoever starts the run again must find nobody writing it


def _state(name: str, config: RunConfig, directory: Path, status: str) -> RunStatus:
    """How far a run is; "done" if it is finished, else as `status` says."""
    try:
        records = read_metrics(directory)
    except (OSError, ValueError):  # a run that goes on drops what was half-written when a machine went down
        records = []
    rollouts = max((r["rollouts"] for r in records if r["kind"] in ("step", "evaluation")), default=0)
    accuracies = [r["accuracy"] for r in records if r["kind"] == "evaluation"]
    status = "done" if status == "waiting" and is_finished(config, directory) else status
    return RunStatus(name, rollouts, config.total_rollouts, accuracies[-1] if accuracies else None, status)


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
        return np.array([e[x] for e in self.evaluations], dtype=float), np.array([e[y] for e in self.evaluations], dtype=float)


def load_run(label: str, directory: Path) -> Run:
    """A finished run directory; FileNotFoundError where there is none, ValueError where a file of it is damaged."""
    result = read_result(directory)
    if result.get("heldout_samples") is None or result.get("heldout_successes") is None:
        raise ValueError(f"{directory / RESULT} has no heldout_samples or heldout_successes")
    records = read_metrics(directory)
    evaluations, steps, probes = ([r for r in records if r["kind"] == kind] for kind in ("evaluation", "step", "probe"))
    if not evaluations or not steps:
        raise ValueError(f"{directory / METRICS} has {len(evaluations)} evaluations and {len(steps)} steps of a finished run")
    return Run(label, result, evaluations, steps, probes)


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
    values = [record[key] for record in records if record.get(key) is not None]
    return float(np.mean(values)) if values else float("nan")


def _means(run: Run) -> dict[str, float]:
    grad_norms = [step["grad_norm"] for step in run.steps if step.get("grad_norm") is not None]
    return {
        "baseline_mse": mean_of(run.probes[1:], "baseline_mse"),  # the first probe precedes all learning, the prior's too
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
    """Mean over seeds of the accuracy at the end."""
    return float(np.mean([run.result["accuracy_after"] for run in group]))


def rollouts_to(baseline: Sequence[Run], group: Sequence[Run]) -> Reached | None:
    """Rollouts that `group` needs for the final accuracy of `baseline`, on the seeds that both have; None if there is none."""
    finals = {run.result["seed"]: float(run.result["accuracy_after"]) for run in baseline}
    both = [run for run in group if run.result["seed"] in finals]
    return reaching([run.curve("rollouts") for run in both], [finals[run.result["seed"]] for run in both]) if both else None
