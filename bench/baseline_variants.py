"""Measures variants of the least-variance baseline beyond the op: `python bench/baseline_variants.py symbols tiny RUN ...`

A policy is the warm start of a preset, or the last policy of the run in a directory. Figures are second moments of the gradient,
divided by that of the op's own baseline. They use exact energies (bench/gradients.py) and have 95 % bootstrap intervals over
prompts.

- group: `optimal` with k rollouts per prompt and a learnt prior, with its baseline b shrunk towards the group's own energies E:
  (n W b + sum of r E over the others) / (n W + sum of E over the others). b counts for n rollouts. W is the mean energy of past
  groups ("constant level"), or its prediction from the prior by a log-linear fit to past groups ("level by prior").
- tokens: a baseline for each position t, E[r W_t] / E[W_t], where W_t is the energy of the tokens up to t (OTB, arXiv 2602.07078),
  from the engine's energies or from exact ones. "batch" has one such baseline per position for the whole batch and is compared with
  one number for the batch. "prompt" shifts the log-odds of the prompt's exact success rate at each position and is compared with
  one shift for all positions. "best by position" minimises the second moment directly. Each half of the prompts uses fits to the
  other.
"""

from __future__ import annotations

import argparse
import csv
import itertools
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from gradient_variance import SIZES, advantages, taught
from gradients import (
    LEAST_RATE,
    PAST,
    Array,
    Past,
    Sample,
    Tokens,
    default_cache,
    halves,
    ratio,
    rollouts_before,
    sampled,
    sampled_tokens,
    shift_weighted,
)
from machine import commit, processor, versions
from scipy.optimize import minimize
from scipy.special import expit, logit

from v05.methods import METHODS
from v05.prior.history import HistoryPrior

RESULTS = Path(__file__).parent / "results" / "baseline_variants.csv"
FIELDS = ("policy", "variant", "rollouts", "baseline", "value", "low", "high")
COUNTS_FOR = (16, 64)
TOKEN_PROMPTS, TOKEN_ROLLOUTS = 512, 1
RIDGE = 1e-3  # ridge penalty of the best baseline by position, in units of a position's mean energy

Row = tuple[str, int, str, float, float, float]  # the columns from `variant` on


def mean_energies(priors: Array, energies: Array, asked: Array) -> Array:
    """Mean energies predicted from priors. The log of the mean is a quadratic function of the prior's log-odds."""
    powers = np.vander(logit(np.clip(priors, LEAST_RATE, 1 - LEAST_RATE)), 3)

    def loss(theta: Array) -> float:
        logs = np.clip(powers @ theta, -20.0, 20.0)
        return float(np.mean(np.exp(logs) - energies / energies.mean() * logs))  # minimal at the true mean

    found = minimize(loss, np.zeros(3)).x
    predicted: Array = energies.mean() * np.exp(np.vander(logit(np.clip(asked, LEAST_RATE, 1 - LEAST_RATE)), 3) @ found)
    return predicted


