"""Measures the noise of the policy gradient under every method at equal rollouts.

    python bench/gradient_variance.py --preset symbols --preset hard --run runs/one --csv bench/results/gradient_variance.csv

A policy is the warm start of a preset, the last policy of the run in a directory, or an instruct model (--model). Rollouts and
their exact energies E come from bench/gradients.py. Advantages A come from `fused_advantage` on batches of 256 rollouts with k per
prompt, leave-one-out unless the method scales. `second_moment_ratio` is E[A^2 E] / c^2, divided by the value with the exact success
rate as the baseline; its 95 % interval is a bootstrap over prompts. E[A^2 E] / n is about the mean squared norm of the gradient
estimate from n rollouts. It leaves out the squared mean gradient, which is far smaller, and the products of different rollouts,
whose mean with leave-one-out is equally small. c is the factor by which a method stretches the mean gradient: 1 with leave-one-out
and without a scale, and otherwise the estimated slope of A on r - p. A scale by group also turns the gradient towards prompts whose
groups vary little; the ratio does not show this. `snr` is the squared norm of the true gradient divided by the variance of one
rollout's gradient.

Methods with a prior get the exact rate ("oracle"), the predictions of a prior that has learnt from 4096 rollouts (--past) of other
prompts ("history"), or an uninformative rate ("noise"). `ebpo` gets the mean of all past rollouts, as in its paper. The calibration
is fitted to the same past rollouts in groups of k, as in training with k rollouts per prompt. Energies are those that the engine
returns. "bound" is the exact rate with its log-odds shifted by a fit to exact energies (bench/gradients.py).
"""

from __future__ import annotations

import argparse
import csv
import itertools
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from gradients import PAST, Array, Past, Sample, default_cache, optimal_baselines, ratio, rollouts_before, sampled
from machine import commit, processor, versions

from v05.estimator import Estimator
from v05.methods import METHODS, Baseline, Method
from v05.prior import MeanPrior, NoisePrior, ValuePrior
from v05.prior.calibration import Calibrator
from v05.prior.history import HistoryPrior

SIZES = (1, 2, 4, 8, 16)
STEP = 256  # rollouts per batch, as in the presets


class Oracle:
    """A prior that predicts the exact success rates."""

    def __init__(self, *known: Sample | Past) -> None:
        self._rates = {text: rate for of in known for text, rate in zip(of.texts.tolist(), of.rates, strict=True)}

    def predict(self, prompts: Sequence[str]) -> Array:
        return np.array([self._rates[prompt] for prompt in prompts])

    def observe(self, prompts: Sequence[str], successes: Array, trials: Array) -> None:
        pass


