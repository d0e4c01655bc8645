"""Plots of a comparison as PNG files: learning curves over rollouts and over time, and measurements during the runs."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np

from v05.methods import METHODS, REFERENCE
from v05.train.compare import Run
from v05.train.curves import mean_curve

matplotlib.use("Agg")
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure

STEP_PLOTS = {
    "grad_norm": "gradient norm before clipping",
    "group_size": "rollouts per prompt",
}
SMOOTHED_STEPS = 10
LINES = ("-", "--", ":", "-.")  # for the variants of one method


def draw_all(runs: Mapping[str, Sequence[Run]], directory: Path) -> list[Path]:
    """Draw all plots of the comparison `runs` (label -> runs of all seeds) into `directory`; returns the files."""
    files = [
        _learning_curves(runs, "rollouts", "training rollouts", directory / "accuracy_by_rollouts.png"),
        _learning_curves(runs, "seconds", "training time (s, wall clock)", directory / "accuracy_by_time.png"),
        _learning_curves(runs, "rollouts", "training rollouts", directory / "entropy.png", "entropy", "entropy (nats per token)"),
        _baseline_error(runs, directory / "baseline_mse.png"),
    ]
    return files + [_steps(runs, key, label, directory / f"{key}.png") for key, label in STEP_PLOTS.items()]


def _styled(runs: Mapping[str, Sequence[Run]]) -> Iterator[tuple[Sequence[Run], dict[str, Any]]]:
    """Each label's runs, with the label, the method's colour, and a line style that differs among variants of one method."""
    seen: Counter[str] = Counter()
    for label, group in runs.items():
        method = group[0].result["method"]
        yield group, {"label": label, "color": METHODS[method].colour[0], "linestyle": LINES[seen[method] % len(LINES)]}
        seen[method] += 1


def _learning_curves(
    runs: Mapping[str, Sequence[Run]], x: str, x_label: str, file: Path, y: str = "accuracy", y_label: str = "held-out accuracy"
) -> Path:
    figure, axes = plt.subplots(figsize=(7, 4.5), layout="constrained")
    for group, style in _styled(runs):
        points, mean, spread = mean_curve([run.curve(x, y) for run in group])
        axes.plot(points, mean, **style)
        axes.fill_between(points, mean - spread, mean + spread, alpha=0.15, color=style["color"])
    takeaway = f"{_takeaway(runs)}\n" if y == "accuracy" else ""
    axes.set(xlabel=x_label, ylabel=y_label, title=f"{takeaway}mean over seeds, band: one standard deviation")
    return _save(figure, axes, file)


def _takeaway(runs: Mapping[str, Sequence[Run]]) -> str:
    """The gain of the method that gained most, and the gain of the reference method."""

    def gain(label: str) -> float:
        return float(np.mean([run.result["accuracy_after"] - run.result["accuracy_before"] for run in runs[label]]))

    best = max(runs, key=gain)
    reference = next((label for label, group in runs.items() if group[0].result["method"] == REFERENCE.name), best)
    beside = "" if reference == best else f", {reference} {gain(reference):+.3f}"
    return f"{best} gained {gain(best):+.3f}{beside}"


def _baseline_error(runs: Mapping[str, Sequence[Run]], file: Path) -> Path:
    figure, axes = plt.subplots(figsize=(7, 4.5), layout="constrained")
    for group, style in _styled(runs):
        count = min(len(run.probes) for run in group)
        if count:
            rollouts = np.mean([[p["rollouts"] for p in run.probes[:count]] for run in group], axis=0)
            errors = np.mean([[p["baseline_mse"] for p in run.probes[:count]] for run in group], axis=0)
            axes.plot(rollouts, errors, marker="o", **style)
    axes.set(xlabel="training rollouts", ylabel="squared error of the baseline (reward units squared)")
    return _save(figure, axes, file)


def _steps(runs: Mapping[str, Sequence[Run]], key: str, y_label: str, file: Path) -> Path:
    figure, axes = plt.subplots(figsize=(7, 4.5), layout="constrained")
    for group, style in _styled(runs):
        steps = [s for s in group[0].steps if s[key] is not None]  # one seed only, because averaging would hide the spread of steps
        values = np.array([s[key] for s in steps])
        window = min(SMOOTHED_STEPS, max(len(values), 1))
        smooth = np.convolve(values, np.ones(window) / window, mode="valid") if len(values) else values
        axes.plot([s["rollouts"] for s in steps[window - 1 :]], smooth, **style)
    axes.set(xlabel="training rollouts", ylabel=y_label, title=f"first seed, mean of up to {SMOOTHED_STEPS} steps")
    return _save(figure, axes, file)


def _save(figure: Figure, axes: Axes, file: Path) -> Path:
    if axes.get_legend_handles_labels()[0]:
        axes.legend()
    axes.grid(alpha=0.3)
    figure.savefig(file, dpi=130)
    plt.close(figure)
    return file
