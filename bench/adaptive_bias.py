"""Computes exactly how early stopping biases a group's mean reward and its policy gradient.

`python bench/adaptive_bias.py` writes bench/results/adaptive_bias.csv and docs/adaptive_bias.png.

In the bandit of bench/bandit.py, a rollout's answer is independent of the other rollouts given its own reward. So a group's
expected gradient is the true gradient times a factor f(p): an estimator that sees only rewards of 0 and 1 can err in the weight of
a prompt, but not in the direction of its gradient. f = 1 everywhere means unbiased. A constant f only changes the step size. An f
that varies with p changes the relative weights of prompts. The signal-to-noise ratio is taken over all p: the root of the summed
squared mean gradients over the summed variances.

All 2^16 sequences of 16 rewards are enumerated, so no figure has sampling error. The prior is sigmoid(logit p + 0.6 e) with e ~
N(0, 1) at five points. The calibration is the default.

Stopping rules: fixed (4 rollouts), osla and calibrated (4 to 16, cost 1/256), first success (1 to 16).
Estimators, which all average over the group's rollouts:
  plain            the method's baseline, with the rollout's own reward
  leave-one-out    the method's baseline, without the rollout's own reward
  initial block    leave-one-out within the first rollouts, whose number is fixed; later rollouts have no gradient
  earlier only     a rollout's baseline uses only the rollouts before it
  path counting    the estimate of the initial block, averaged over all orders of the group's rewards under which the rule would
                   have stopped at the same size (v05/path_counting.py); every rollout has a gradient
"""

from __future__ import annotations

import csv
import itertools
from collections.abc import Callable, Iterator
from pathlib import Path

import matplotlib
import numpy as np
from bandit import moments, squared_gradient
from machine import commit, processor, versions
from numpy.typing import NDArray

matplotlib.use("Agg")
from matplotlib import pyplot as plt

from v05 import reference
from v05.methods import Calibration
from v05.path_counting import count_paths

RESULTS = Path(__file__).parent / "results" / "adaptive_bias.csv"
PLOT = Path(__file__).parents[1] / "docs" / "adaptive_bias.png"
FIELDS = (
    "rule",
    "baseline",
    "estimator",
    "p",
    "rollouts",
    "bias_of_mean",
    "factor",
    "signal",
    "noise",
    "device",
    "commit",
    "versions",
)
RATES = (0.05, 0.1, 0.2, 0.35, 0.5, 0.65, 0.8, 0.9, 0.95)
NOISE, NODES = 0.6, np.polynomial.hermite_e.hermegauss(5)
MAXIMUM, COST = 16, 1 / 256
INITIAL = {"fixed": 4, "osla": 4, "calibrated": 4, "first success": 1}

Array = NDArray[np.float64]
SEQUENCES = np.array(list(itertools.product((0, 1), repeat=MAXIMUM)), dtype=np.int8)  # (65536, 16)
SUCCESSES = np.concatenate([np.zeros((len(SEQUENCES), 1), dtype=np.int64), np.cumsum(SEQUENCES, axis=1)], axis=1)  # of the first k
POSITIONS = np.arange(MAXIMUM)


def lattice(of: Callable[[int, int], float]) -> Array:
    """(17, 17) values of(k, x) for x successes in k rollouts."""
    table = np.full((MAXIMUM + 1, MAXIMUM + 1), np.nan)
    for k in range(MAXIMUM + 1):
        table[k, : k + 1] = [of(k, x) for x in range(k + 1)]
    return table


def baselines(method: str, prior: float) -> Array:
    def of(k: int, x: int) -> float:
        if method == "calibrated":
            return reference.calibrated(k, x, prior, Calibration()).baseline
        if k == 0:
            return prior if method == "v05" else 0.0
        return (1 + reference.shrinkage(k, 2 * x / k - 1, 2 * prior - 1).baseline) / 2 if method == "v05" else x / k

    return lattice(of)


def goes_on(rule: str, prior: float) -> NDArray[np.bool_]:
    """(17, 17): whether the rule takes another rollout after x successes in k."""

    def of(k: int, x: int) -> bool:
        if k < INITIAL[rule]:
            return True
        if k == MAXIMUM or rule == "fixed":
            return False
        if rule == "first success":
            return x == 0
        if rule == "osla":
            return reference.osla_gain(k, reference.shrinkage(k, 2 * x / k - 1, 2 * prior - 1).squared_bias) > COST
        return reference.calibrated_gain(k, x, prior, Calibration()) > COST

    return lattice(of) == 1.0


def sizes(goes: NDArray[np.bool_], initial: int) -> NDArray[np.int64]:
    """(65536,): the size at which each sequence stops."""
    size = np.full(len(SEQUENCES), MAXIMUM)
    for k in range(MAXIMUM - 1, initial - 1, -1):
        size[~goes[k, SUCCESSES[:, k]]] = k
    return size


