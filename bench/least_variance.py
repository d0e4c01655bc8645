"""Measures and fits the baseline of least gradient variance by success rate, and draws docs/least_variance.png.

    python bench/least_variance.py symbols hard tiny

A policy is the warm start of a preset, or the last policy of the run in a directory. The measured baseline is the mean reward of
rollouts of prompts with similar success rates, weighted by exact energies (bench/gradients.py), with a 95 % bootstrap interval over
prompts. The fitted baseline is that of `optimal` for known success rates, with a calibration fitted to rollouts of other prompts.
"""

from __future__ import annotations

import argparse
import itertools
from pathlib import Path

import matplotlib
import numpy as np
from gradient_variance import SIZES, Oracle, taught
from gradients import RESAMPLES, Array, Sample, default_cache, rollouts_before, sampled

from v05.methods import METHODS
from v05.reference import least_variance

matplotlib.use("Agg")
from matplotlib import pyplot as plt
from matplotlib.axes import Axes

PLOT = Path(__file__).parents[1] / "docs" / "least_variance.png"
EDGES = np.array([0.0, 0.05, 0.15, 0.3, 0.45, 0.6, 0.75, 0.9, 0.97, 1.0])
FEWEST = 8  # least number of prompts in a bin


def measured(sample: Sample) -> Array:
    """(B, 4) figures of B bins: mean success rate, energy-weighted mean reward, and the low and high ends of its interval."""
    rng = np.random.default_rng(0)
    bins = []
    for low, high in itertools.pairwise(EDGES):
        inside = (sample.rates >= low) & (sample.rates < high)
        if inside.sum() >= FEWEST:
            of_successes = (sample.rewards * sample.exact)[inside].sum(axis=1)
            energies = sample.exact[inside].sum(axis=1)
            rows = rng.integers(len(energies), size=(RESAMPLES, len(energies)))
            interval = np.percentile(of_successes[rows].sum(axis=1) / energies[rows].sum(axis=1), (2.5, 97.5))
            bins.append((sample.rates[inside].mean(), of_successes.sum() / energies.sum(), *interval))
    return np.array(bins)


def draw(axes: Axes, policy: str, cache: Path) -> None:
    sample, past = sampled(policy, 512, max(SIZES), cache), rollouts_before(policy, SIZES, cache)
    calibrator = taught(METHODS["optimal"], Oracle(sample, past), past, max(SIZES)).calibrator
    assert calibrator is not None
    rates = np.linspace(0.005, 0.995, 199)
    fitted = [least_variance(float(rate), calibrator.calibration) for rate in rates]
    constant = (sample.rewards * sample.exact).sum() / sample.exact.sum()
    bins = measured(sample)
    print(f"{Path(policy).name}: {calibrator.calibration}; constant {constant:.3f}")
    for rate, value, low, high in bins:
        print(f"  success rate {rate:.3f}  measured {value:.3f} [{low:.3f}, {high:.3f}]")
    axes.plot((0, 1), (0, 1), color="#64748b", linestyle=":", label="the success rate")
    axes.axhline(constant, color=METHODS["batch_energy"].colour[0], linestyle="--", label="one number (batch_energy)")
    axes.plot(rates, fitted, color=METHODS["optimal"].colour[0], label="optimal, fitted")
    axes.errorbar(
        bins[:, 0],
        bins[:, 1],
        yerr=np.abs(bins[:, 2:].T - bins[:, 1]),
        color="#111827",
        marker="o",
        markersize=4,
        linestyle="none",
        label="measured",
    )
    axes.set(title=f"{Path(policy).name}, mean success {sample.rates.mean():.2f}", xlabel="success rate of the prompt")
    axes.grid(alpha=0.3)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("policies", nargs="+", help="presets, for their warm starts, and directories of finished runs")
    parser.add_argument("--cache", type=Path, default=default_cache(), help="folder that keeps rollouts with their energies")
    arguments = parser.parse_args()
    count = len(arguments.policies)
    figure, panels = plt.subplots(1, count, figsize=(3.6 * count, 3.8), layout="constrained", sharey=True, squeeze=False)
    for axes, policy in zip(panels[0], arguments.policies, strict=True):
        draw(axes, policy, arguments.cache)
    panels[0, 0].set_ylabel("baseline")
    panels[0, 0].legend(fontsize="small")
    figure.suptitle("The best baseline lies far below the success rate, farthest where a prompt succeeds often")
    figure.savefig(PLOT, dpi=110)
    plt.close(figure)


if __name__ == "__main__":
    main()