def taught(method: Method, prior: ValuePrior, past: Past, k: int) -> Estimator:
    """An estimator that has learnt the past's rollouts, with k per prompt, in batches of STEP rollouts."""
    estimator = Estimator(method.name, prior, Calibrator(), leave_one_out=True)
    prompts = len(past.texts) // k  # the past has one prompt for each rollout
    for first in range(0, prompts, STEP // k):
        step = slice(first, min(first + STEP // k, prompts))
        texts, rewards, energies = past.texts[step].tolist(), past.rewards[step, :k], past.energies[step, :k]
        rates = estimator.open(texts)
        offsets = np.arange(0, rewards.size + 1, k)
        estimate = estimator.advantages(rewards.ravel(), rates, group_offsets=offsets, energy=energies.ravel())
        estimator.close(texts, rates, *estimator.outcomes(estimate.stats), estimate.energies, fit=False)
    assert estimator.calibrator is not None
    estimator.calibrator.fit(by_variances=method.fits_variances)
    return estimator


def advantages(estimator: Estimator, sample: Sample, k: int) -> Array:
    """(P, K) advantages from batches of STEP rollouts with k per prompt."""
    rates = estimator.open(sample.texts.tolist())
    energy = sample.lengths if estimator.of.weight == "length" else sample.full
    found = np.empty_like(sample.rewards)
    for first, column in itertools.product(range(0, len(rates), STEP // k), range(0, found.shape[1], k)):
        batch = slice(first, first + STEP // k), slice(column, column + k)
        estimate = estimator.advantages(
            sample.rewards[batch].ravel(),
            rates[batch[0]],
            group_offsets=np.arange(len(rates[batch[0]]) + 1) * k,
            energy=energy[batch].ravel(),
            singleton="raw",  # without other rollouts the advantage is the reward itself
        )
        found[batch] = estimate.advantages.double().numpy().reshape(-1, k)
    return found


def cases(sample: Sample, past: Past, k: int) -> Iterator[tuple[str, str | None, Array, bool]]:
    """The method, the prior, (P, K) advantages, and whether they are unbiased, of each case."""
    for method in METHODS.values():
        if not method.needs_prior:
            if k > 1 or method.scale == "none":  # a group of one has no deviation to scale by
                estimator = Estimator(method.name, leave_one_out=method.scale == "none")
                yield method.name, None, advantages(estimator, sample, k), method.scale == "none"
            continue
        priors: dict[str, ValuePrior] = {"oracle": Oracle(sample, past), "history": HistoryPrior(), "noise": NoisePrior()}
        if method.prior == "mean":
            priors = {"mean": MeanPrior()}
        for name, prior in priors.items():
            if method.baseline is Baseline.PRIOR and name == "oracle":
                continue  # the reference of the other cases
            yield method.name, name, advantages(taught(method, prior, past, k), sample, k), True
    yield "bound", "oracle", sample.rewards - optimal_baselines(sample, sample.exact), True


def records(policy: str, prompts: int, past_rollouts: int, cache: Path) -> Iterator[dict[str, Any]]:
    """One record for each method, prior and number of rollouts per prompt."""
    sample, past = sampled(policy, prompts, max(SIZES), cache), rollouts_before(policy, SIZES, cache, past_rollouts)
    centred = sample.rewards - sample.rates[:, None]
    reference = (centred**2 * sample.exact).mean(axis=1)
    signal = float(sample.signal)
    for k in SIZES:
        for method, prior, found, unbiased in cases(sample, past, k):
            stretch = 1.0 if unbiased else float((found * centred).sum() / (centred**2).sum())
            terms = ((found / stretch) ** 2 * sample.exact).mean(axis=1)
            value, low, high = ratio(terms, reference, np.random.default_rng(0))
            yield {
                "policy": Path(policy).name,
                "prompts": len(sample.rates),
                "success": float(sample.rates.mean()),
                "method": method,
                "rollouts": k,
                "prior": prior,
                "second_moment_ratio": value,
                "low": low,
                "high": high,
                "snr": signal / (float(terms.mean()) - signal),
                "stretch": stretch,
            }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", action="append", default=[], help="the warm start of this preset; may be given again")
    parser.add_argument(
        "--run", action="append", default=[], help="the last policy of the run in this directory; may be given again"
    )
    parser.add_argument(
        "--model",
        action="append",
        default=[],
        help="the instruct model in this folder, on sums whose answer is begun; may be given again",
    )
    parser.add_argument("--past", type=int, default=PAST, help="past rollouts for priors and calibrations to learn from")
    parser.add_argument("--prompts", type=int, default=512, help="the number of prompts, each with 16 rollouts")
    parser.add_argument("--cache", type=Path, default=default_cache(), help="folder that keeps rollouts with their energies")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the records to this file")
    parser.add_argument("--csv", type=Path, metavar="FILE", help="write them as a table with the commit and the machine")
    arguments = parser.parse_args()
    policies = [*arguments.preset, *arguments.run, *arguments.model]
    if not policies:
        parser.error("nothing to measure; give --preset NAME, --run DIRECTORY or --model FOLDER")
    found: list[dict[str, Any]] = []
    for policy in policies:
        for record in records(policy, arguments.prompts, arguments.past, arguments.cache):
            if not found or found[-1]["policy"] != record["policy"]:
                print(f"{record['policy']}: success {record['success']:.3f}; second moments over that of the exact success rate")
            found.append(record)
            value = "{second_moment_ratio:.3f} [{low:.3f}, {high:.3f}]  snr {snr:.2e}".format(**record)
            print(f"  k = {record['rollouts']:<2}  {record['method']:<14} {record['prior'] or '':<8} {value}", flush=True)
    if arguments.json:
        arguments.json.write_text(json.dumps(found, indent=1) + "\n")
    if arguments.csv:
        about = {"device": processor(), "commit": commit(), "versions": versions("torch", "transformers", "numpy")}
        with arguments.csv.open("w", newline="") as file:
            writer = csv.DictWriter(file, [*found[0], *about], lineterminator="\n")
            writer.writeheader()
            for record in found:
                rounded = {name: f"{value:.4g}" if isinstance(value, float) else value for name, value in record.items()}
                writer.writerow(rounded | about)


if __name__ == "__main__":
    main()