def group_rows(sample: Sample, past: Past) -> Iterator[Row]:
    for k in SIZES[1:]:
        estimator = taught(METHODS["optimal"], HistoryPrior(), past, k)
        assert estimator.prior is not None
        as_built = advantages(estimator, sample, k)
        reference = (as_built**2 * sample.exact).mean(axis=1)
        groups = (len(sample.rates), -1, k)
        baseline, rewards, energies = (x.reshape(groups) for x in (sample.rewards - as_built, sample.rewards, sample.full))
        seen = slice(0, PAST // k)
        of_past = past.energies[seen, :k].mean(axis=1)
        by_prior = mean_energies(
            estimator.prior.predict(past.texts[seen].tolist()), of_past, estimator.prior.predict(sample.texts.tolist())
        )
        others = energies.sum(axis=2, keepdims=True) - energies
        of_successes = (rewards * energies).sum(axis=2, keepdims=True) - rewards * energies
        levels = {"constant level": np.full_like(by_prior, of_past.mean()), "level by prior": by_prior}
        for (name, level), n in itertools.product(levels.items(), COUNTS_FOR):
            mass = n * level[:, None, None]
            drawn = (mass * baseline + of_successes) / (mass + others)
            terms = ((rewards - drawn).reshape(sample.rewards.shape) ** 2 * sample.exact).mean(axis=1)
            yield "group", k, f"{name}, n = {n}", *ratio(terms, reference, np.random.default_rng(0))


def token_rows(tokens: Tokens) -> Iterator[Row]:
    rewards, products = tokens.rewards, tokens.products
    width = products.shape[-1]
    there = np.arange(width) < tokens.lengths[..., None]
    whole = products.sum((2, 3))
    rates = np.broadcast_to(np.clip(tokens.rates, LEAST_RATE, 1 - LEAST_RATE)[:, None], rewards.shape)
    cumulative = {
        "engine": np.cumsum(tokens.full, axis=2) * there,
        "exact": np.stack([products[..., : t + 1, : t + 1].sum((2, 3)) for t in range(width)], axis=2) * there,
    }

    def terms(baseline: Array) -> Array:
        left = (rewards[..., None] - baseline) * there
        return np.einsum("pkt,pktu,pku->p", left, products, left)

    def shifted(mine: Array, others: Array, weights: Array) -> Array:
        read = weights[others] > 0
        shift = shift_weighted(rates[others][read], rewards[others][read], weights[others][read])
        found: Array = expit(logit(rates[mine]) + shift(rates[mine]))
        return found

    found = {name: np.zeros(there.shape) for name in ("batch", "batch, best by position", "prompt")}
    for mine, others in halves(len(rewards)):
        found["batch"][mine] = (rewards * whole)[others].sum() / whole[others].sum()
        found["prompt"][mine] = shifted(mine, others, whole)[..., None]
        system, target = products[others].sum((0, 1)), np.einsum("pk,pktu->t", rewards[others], products[others])
        pull = RIDGE * np.trace(system) / width
        number = found["batch"][mine][0, 0, 0]
        found["batch, best by position"][mine] = np.linalg.solve(system + pull * np.eye(width), target + pull * number)
        for name, weights in cumulative.items():
            for kind in ("batch", "prompt"):
                found.setdefault(f"{kind}, cumulative {name} energies", np.zeros(there.shape))
            for t in np.flatnonzero(weights[others].sum((0, 1)) > 0):
                w = weights[..., t]
                found[f"batch, cumulative {name} energies"][mine, :, t] = (rewards * w)[others].sum() / w[others].sum()
                found[f"prompt, cumulative {name} energies"][mine, :, t] = shifted(mine, others, w)
    for name, baseline in found.items():
        kind = name.split(",")[0]
        if name != kind:
            yield "tokens", 1, name, *ratio(terms(baseline), terms(found[kind]), np.random.default_rng(0))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("policies", nargs="+", help="presets, for their warm starts, and directories of finished runs")
    parser.add_argument("--cache", type=Path, default=default_cache(), help="folder that keeps rollouts with their energies")
    arguments = parser.parse_args()
    about = (processor(), commit(), versions("torch", "transformers", "numpy"))
    with RESULTS.open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow((*FIELDS, "device", "commit", "versions"))
        for policy in arguments.policies:
            sample, past = sampled(policy, 512, max(SIZES), arguments.cache), rollouts_before(policy, SIZES, arguments.cache)
            tokens = sampled_tokens(policy, TOKEN_PROMPTS, TOKEN_ROLLOUTS, arguments.cache)
            for rows in (group_rows(sample, past), token_rows(tokens)):
                for variant, k, baseline, value, low, high in rows:
                    figures = [f"{x:.4f}" for x in (value, low, high)]
                    writer.writerow((Path(policy).name, variant, k, baseline, *figures, *about))
                    print(f"{Path(policy).name:<16} {variant:<6} k = {k:<2} {baseline:<36} {' '.join(figures)}", flush=True)


if __name__ == "__main__":
    main()
