"""Computes how rollout budgets change the noise of the policy gradient of method `optimal`: `python bench/variance_budget.py`.

Writes bench/results/variance_budget.csv. The prompts are artificial, and the figures are exact up to the random draw of success
rates: rates p come from a population, the prior is p with normal noise on its log-odds, the calibration is fitted to one rollout of
each of 4096 other prompts, and the energies have log(w1 / w0) = log(1 - p) and w0 = 1. Every prompt has its own gradient, whose
squared norm is `coherence` times the largest value that the energies allow. With coherence 1 all successes of a prompt are one
completion, as in the presets; with 0 noise dominates the gradient, as in long reasoning. Gradients of different prompts are
orthogonal. Groups that a test stopped get advantages by counted paths, so all estimators except "none" are unbiased, which the
script checks.

Columns: `rollouts` is the mean per prompt. `variance` is the variance of the batch's gradient at equal total rollouts with newly
drawn prompts, divided by that with one rollout per prompt; it includes the loss from seeing fewer prompts. `within` is the same
ratio without the differences between prompts, as for a fixed set of prompts. Rule "variance" tests rewards as they come; "by the
prior alone" takes the number of rollouts that its prior suggests at once. A cost of "None" is the rule's default.
"""

from __future__ import annotations

import csv
from collections.abc import Iterator
from math import comb
from pathlib import Path

import numpy as np
from machine import commit, processor, versions
from numpy.typing import NDArray
from scipy.special import expit, logit

from v05 import reference
from v05.methods import Calibration
from v05.path_counting import count_paths
from v05.prior.calibration import Calibrator

RESULTS = Path(__file__).parent / "results" / "variance_budget.csv"
FIELDS = (
    "rates",
    "noise",
    "coherence",
    "rule",
    "initial",
    "cost",
    "rollouts",
    "variance",
    "within",
    "device",
    "commit",
    "versions",
)
MAXIMUM, PROMPTS, FIT = 16, 400, 4096
DELTA1 = 1.0

Array = NDArray[np.float64]
K, X = np.indices((MAXIMUM + 1, MAXIMUM + 1))  # rollouts and successes of a group
INSIDE = X <= K


def populations(rng: np.random.Generator) -> dict[str, tuple[Array, Array]]:
    """For each population: the rates to measure, and the rates to fit the calibration to."""
    draws = {
        "U-shaped, Beta(0.5, 0.5)": lambda n: rng.beta(0.5, 0.5, n),
        "extreme, Beta(0.2, 0.2)": lambda n: rng.beta(0.2, 0.2, n),
        "hard, Beta(0.15, 0.85)": lambda n: rng.beta(0.15, 0.85, n),
        "four in five hopeless": lambda n: np.where(rng.random(n) < 0.8, 0.001, rng.random(n)),
    }

    def within(rates: Array) -> Array:
        return np.clip(rates, 1e-3, 1 - 1e-3)

    return {name: (within(draw(PROMPTS)), within(draw(FIT))) for name, draw in draws.items()}


def tables(priors: Array, calibration: Calibration) -> dict[str, Array]:
    """(G, 17, 17) baselines and gains of each rule after x successes in k rollouts."""
    found = {name: np.full((len(priors), *K.shape), np.nan) for name in ("baseline", "variance", "calibrated", "osla")}
    for g, prior in enumerate(priors):
        for k, x in zip(K[INSIDE].tolist(), X[INSIDE].tolist(), strict=True):
            belief = reference.calibrated(k, x, prior, calibration)
            found["baseline"][g, k, x] = reference.least_variance(belief.baseline, calibration)
            found["variance"][g, k, x] = reference.variance_gain(k, x, prior, calibration)
            found["calibrated"][g, k, x] = 4 * belief.variance**2 / (belief.baseline * (1 - belief.baseline))
            if k:
                found["osla"][g, k, x] = reference.osla_gain(k, reference.shrinkage(k, 2 * x / k - 1, 2 * prior - 1).squared_bias)
    return found


