"""Plots a simulation: the error of the baseline over mean rollouts per prompt."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import matplotlib

from v05.simulate.replay import METHODS, Record

matplotlib.use("Agg")
from matplotlib import pyplot as plt


def draw(records: Sequence[Record], title: str, file: Path) -> None:
    """Draw `records` into `file` (PNG). Missing folders are created."""
    figure, axes = plt.subplots(figsize=(7, 4.5), layout="constrained")
    for method in METHODS:
        points = [r for r in records if r.method == method]
        rollouts, mse = [r.mean_rollouts for r in points], [r.mse for r in points]
        axes.plot(rollouts, mse, marker="*" if len(points) == 1 else ".", markersize=12 if len(points) == 1 else 5, label=method)
    axes.set(
        xlabel="mean rollouts a prompt", ylabel="mean squared error of the baseline (centred units)", yscale="log", title=title
    )
    axes.legend()
    axes.grid(alpha=0.3, which="both")
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file, dpi=110)
    plt.close(figure)
