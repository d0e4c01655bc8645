"""The content of the page as one document of plain lists and numbers: curves over seeds, distributions and completions to read."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from v05.methods import METHODS, REFERENCE
from v05.report.runs import NOT_EVALUATED, Recorded, Seeds
from v05.train.compare import final_accuracy, rollouts_to
from v05.train.curves import crossing, mean_curve

Document = dict[str, Any]
Records = list[dict[str, Any]]
Array = NDArray[np.float64]

POINTS = 100  # of a curve over steps; each point is the mean of the steps that belong to it
OVERSHOOT = 1.05  # factor by which a run's last step may exceed the total of another run
SAMPLES = 4000  # most groups of completions on a page, divided evenly among the runs
AXES = ("rollouts", "generated_tokens", "seconds")
STAGES = ("generate", "verify", "schedule", "advantages", "update", "sync")  # of a step, in their order
NEWER = {  # records that runs of earlier versions lack, and the name of what cannot be shown without them
    "group_sizes": "the distribution of group sizes",
    "generated_tokens": "curves over tokens",
    "gradient_noise": "the noise of the gradient",
}


def document(
    groups: Sequence[Seeds],
    runs: Sequence[Recorded],
    baseline: str | None,
    track: Callable[..., Any],
    left_out: Mapping[str, str] | None = None,
) -> Document:
    """The content of the page.

    Args:
        groups: from `v05.report.runs.seeds_of`.
        runs: all runs, including those that `groups` leaves out.
        baseline: name of the group whose final accuracy the other groups are to reach; None is the first with method "grpo".
        track: shows the progress of an iteration, like `rich.progress.track`.
        left_out: from `v05.report.runs.read_runs`.

    Raises:
        ValueError: no group is called `baseline`.
    """
    names = [group.name for group in groups]
    if baseline is not None and baseline not in names:
        raise ValueError(f"baseline={baseline!r} is not among the methods found; choose one of {', '.join(dict.fromkeys(names))}")
    summaries, idle = [], []
    for group in track(groups, "summing up"):
        rivals = [other for other in groups if other.setting == group.setting and other.finished]
        reference = next((r for r in rivals if (r.name == baseline if baseline else r.method == REFERENCE.name)), None)
        summaries.append(summary(group, reference, best_rival(rivals)))
        if reference is not None and group is reference and not improved(group):
            idle.append(f"rollouts saved in {group.setting}: cannot be computed, because {group.name} ends no higher than it began")
    every = max(1, -(-sum(len(recorded.samples) for recorded in runs) // SAMPLES))
    return {
        "groups": summaries,
        "runs": [run_line(recorded) for recorded in runs],
        "samples": [{"run": recorded.name, **sample} for recorded in runs for sample in recorded.samples[::every]],
        "sampled": sum(len(recorded.samples) for recorded in runs),
        "missing": [*absent(left_out or {}), *missing(runs), *idle],
    }


def absent(left_out: Mapping[str, str]) -> list[str]:
    """Notices about the runs that have nothing to show, with the reason."""
    waiting = [name for name, why in left_out.items() if why == NOT_EVALUATED]
    lines = [f"{name} is left out: {why}" for name, why in left_out.items() if why != NOT_EVALUATED]
    return [*lines, f"not evaluated yet: {listed(waiting)}"] if waiting else lines


def missing(runs: Sequence[Recorded]) -> list[str]:
    """Notices about what cannot be shown, because runs of earlier versions did not record it."""
    lines = []
    for key, what in NEWER.items():
        lacking = [recorded.name for recorded in runs if recorded.run.steps and key not in recorded.run.steps[0]]
        if lacking:
            lines.append(f"{what}: not recorded by {listed(lacking)}")
    silent = [recorded.name for recorded in runs if recorded.run.steps and not recorded.samples]
    return [*lines, f"completions: not recorded by {listed(silent)}"] if silent else lines


def listed(names: Sequence[str], most: int = 4) -> str:
    """The names as text; of many names, the first few and the number of others."""
    rest = len(names) - most
    return ", ".join(names) if rest <= 1 else f"{', '.join(names[:most])} and {rest} more runs"


def run_line(recorded: Recorded) -> Document:
    """A row of the table of runs."""
    result = recorded.run.result
    keys = ("method", "seed", "accuracy_before", "accuracy_after", "rollouts", "steps", "seconds")
    return {
        "name": recorded.name,
        "label": recorded.run.label,
        "finished": recorded.finished,
        "share": min(1.0, result["rollouts"] / recorded.settings["total_rollouts"]),
        "failures": sum(step.get("failures", 0) for step in recorded.run.steps),
        **{key: result[key] for key in keys},
    }


def best_rival(groups: Sequence[Seeds]) -> Seeds | None:
    """The group with the highest final accuracy among methods that are not ours; None if there is none."""
    rivals = [group for group in groups if not METHODS[group.method].ours]
    return max(rivals, key=lambda group: final_accuracy(group.records), default=None)


def summary(group: Seeds, baseline: Seeds | None, rival: Seeds | None) -> Document:
    """A group's curves, distributions and numbers. Its rollouts are compared with `baseline`, its accuracy with `rival`."""
    runs = group.records
    steps = [run.steps for run in runs]
    finals = np.array([run.result["accuracy_after"] for run in runs])
    probes = [run.probes for run in runs]
    every_step = [step for of_run in steps for step in of_run]
    rollouts, seconds = (sum(run.result[key] for run in runs) for key in ("rollouts", "seconds"))
    axes = axes_of(steps)

    def over(key: str) -> Document | None:
        return binned(steps, key, axes)

    return {
        "name": group.name,
        "method": group.method,
        "setting": group.setting,
        "finished": group.finished,
        "seeds": len(runs),
        "final": float(finals.mean()),
        "final_spread": float(finals.std(ddof=1)) if len(finals) > 1 else None,
        "before": float(np.mean([run.result["accuracy_before"] for run in runs])),
        "rollouts": rollouts / len(runs),
        "seconds": seconds / len(runs),
        "speed": rollouts / seconds if seconds else None,
        "mean_group_size": mean_of(every_step, "group_size"),
        "mean_rejected": mean_of(every_step, "prior_rejected"),
        "accuracy": at_points([run.evaluations for run in runs], "accuracy", axes),
        "lead": None if rival is None else lead(group, rival, axes),
        "entropy": at_points([run.evaluations for run in runs], "entropy", axes),
        "prior_auc": at_points([run.evaluations for run in runs], "prior_auc", axes),
        "baseline_mse": at_points(probes, "baseline_mse", axes),
        "group_size": over("group_size"),
        "rejected": over("prior_rejected"),
        "weight": over("weight") or over("hallucination"),
        "grad_norm": over("grad_norm"),
        "gradient_noise": over("gradient_noise"),
        "group_sizes": shares(every_step, "group_sizes"),
        "weights": shares(every_step, "weights") or shares(every_step, "hallucinations"),
        "calibration": calibration(steps),
        "stages": stages(every_step, rollouts),
        "saved": None if baseline is None or not group.finished else saved(group, baseline),
    }