def moments(rates: Array, coherence: float, of_success: Array, of_failure: Array, goes: NDArray[np.bool_], initial: int) -> Array:
    """(4, G): rollouts, squared norm of a group's gradient, its mean over the true gradient, squared norm of the true gradient."""
    p, paths = rates[:, None, None], np.zeros((len(rates), *K.shape))
    paths[:, initial, : initial + 1] = [comb(initial, x) for x in range(initial + 1)]
    for k in range(initial, MAXIMUM):
        onward = np.where(goes[:, k], paths[:, k], 0.0)
        paths[:, k + 1] += onward
        paths[:, k + 1, 1:] += onward[:, :-1]
    chance = np.where(goes | ~INSIDE, 0.0, paths) * np.exp(X * np.log(p) + (K - X) * np.log1p(-p))
    w1, failures = (1 - p) ** DELTA1, K - X
    norm = coherence * np.minimum(
        w1, ((1 - p) / p) ** 2
    )  # squared norm of the mean score of a success; the mean score of a failure is -p / (1 - p) times that of a success
    a1, a0 = np.where(X > 0, np.nan_to_num(of_success), 0.0), np.where(failures > 0, np.nan_to_num(of_failure), 0.0)
    opposite = p / (1 - p)
    along = X * a1 - failures * opposite * a0
    squared = X * a1**2 * (w1 - norm) + failures * a0**2 * (1 - opposite**2 * norm) + norm * along**2
    size = np.maximum(K, 1)
    of_group = (K + 0.0 * p, squared / size**2, along / size / p)
    return np.array([*((chance * value).sum(axis=(1, 2)) for value in of_group), (p**2 * norm)[:, 0, 0]])


def block(baseline: Array, initial: int) -> tuple[Array, Array]:
    """Two (G, initial + 1) arrays: leave-one-out advantages of a success and of a failure, by successes x in `initial` rollouts."""
    others, unused = baseline[:, initial - 1, :initial], np.zeros((len(baseline), 1))
    return np.hstack([unused, 1 - others]), np.hstack([-others, unused])


def cases(rates: Array, priors: Array, calibration: Calibration, coherence: float) -> Iterator[tuple[str, int, str, Array]]:
    """The rule, the initial rollouts, the cost, and the result of `moments`, of each case."""
    known = tables(priors, calibration)
    own = np.full((2, len(rates), *K.shape), np.nan)  # leave-one-out over the whole group
    own[0, :, 1:, 1:] = 1 - known["baseline"][:, :-1, :-1]
    own[1, :, 1:, :] = -known["baseline"][:, :-1, :]
    expected = np.array([reference.gradient_variance(reference.calibrated(0, 0, v, calibration), calibration) for v in priors])

    def stopped(gain: Array, cost: float, initial: int) -> NDArray[np.bool_]:
        return (K < MAXIMUM) & ((initial > K) | (gain > cost))

    for k in (1, 2, 4, 8):
        yield "uniform", k, "", moments(rates, coherence, *own, stopped(np.zeros_like(own[0]), 1.0, k), k)
    size = np.maximum(K, 1)
    for initial in (1, 2):
        fresh = {"None": reference.fresh_prompt_gain(calibration)}
        mean = {f"mean / {part}": float(expected.mean()) / part for part in (1, 2, 4, 8)}
        for rule, costs in (("osla", {"None": 1 / 256}), ("calibrated", {"None": 1 / 256}), ("variance", fresh | mean)):
            for name, cost in costs.items():
                goes = stopped(known[rule], cost, initial)
                counted = count_paths(goes, *block(known["baseline"], initial), initial)
                yield rule, initial, name, moments(rates, coherence, *counted, goes, initial)
        for name, cost in (fresh | mean).items():
            goes = stopped(expected[:, None, None] / (size * (size + 1)), cost, initial)
            yield "variance, by the prior alone", initial, name, moments(rates, coherence, *own, goes, initial)


def main() -> None:
    rng = np.random.default_rng(0)
    about = (processor(), commit(), versions("numpy"))
    RESULTS.parent.mkdir(exist_ok=True)
    with RESULTS.open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(FIELDS)
        for name, (rates, others) in populations(rng).items():
            for noise in (0.6, 1.5):
                of_others, priors = (expit(logit(p) + noise * rng.normal(size=len(p))) for p in (others, rates))
                calibrator = Calibrator(window=FIT, half_life=None)
                calibrator.observe((rng.random(FIT) < others).astype(np.float64), np.ones(FIT), of_others)
                fit = calibrator.fit()
                calibration = Calibration(fit.alpha, fit.beta, fit.kappa, fit.eps, 0.0, DELTA1)
                for coherence in (0.0, 0.1, 1.0):
                    one: tuple[float, float] | None = None
                    for rule, initial, cost, (rollouts, squared, length, signal) in cases(rates, priors, calibration, coherence):
                        np.testing.assert_allclose(length, 1.0, rtol=1e-9)
                        mean = float(rollouts.mean())
                        found = mean * float(squared.mean()), mean * float((squared - signal).mean())
                        one = one or found
                        ratios = [value / of_one for value, of_one in zip(found, one, strict=True)]
                        row = (name, noise, coherence, rule, initial, cost, *(f"{v:.4g}" for v in (mean, *ratios)))
                        writer.writerow((*row, *about))
                        print("{:<26}{:<5}{:<5}{:<29}{:<3}{:<10}{:>6} rollouts: {:>6}, within {:>6}".format(*row), flush=True)


if __name__ == "__main__":
    main()
