"""Measures how well energies from a forward pass replace exact ones: `python bench/energy.py symbols hard RUN ...`

Writes bench/results/energy.csv. A policy is the warm start of a preset, or the last policy of the run in a directory. It samples
one rollout per prompt. Energies from the whole distributions ("full") and from the sampled tokens' log-probabilities ("proxy") are
compared with exact ones (bench/gradients.py):
- correlation: the correlation of log-energies with exact log-energies;
- second moment: E[(r - b)^2 E] of the gradient with a baseline b, divided by that with each prompt's exact success rate. `reads`
  names the energies that weight the baseline. `measured` names the energies E of the second moment; rows with other than exact ones
  show whether a measurement can do without backward passes;
- loss: the second moment of a baseline, divided by that of the same baseline with exact energies.

The optimal baseline of a prompt is its mean reward weighted by energies: its log-odds are those of the success rate plus a shift.
The shift is fitted for each half of the prompts to the other half, from (log-odds of the rate, reward, energy):
- lines: least-squares fits of the log-energies of successes and of failures, each linear in the log-odds, with the means of their
  exponentiated residuals; the shift is the difference of the two.
- weighted: logistic regression of rewards on (1, log(1 - rate)), with rollouts weighted by energy (bench/gradients.py).
Intervals are 95 % bootstrap intervals over prompts.
"""

from __future__ import annotations

import argparse
import csv
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from gradients import RESAMPLES, Array, Sample, Shift, default_cache, optimal_baselines, ratio, sampled, shift_weighted
from machine import commit, processor, versions
from scipy.special import logit

from v05.ops import fused_advantage

RESULTS = Path(__file__).parent / "results" / "energy.csv"
FIELDS = ("policy", "prompts", "success", "figure", "baseline", "reads", "measured", "value", "low", "high")
ENERGIES = ("exact", "full", "proxy")
LEAST_ENERGY, LARGEST_SHIFT = 1e-9, 8.0


def batch_advantages(method: str, sample: Sample, energies: Array | None = None) -> Array:
    """(P, 1) advantages with one leave-one-out baseline for the whole batch."""
    output = fused_advantage(
        sample.rewards.ravel(),
        group_offsets=[0, sample.rewards.size],
        method=method,
        leave_one_out=True,
        energy=None if energies is None else energies.ravel(),
    )
    return output.advantages.double().numpy().reshape(sample.rewards.shape)


def shift_by_lines(rates: Array, rewards: Array, energies: Array) -> Shift:
    def log_energy(outcome: int) -> Shift:
        seen = rewards == outcome
        logs = np.log(np.maximum(energies[seen], LEAST_ENERGY))
        slope, level = np.polyfit(logit(rates[seen]), logs, 1)
        smearing = np.log(np.mean(np.exp(logs - slope * logit(rates[seen]) - level)))
        return lambda rates: slope * logit(rates) + level + smearing

    success, failure = log_energy(1), log_energy(0)
    return lambda rates: np.clip(success(rates) - failure(rates), -LARGEST_SHIFT, LARGEST_SHIFT)


def baselines(sample: Sample) -> Iterator[tuple[str, str, Array]]:
    """The name of each baseline, the energies that it reads, and its (P, 1) advantages."""
    yield "exact success rate", "", sample.rewards - sample.rates[:, None]
    yield "none", "", sample.rewards
    yield "batch mean", "", batch_advantages("batch", sample)
    for name in ENERGIES:
        energies = getattr(sample, name)
        yield "energy-weighted batch mean", name, batch_advantages("otb", sample, energies)
    for label, fit in (("lines", shift_by_lines), ("weighted", shift_weighted)):
        for name in ENERGIES:
            yield f"optimal, {label}", name, sample.rewards - optimal_baselines(sample, getattr(sample, name), fit)


def correlation(sample: Sample, name: str, rng: np.random.Generator) -> tuple[float, float, float]:
    logs = np.log(np.maximum([sample.exact[:, 0], getattr(sample, name)[:, 0]], LEAST_ENERGY))
    values = [np.corrcoef(logs[:, rng.integers(logs.shape[1], size=logs.shape[1])])[0, 1] for _ in range(RESAMPLES)]
    return float(np.corrcoef(logs)[0, 1]), *(float(x) for x in np.percentile(values, (2.5, 97.5)))


def figures(sample: Sample) -> Iterator[tuple[str, str, str, str, float, float, float]]:
    """Rows of the columns from `figure` to `high`."""
    rng = np.random.default_rng(0)
    for name in ENERGIES[1:]:
        yield "correlation", "", name, "exact", *correlation(sample, name, rng)
    found = list(baselines(sample))
    for measured in ENERGIES:
        energies = getattr(sample, measured)
        terms = [(name, reads, (advantages**2 * energies).mean(axis=1)) for name, reads, advantages in found]
        for name, reads, values in terms:
            yield "second moment", name, reads, measured, *ratio(values, terms[0][2], rng)
            if measured == "exact" == reads:
                exact = values  # baselines that read other energies come later
            elif measured == "exact" and reads:
                yield "loss", name, reads, measured, *ratio(values, exact, rng)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("policies", nargs="+", help="presets, for their warm starts, and directories of finished runs")
    parser.add_argument("--prompts", type=int, default=1500)
    parser.add_argument("--cache", type=Path, default=default_cache(), help="folder that keeps rollouts with their energies")
    arguments = parser.parse_args()
    about = (processor(), commit(), versions("torch", "transformers", "numpy"))
    RESULTS.parent.mkdir(exist_ok=True)
    with RESULTS.open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow((*FIELDS, "device", "commit", "versions"))
        for policy in arguments.policies:
            sample = sampled(policy, arguments.prompts, 1, arguments.cache)
            name, success = Path(policy).name, sample.rates.mean()
            won = sample.rewards == 1
            print(f"{name}: {len(sample.rates)} prompts, success {success:.3f}, energy of successes over failures", end=" ")
            print(", ".join(f"{e} {(v := getattr(sample, e))[won].mean() / v[~won].mean():.3f}" for e in ENERGIES))
            for figure, baseline, reads, measured, value, low, high in figures(sample):
                row = (name, len(sample.rates), f"{success:.4f}", figure, baseline, reads, measured)
                writer.writerow((*row, *(f"{x:.4f}" for x in (value, low, high)), *about))
                label = f"{figure}  {baseline} {reads and f'({reads})'}"
                print(f"  {label:<58} measured {measured:<6} {value:.3f} [{low:.3f}, {high:.3f}]", flush=True)


if __name__ == "__main__":
    main()
