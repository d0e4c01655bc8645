"""Measures how much can still be gained on real outcomes: `python bench/headroom.py OUTCOMES.csv`.

Writes bench/results/headroom.csv. Groups are drawn as by `v05 simulate` and get 4 to 16 rollouts each, MEAN on average. The
  calibrated prior and rule are compared with look-ahead to the end  the Bayes-optimal sequential rule for the same prior, by
  dynamic programming over all later rollouts histogram              no model: the true rates of other draws, as a histogram for
  each of BINS classes of the prior
Both are also measured with better priors: the true rate with normal noise on its logit. The best result for a prior bounds what any
estimator can reach that has only this prior.
"""

from __future__ import annotations

import argparse
import csv
from dataclasses import replace
from pathlib import Path

import numpy as np
from machine import commit, processor, versions
from numpy.typing import NDArray

from v05.ops import fused_advantage
from v05.prior.calibration import Calibrator
from v05.simulate.item_response import cross_fitted
from v05.simulate.outcomes import read_outcomes
from v05.simulate.replay import TO_CENTRED, Groups, Source

RESULTS = Path(__file__).parent / "results" / "headroom.csv"
FIELDS = ("prior", "posterior", "rule", "mean_rollouts", "mse", "mse_of_mean", "device", "commit", "versions")
INITIAL, MAXIMUM, MEAN = 4, 16, 7.7
GROUPS, BINS = 50_000, 50
GRID = np.concatenate([[1e-4, 1e-3, 3e-3, 0.01], np.linspace(0.02, 0.98, 97), [0.99, 0.997, 0.999, 1 - 1e-4]])

Array = NDArray[np.float64]
Tables = dict[int, tuple[Array, Array]]  # k -> mean and variance (centred units) of the rate, (BINS, k + 1) by class and successes


def classes(priors: Array) -> NDArray[np.int64]:
    """(G,) the class of each prior, among BINS equally wide classes."""
    return np.argsort(np.argsort(priors)) * BINS // len(priors)


def calibrated_tables(groups: Groups) -> Tables:
    """The tables of v05's calibrated fusion, fitted to the groups' first rollouts, with the median prior of each class."""
    calibrator = Calibrator(window=len(groups.rates), half_life=None)
    calibrator.observe(groups.rewards[:, :INITIAL].sum(axis=1), np.full(len(groups.rates), INITIAL), groups.priors)
    of = classes(groups.priors)
    priors = np.array([np.median(groups.priors[of == c]) for c in range(BINS)])
    tables = {}
    for k in range(INITIAL, MAXIMUM + 1):
        rewards = np.tile(np.concatenate([np.repeat((1.0, 0.0), (x, k - x)) for x in range(k + 1)]), BINS)
        offsets = np.arange(BINS * (k + 1) + 1) * k
        output = fused_advantage(
            rewards,
            np.repeat(priors, k + 1),
            group_offsets=offsets,
            method="calibrated",
            calibration=calibrator.fit() if k == INITIAL else calibrator.calibration,
        )
        assert output.stats is not None
        tables[k] = tuple(v.numpy().reshape(BINS, k + 1) for v in (output.stats.baseline, TO_CENTRED * output.stats.mse))
    return tables


def histogram_tables(others: Groups) -> Tables:
    share = np.full((BINS, len(GRID)), 0.05)
    np.add.at(share, (classes(others.priors), np.abs(others.rates[:, None] - GRID).argmin(axis=1)), 1.0)
    tables = {}
    for k in range(INITIAL, MAXIMUM + 1):
        x = np.arange(k + 1)[:, None]
        likelihood = GRID**x * (1 - GRID) ** (k - x)
        posterior = share[:, None, :] * likelihood
        posterior /= posterior.sum(axis=2, keepdims=True)
        mean = posterior @ GRID
        tables[k] = mean, TO_CENTRED * (posterior @ GRID**2 - mean**2)
    return tables


def gains(tables: Tables, price: float | None) -> Tables:
    """The value of one more rollout. Without a price it counts only to the next test; with a price, to the best later stop, net."""
    found, ahead = {}, tables[MAXIMUM][1]
    for k in range(MAXIMUM - 1, INITIAL - 1, -1):
        mean, variance = tables[k]
        after = tables[k + 1][1] if price is None else ahead + price
        expected = mean * after[:, 1:] + (1 - mean) * after[:, :-1]
        found[k] = variance - expected
        ahead = np.minimum(variance, expected)
    return found


def sizes(groups: Groups, gain: Tables, threshold: float) -> NDArray[np.int64]:
    successes = np.cumsum(groups.rewards, axis=1).astype(np.int64)
    of, size = classes(groups.priors), np.full(len(groups.rates), INITIAL)
    for k in range(INITIAL, MAXIMUM):
        size += (size == k) & (gain[k][of, successes[:, k - 1]] > threshold)
    return size


def spend(groups: Groups, tables: Tables, to_the_end: bool) -> NDArray[np.int64]:
    """(G,) group sizes at the price per rollout at which groups take MEAN rollouts on average."""
    low, high = 1e-8, 0.1
    for _ in range(40):
        price = (low * high) ** 0.5
        size = sizes(groups, gains(tables, price), 0.0) if to_the_end else sizes(groups, gains(tables, None), price)
        low, high = (price, high) if size.mean() > MEAN else (low, price)
    return size


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("outcomes", type=Path, help="columns model, question, successes, trials")
    path = parser.parse_args().outcomes
    rng = np.random.default_rng(0)
    read = read_outcomes(path)
    read = replace(read, priors=cross_fitted(read, rng))
    about = (processor(), commit(), versions("numpy"))
    RESULTS.parent.mkdir(exist_ok=True)
    with RESULTS.open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(FIELDS)
        for name, noise in (("item response", None), ("noise 1", 1.0), ("noise 0.6", 0.6)):
            source = Source(read, noise, "superpopulation", MAXIMUM, rng)
            groups, others = source.draw(GROUPS), source.draw(GROUPS)
            of = classes(groups.priors)
            for posterior, tables in (("calibrated", calibrated_tables(groups)), ("histogram", histogram_tables(others))):
                for rule, to_the_end in (("one step", False), ("look-ahead to the end", True)):
                    size = spend(groups, tables, to_the_end)
                    successes = np.cumsum(groups.rewards, axis=1)[np.arange(GROUPS), size - 1].astype(np.int64)
                    baseline = np.array([tables[k][0][c, x] for k, c, x in zip(size, of, successes, strict=True)])
                    mse, of_mean = (TO_CENTRED * np.mean((b - groups.rates) ** 2) for b in (baseline, successes / size))
                    writer.writerow((name, posterior, rule, *(f"{v:.6g}" for v in (size.mean(), mse, of_mean)), *about))
                    print(
                        f"{name:<14} {posterior:<11} {rule:<22} {size.mean():.2f} rollouts: {mse:.4f}, mean {of_mean:.4f}",
                        flush=True,
                    )


if __name__ == "__main__":
    main()