def saved(group: Seeds, baseline: Seeds) -> Document | None:
    """Rollouts until the group's mean curve stays at or above the baseline's final accuracy, their 95 % interval, and the rollouts
    that the baseline needed.

    None if the two share no seed, or if the baseline did not improve.
    """
    reached = rollouts_to(baseline.records, group.records)
    if reached is None or not improved(baseline):
        return None
    return {
        "baseline": baseline.name,
        "target": final_accuracy(baseline.records),
        "needed": crossing([run.curve("rollouts") for run in baseline.records], final_accuracy(baseline.records)),
        "rollouts": reached.at,
        "low": reached.low,
        "high": reached.high,
    }


def lead(group: Seeds, rival: Seeds, axes: dict[str, tuple[Array, Array]]) -> Document | None:
    """The curve of the group's accuracy minus the rival's mean accuracy at the same number of rollouts; None without
    evaluations."""
    points, mean, _ = mean_curve([run.curve("rollouts") for run in rival.records])
    ahead = [
        [
            {**e, "lead": e["accuracy"] - float(np.interp(e["rollouts"], points, mean))}
            for e in run.evaluations
            if e["rollouts"] <= OVERSHOOT * points[-1]
        ]
        for run in group.records
    ]
    found = at_points(ahead, "lead", axes)
    return None if found is None else {"rival": rival.name, **found}


def improved(group: Seeds) -> bool:
    """Whether the mean accuracy over seeds ended higher than it began."""
    return final_accuracy(group.records) > float(np.mean([run.result["accuracy_before"] for run in group.records]))


