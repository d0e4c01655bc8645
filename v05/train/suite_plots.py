"""Figures of a suite as PNG files, made from its rows: accuracy over group size, over rollouts and over tokens."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path

import matplotlib
import numpy as np

from v05.methods import METHODS
from v05.train.curves import bootstrap_interval, mean_curve
from v05.train.suite_rows import Row
from v05.train.suite_summary import TARGET, best_size, counted

matplotlib.use("Agg")
from matplotlib import pyplot as plt

VARIANTS = (  # of a budget with a test: (pattern after the spec, marker, text of the legend)
    ("", "*", " with a test"),
    (r"\+oracle", "^", ", true prior"),
    (r"\+noise", "x", ", noise"),
    (r"\+weighting=rollout", "P", ", rollouts alike"),
)

APART = 1.015  # factor between the positions of neighbouring methods at one size, so that their bars do not overlap

ByLabel = Mapping[str, Mapping[int, Row]]


def draw_suite(rows: Sequence[Row], directory: Path) -> list[Path]:
    """Draw all figures of the counted runs into `directory`; returns the files."""
    mixes = counted(rows)
    return [
        _group_sizes(mixes, directory / "accuracy_by_group_size.png"),
        _curves(mixes, "rollouts", "training rollouts", directory / "accuracy_by_rollouts.png"),
        _curves(mixes, "tokens", "generated tokens", directory / "accuracy_by_tokens.png"),
    ]


def _group_sizes(mixes: Mapping[str, ByLabel], file: Path) -> Path:
    """Final accuracy over rollouts per prompt: a line for each method's fixed sizes, and a marker for each budget with a test.

    `VARIANTS` lists the markers. Methods are shifted slightly, so that they do not overlap.
    """
    figure, panels = plt.subplots(1, len(mixes), figsize=(4.6 * len(mixes), 4.4), squeeze=False, layout="constrained")
    for axes, (mix, by_label) in zip(panels[0], mixes.items(), strict=True):
        for place, (method, rule) in enumerate(METHODS.items()):
            fixed = [label for label in by_label if re.fullmatch(rf"{method}@\d+", label)]
            fixed.sort(key=lambda label: int(label.split("@")[1]))
            tested = rf"{method}@\d+\.\.\d+"
            kinds = [(fixed, "o", 5, "-", "")]
            for variant, marker, meaning in VARIANTS:
                labels = [label for label in by_label if re.fullmatch(tested + variant, label)]
                kinds.append((labels, marker, 11 if marker == "*" else 7, "none", meaning))
            for labels, marker, size, line, meaning in kinds:
                if not labels:
                    continue
                groups = [list(by_label[label].values()) for label in labels]
                apart = APART ** (place - len(METHODS) // 2)
                sizes = [apart * np.mean([row.group_size for row in group]) for group in groups]
                means = np.array([np.mean([row.accuracy_after for row in group]) for group in groups])
                ends = np.array([bootstrap_interval([row.prompt_accuracy for row in group]) for group in groups])
                axes.errorbar(
                    sizes,
                    means,
                    np.abs(ends.T - means),
                    color=rule.colour[0],
                    marker=marker,
                    markersize=size,
                    linestyle=line,
                    elinewidth=0.7,
                    capsize=2,
                    alpha=0.9,
                    label=method + meaning,
                )
        start = np.mean([row.accuracy_before for group in by_label.values() for row in group.values()])
        axes.axhline(start, color="k", lw=0.7, ls=":")
        axes.set_xscale("log", base=2)
        axes.set_xticks([1, 2, 4, 8, 16], ["1", "2", "4", "8", "16"])
        axes.set(xlabel="rollouts per prompt", title=mix)
        axes.grid(alpha=0.3)
    panels[0][0].set_ylabel("final held-out accuracy, equal rollouts")
    handles = dict(zip(*reversed(panels[0][-1].get_legend_handles_labels()), strict=True))
    figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=6, fontsize=8)
    figure.savefig(file, dpi=130)
    plt.close(figure)
    return file


def _curves(mixes: Mapping[str, ByLabel], column: str, x_label: str, file: Path) -> Path:
    """Accuracy over rollouts or tokens: every method at its best fixed group size, GRPO at 16, and V_0.5 with its test."""
    figure, panels = plt.subplots(1, len(mixes), figsize=(4.6 * len(mixes), 4.4), squeeze=False, layout="constrained")
    for axes, (mix, by_label) in zip(panels[0], mixes.items(), strict=True):
        best = [best_size(method, by_label) for method in METHODS]
        for label in dict.fromkeys([TARGET, *best, "v05@4..16"]):
            if label is None or label not in by_label:
                continue
            group = list(by_label[label].values())
            method = label.split("@")[0]
            points, mean, _ = mean_curve([row.accuracy_over(column) for row in group])
            dashed = "--" if label in (TARGET, "v05@4..16") else "-"
            axes.plot(points, mean, dashed, color=METHODS[method].colour[0], label=f"{label} ({len(group)})", lw=1.6)
        axes.set(xlabel=x_label, title=mix)
        axes.grid(alpha=0.3)
        axes.legend(fontsize=8, title="(seeds)")
    panels[0][0].set_ylabel("held-out accuracy")
    figure.savefig(file, dpi=130)
    plt.close(figure)
    return file
