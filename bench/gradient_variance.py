"""The noise of the policy gradient under every method, at equal rollouts: `python bench/gradient_variance.py symbols hard RUN ...`
writes bench/results/gradient_variance.csv.

A policy is the warm start of a preset, or what a run in a directory ended with; rollouts and their exact energies E come from
bench/gradients.py. Advantages A are those of `fused_advantage` on a batch of all prompts with k rollouts each, leave-one-out unless
the method scales. The figure is E[A^2 E] / c^2 over that of the exact success rate as the baseline, and its 95 % interval by
bootstrap over prompts. E[A^2 E] / n is the mean squared norm of the gradient estimated from n rollouts, but for two things: the
squared mean gradient, far smaller, and products of different rollouts, whose mean with leave-one-out is of that size. c is by how
much a method stretches the mean gradient: 1 with leave-one-out and without a scale, else estimated as the slope of A on r - p. A
scale by group also turns the gradient, towards prompts whose groups vary little, of which the figure knows nothing.

Methods with a prior are given the exact rate ("oracle") and what a prior and its calibration have learnt from the rollouts of the
other half of the prompts ("learnt"). Energies are those that the engine returns. "optimal" is the lower bound that an exact rate
gives: its log-odds shifted (bench/gradients.py).
"""

from __future__ import annotations

import argparse
import csv
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from gradients import Array, Sample, default_cache, halves, optimal_baselines, ratio, sampled
from machine import commit, processor, versions

from v05.methods import METHODS, Baseline, Calibration, Method
from v05.ops import fused_advantage
from v05.prior.calibration import Calibrator
from v05.prior.history import HistoryPrior

RESULTS = Path(__file__).parent / "results" / "gradient_variance.csv"
FIELDS = ("policy", "prompts", "success", "group_size", "method", "prior", "second_moment", "low", "high", "stretch")
SIZES = (1, 4, 8, 16)
STEP = 16  # prompts that a learnt prior observes at once

Belief = tuple[Array, Calibration]  # (P,) priors and how far to trust them


def oracle(sample: Sample, rows: Array) -> Belief:
    calibrator = Calibrator()
    calibrator.observe(sample.rewards[rows].sum(axis=1), np.full(rows.sum(), sample.rewards.shape[1]), sample.rates[rows])
    return sample.rates, calibrator.fit()


def learnt(sample: Sample, rows: Array) -> Belief:
    prior, calibrator = HistoryPrior(), Calibrator()
    for step in np.array_split(np.flatnonzero(rows), rows.sum() // STEP):
        texts, successes = sample.texts[step].tolist(), sample.rewards[step].sum(axis=1)
        trials = np.full(len(step), sample.rewards.shape[1])
        calibrator.observe(successes, trials, prior.predict(texts))
        prior.observe(texts, successes, trials.astype(np.float64))
    return prior.predict(sample.texts.tolist()), calibrator.fit()


def advantages(method: Method, belief: Belief | None, sample: Sample, rows: Array, k: int, pooled: bool = False) -> Array:
    """(P', K) of the prompts `rows`, batch by batch of k rollouts a prompt; `pooled`, as if all were of one prompt."""
    parts = []
    for columns in np.split(np.arange(sample.rewards.shape[1]), sample.rewards.shape[1] // k):
        output = fused_advantage(
            sample.rewards[rows][:, columns].ravel(),
            None if belief is None else belief[0][rows],
            group_offsets=[0, rows.sum() * k] if pooled else np.arange(rows.sum() + 1) * k,
            method=method.name,
            leave_one_out=method.scale == "none",
            energy=sample.lengths[rows][:, columns].ravel() if method.weight == "length" else sample.full[rows][:, columns].ravel(),
            calibration=None if belief is None else belief[1],
            singleton="raw",  # without others the reward itself is what is left
        )
        parts.append(output.advantages.double().numpy().reshape(-1, k))
    return np.concatenate(parts, axis=1)


def cases(sample: Sample, k: int) -> Iterator[tuple[str, str, Array, bool]]:
    """Method, prior, (P, K) advantages, and whether they are unbiased."""
    everyone = np.ones(len(sample.rates), dtype=bool)
    for method in METHODS.values():
        if k == 1 and method.scale != "none":
            continue  # no group to scale by
        if not method.needs_prior:
            yield method.name, "", advantages(method, None, sample, everyone, k), method.scale == "none"
            continue
        for name, learn in (("oracle", oracle), ("learnt", learnt)):
            if method.baseline is Baseline.PRIOR and name == "oracle":
                continue  # what the others are measured by
            found = np.zeros_like(sample.rewards)
            for mine, others in halves(len(sample.rates)):
                found[mine] = advantages(method, learn(sample, others), sample, mine, k)
            yield method.name, name, found, True
    yield "batch, energy-weighted", "", advantages(METHODS["otb"], None, sample, everyone, k, pooled=True), True
    yield "optimal", "oracle", sample.rewards - optimal_baselines(sample, sample.full), True


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("policies", nargs="+", help="presets, for their warm starts, and directories of finished runs")
    parser.add_argument("--prompts", type=int, default=512, help="each with 16 rollouts")
    parser.add_argument("--cache", type=Path, default=default_cache(), help="folder that keeps rollouts with their energies")
    arguments = parser.parse_args()
    about = (processor(), commit(), versions("torch", "transformers", "numpy"))
    RESULTS.parent.mkdir(exist_ok=True)
    with RESULTS.open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow((*FIELDS, "device", "commit", "versions"))
        for policy in arguments.policies:
            sample = sampled(policy, arguments.prompts, max(SIZES), arguments.cache)
            name, success = Path(policy).name, sample.rates.mean()
            centred = sample.rewards - sample.rates[:, None]
            reference = (centred**2 * sample.exact).mean(axis=1)
            print(f"{name}: {len(sample.rates)} prompts, success {success:.3f}; the exact success rate is 1")
            for k in SIZES:
                for method, prior, found, unbiased in cases(sample, k):
                    stretch = 1.0 if unbiased else float((found * centred).sum() / (centred**2).sum())
                    terms = ((found / stretch) ** 2 * sample.exact).mean(axis=1)
                    value, low, high = ratio(terms, reference, np.random.default_rng(0))
                    row = (name, len(sample.rates), f"{success:.4f}", k, method, prior)
                    writer.writerow((*row, *(f"{x:.4f}" for x in (value, low, high, stretch)), *about))
                    print(f"  k = {k:<2}  {method:<22} {prior:<7} {value:.3f} [{low:.3f}, {high:.3f}]", flush=True)


if __name__ == "__main__":
    main()
