"""Draws README's picture of the baselines, docs/how_it_works.png, by calling the op: `python bench/pictures.py`."""

from __future__ import annotations

from pathlib import Path

import matplotlib
import numpy as np
import torch

from v05.methods import METHODS
from v05.ops import Calibration, fused_advantage

matplotlib.use("Agg")
from matplotlib import pyplot as plt

FILE = Path(__file__).parents[1] / "docs" / "how_it_works.png"
PRIOR = 0.4
SIZES = {4: ":", 16: "--", 64: "-"}
# Line styles by delta1. The larger delta1, the larger the energy of failures for prompts that mostly succeed.
SHIFTS = {0.0: ":", 1.0: "--", 2.0: "-"}


def main() -> None:
    figure, (fusion, shift) = plt.subplots(1, 2, figsize=(9.6, 3.8), layout="constrained")
    for size, line in SIZES.items():
        means = np.arange(size + 1) / size
        rewards = torch.tensor([float(i < n) for n in range(size + 1) for i in range(size)])
        out = fused_advantage(rewards, [PRIOR] * (size + 1), group_offsets=size * np.arange(size + 2))
        fusion.plot(means, out.stats.baseline.tolist(), line, color=METHODS["v05"].colour[0], label=f"v05, {size} rollouts")
    fusion.plot([0, 1], [0, 1], color=METHODS["grpo"].colour[0], lw=1, label="grpo: the group's mean")
    fusion.axhline(PRIOR, color="0.6", lw=0.8)
    fusion.annotate("prior", (0.93, PRIOR + 0.02), color="0.4")
    fusion.set(xlabel="mean of the group's rewards", ylabel="baseline", title="v05 keeps the prior while the rewards agree with it")
    rates = np.linspace(0.005, 0.98, 200)
    for delta1, line in SHIFTS.items():
        sure = Calibration(kappa=1e6, eps=1e-6, delta0=0.0, delta1=delta1)
        out = fused_advantage(
            torch.zeros(len(rates)), rates, group_offsets=np.arange(len(rates) + 1), method="optimal", calibration=sure
        )
        shift.plot(rates, out.stats.baseline.tolist(), line, color=METHODS["optimal"].colour[0], label=f"delta1 = {delta1:g}")
    shift.set(xlabel="success rate that is expected", ylabel="baseline", title="optimal lies below the success rate")
    for axes in (fusion, shift):
        axes.grid(alpha=0.25)
        axes.legend(frameon=False, fontsize=9)
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(FILE, dpi=120)


if __name__ == "__main__":
    main()