def advantages(estimator: str, b: Array, goes: NDArray[np.bool_], initial: int, size: NDArray[np.int64]) -> Array:
    """(65536, 16) advantages divided by the group's size, zero past it. Times the scores, they sum to a group's gradient."""
    r = SEQUENCES
    x = SUCCESSES[np.arange(len(r)), size]
    inside = size[:, None] > POSITIONS
    if estimator == "plain":
        return inside * (r - b[size, x][:, None]) / size[:, None]
    if estimator == "leave-one-out":
        return inside * (r - b[size[:, None] - 1, np.clip(x[:, None] - r, 0, size[:, None] - 1)]) / size[:, None]
    if estimator == "earlier only":
        return inside * (r - b[POSITIONS, SUCCESSES[:, :-1]]) / size[:, None]
    block = b[initial - 1, np.clip(SUCCESSES[:, [initial]] - r, 0, initial - 1)]
    if estimator == "initial block":
        return (initial > POSITIONS) * (r - block) / initial
    others = b[initial - 1, :initial]
    of_success, of_failure = count_paths(
        goes[None], 1 - np.roll(np.append(others, 0), 1)[None], -np.append(others, 0)[None], initial
    )[:, 0]
    return inside * np.where(r == 1, of_success[size, x][:, None], of_failure[size, x][:, None]) / size[:, None]


def measure(rule: str, method: str, estimator: str, p: float) -> tuple[float, float, float, float, float]:
    """At p: mean rollouts, bias of the group mean, f(p), squared norm and variance of a group's gradient."""
    logit = np.log(p / (1 - p))
    probability = np.exp(SUCCESSES[:, -1] * np.log(p) + (MAXIMUM - SUCCESSES[:, -1]) * np.log1p(-p))
    rollouts = bias = factor = second = 0.0
    for node, weight in zip(NODES[0], NODES[1] / NODES[1].sum(), strict=True):
        prior = float(1 / (1 + np.exp(-logit - NOISE * node)))
        goes, initial = goes_on(rule, prior), INITIAL[rule]
        size = sizes(goes, initial)
        weights = np.nan_to_num(advantages(estimator, baselines(method, prior), goes, initial, size))
        length, squared_norm = moments(weights, SEQUENCES, p)
        rollouts += weight * probability @ size
        bias += weight * probability @ (SUCCESSES[np.arange(len(size)), size] / size - p)
        factor += weight * probability @ length
        second += weight * probability @ squared_norm
    return rollouts, bias, factor, factor**2 * squared_gradient(p), second - factor**2 * squared_gradient(p)


def rows() -> Iterator[tuple[str, str, str, float, tuple[float, ...]]]:
    for rule in INITIAL:
        for method in ("mean", "v05", "calibrated"):
            for estimator in ("plain", "leave-one-out", "initial block", "earlier only", "path counting"):
                if method == "mean" and (estimator != "leave-one-out" or INITIAL[rule] == 1):
                    continue  # without a prior, a single rollout has no baseline
                for p in RATES:
                    yield rule, method, estimator, p, measure(rule, method, estimator, p)


def draw(factors: dict[tuple[str, str, str], Array]) -> None:
    """Plot f(p) of every rule with leave-one-out, and with path counting."""
    figure, axes = plt.subplots(figsize=(7, 4.5), layout="constrained")
    for rule in INITIAL:
        axes.plot(RATES, factors[rule, "calibrated", "leave-one-out"], marker=".", label=f"{rule}, leave-one-out")
    axes.plot(RATES, factors["calibrated", "calibrated", "path counting"], "k--", label="any rule, path counting")
    axes.set(xlabel="success rate p", ylabel="expected gradient / true gradient", yscale="log", title="baseline: calibrated")
    axes.set_yticks([0.6, 0.8, 1.0, 1.5, 2.0, 2.5], labels=["0.6", "0.8", "1", "1.5", "2", "2.5"])
    axes.legend()
    axes.grid(alpha=0.3)
    figure.savefig(PLOT, dpi=110)
    plt.close(figure)


def main() -> None:
    about = (processor(), commit(), versions("numpy"))
    RESULTS.parent.mkdir(exist_ok=True)
    with RESULTS.open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(FIELDS)
        factors: dict[tuple[str, str, str], Array] = {}
        for (rule, method, estimator), group in itertools.groupby(rows(), key=lambda row: row[:3]):
            found = []
            for *_, p, figures in group:
                writer.writerow((rule, method, estimator, p, *(f"{value:.6g}" for value in figures), *about))
                found.append(figures)
            size, bias, factor, signal, noise = (np.array(values) for values in zip(*found, strict=True))
            factors[rule, method, estimator] = factor
            quality = (signal.sum() / noise.sum()) ** 0.5
            print(f"{rule:<14}{method:<11}{estimator:<15}{size.mean():5.2f} rollouts", end="")
            print(f"   mean off by {bias.min():+.3f} to {bias.max():+.3f}   f {factor.min():.3f} to {factor.max():.3f}", end="")
            print(f"   signal to noise {quality:.4f}, a rollout {quality / size.mean() ** 0.5:.4f}", flush=True)
    draw(factors)


if __name__ == "__main__":
    main()