def axes_of(steps: Sequence[Records]) -> dict[str, tuple[Array, Array]]:
    """For each other axis that all runs recorded: (rollouts, value on the axis), mean over runs, for interpolation."""
    axes = {}
    end = min((of_run[-1]["rollouts"] for of_run in steps if of_run), default=0)
    points = np.linspace(0, end, POINTS + 1)
    for axis in AXES[1:]:
        if all(of_run and all(axis in step for step in of_run) for of_run in steps):
            values = [np.interp(points, [0, *column(of_run, "rollouts")], [0, *column(of_run, axis)]) for of_run in steps]
            axes[axis] = (points, np.mean(values, axis=0))
    return axes


def curve(rollouts: Array, values: Array, axes: dict[str, tuple[Array, Array]]) -> Document:
    """A curve on all axes: mean over the runs of (runs, points) `values`, and standard deviation if there are several runs."""
    return {
        "mean": values.mean(axis=0).tolist(),
        "spread": values.std(axis=0, ddof=1).tolist() if len(values) > 1 else None,
        "rollouts": rollouts.tolist(),
        **{axis: np.interp(rollouts, *conversion).tolist() for axis, conversion in axes.items()},
    }


def at_points(records: Sequence[Records], key: str, axes: dict[str, tuple[Array, Array]]) -> Document | None:
    """The curve of an occasional measurement, at the points of the first run, up to where all runs have come; None if a run has
    none."""
    known = [[record for record in of_run if record.get(key) is not None] for of_run in records]
    if not all(known):
        return None
    end = min(of_run[-1]["rollouts"] for of_run in known)
    points = column(known[0], "rollouts")
    points = np.append(points[points < end], end)
    values = np.stack([np.interp(points, column(of_run, "rollouts"), column(of_run, key)) for of_run in known])
    return curve(points, values, axes)


def binned(steps: Sequence[Records], key: str, axes: dict[str, tuple[Array, Array]]) -> Document | None:
    """The curve of a measurement of every step, averaged over bins of rollouts, up to where all runs have come; None if a run has
    none."""
    known = [[step for step in of_run if step.get(key) is not None] for of_run in steps]
    if not all(known):
        return None
    end = min(of_run[-1]["rollouts"] for of_run in known)
    if not end:  # no rollout succeeded
        return None
    bins = min(POINTS, *(len(of_run) for of_run in known))
    values = []
    for of_run in known:
        place = np.ceil(column(of_run, "rollouts") / end * bins).astype(int) - 1
        inside = place < bins
        counts = np.bincount(place[inside], minlength=bins)
        sums = np.bincount(place[inside], column(of_run, key)[inside], bins)
        (filled,) = np.nonzero(counts)
        values.append(np.interp(np.arange(bins), filled, sums[filled] / counts[filled]))
    return curve((np.arange(bins) + 1) * end / bins, np.stack(values), axes)


def shares(steps: Records, key: str) -> list[float] | None:
    """The sum of the steps' histograms under `key`, as shares of all groups; None if there are none."""
    counts = [step[key] for step in steps if step.get(key)]
    total = np.zeros(max(map(len, counts), default=0))
    for row in counts:
        total[: len(row)] += row
    return (total / total.sum()).tolist() if total.sum() else None


def stages(steps: Records, rollouts: int) -> dict[str, float]:
    """Seconds per 1,000 rollouts, by stage."""

    def total(key: str) -> float:
        return sum(step.get(f"{key}_seconds") or 0.0 for step in steps)

    generate, verify = total("generate"), total("verify")
    seconds = (generate, verify, total("sample") - generate - verify, total("advantage"), total("update"), total("sync"))
    return {stage: 1000 * spent / max(rollouts, 1) for stage, spent in zip(STAGES, seconds, strict=True)}


def calibration(steps: Sequence[Records]) -> list[list[float]] | None:
    """(groups, mean prior, mean outcome) for each bin of the prior that is not empty, over the second half of every run."""
    late = [step["prior_outcomes"] for of_run in steps for step in of_run[len(of_run) // 2 :] if step.get("prior_outcomes")]
    if not late:
        return None
    total = np.sum(late, axis=0)
    return [[groups, priors / groups, outcomes / groups] for groups, priors, outcomes in total.tolist() if groups]


def mean_of(records: Records, key: str) -> float | None:
    """Mean of the values under `key`; None if there are none."""
    values = [record[key] for record in records if record.get(key) is not None]
    return float(np.mean(values)) if values else None


def column(records: Records, key: str) -> Array:
    return np.array([record[key] for record in records], dtype=np.float64)
