"""Measures serial rounds against rollouts: `python bench/rounds.py`.

Writes bench/results/rounds.csv, and its table into docs/budgets.md.

The allocator samples groups with success rates p ~ Beta(0.6, 0.6) and priors of bench/regimes.py: one rollout at a time, four at a
time, and looking ahead. For rule "calibrated" the calibration is fitted to equally many other groups. A round is one test of a
group, so a group that stops at its first test has one round. "most" is the number of rounds until the last group stops. Looking
ahead takes more rollouts, so it is also measured at the cost at which it takes as many as one at a time.
"""

from __future__ import annotations

import csv
from collections.abc import Iterator
from dataclasses import dataclass, fields
from pathlib import Path

import numpy as np
from machine import commit, processor, versions
from marks import replaced
from numpy.typing import NDArray
from regimes import REGIMES

from v05.budget import Chunk, RolloutAllocator
from v05.methods import Calibration
from v05.ops import fused_advantage
from v05.prior.calibration import Calibrator
from v05.simulate.replay import TO_CENTRED

RESULTS = Path(__file__).parent / "results" / "rounds.csv"
PAGE = Path(__file__).parents[1] / "docs" / "budgets.md"
GROUPS, INITIAL, MAXIMUM, COST = 60_000, 4, 16, 1 / 256
SHAPE = 0.6  # both parameters of the Beta distribution of rates
PRIORS = ("good prior", "fair prior", "noise as prior")
METHODS = {"osla": "v05", "calibrated": "calibrated"}
NAMES = {"1": "1", "4": "4", "look": '`"look"`'}
HALVINGS = 12  # bisection steps on the interval of costs

Array = NDArray[np.float64]


@dataclass(frozen=True)
class Figures:
    """The figures of one rule, prior and chunk.

    Attributes:
        rollouts, rounds: means per group.
        most: rounds until all groups have stopped.
        mse: mean squared error of the baseline, in centred units squared.
    """

    rule: str
    prior: str
    chunk: str
    cost: float
    rollouts: float
    rounds: float
    most: int
    mse: float


@dataclass(frozen=True)
class Groups:
    """(G,) success rates and priors, (G, MAXIMUM) rewards."""

    rates: Array
    priors: Array
    rewards: Array


def draw(prior: str, rng: np.random.Generator) -> Groups:
    rates = np.clip(rng.beta(SHAPE, SHAPE, GROUPS), 1e-9, 1 - 1e-9)
    return Groups(rates, REGIMES[prior](rates, rng), (rng.random((GROUPS, MAXIMUM)) < rates[:, None]).astype(np.float64))


def calibration_for(groups: Groups) -> Calibration:
    calibrator = Calibrator(window=GROUPS, half_life=None)
    calibrator.observe(groups.rewards[:, :INITIAL].sum(axis=1), np.full(GROUPS, INITIAL), groups.priors)
    return calibrator.fit()


def sampled(groups: Groups, rule: str, prior: str, chunk: Chunk, cost: float, calibration: Calibration | None) -> Figures:
    settings = {"initial": INITIAL, "maximum": MAXIMUM, "cost": cost, "chunk": chunk, "calibration": calibration}
    allocator = RolloutAllocator(rule=rule, **settings)
    allocator.open(np.arange(GROUPS), groups.priors)
    tests = most = 0
    while not allocator.done:
        leases = allocator.lease(GROUPS * MAXIMUM)
        of = leases.group.astype(np.int64)
        allocator.report(leases.lease_id, groups.rewards[of, leases.index])
        tests += len(np.unique(of))
        most += 1
    closed = allocator.drain()
    out = fused_advantage(
        closed.rewards, closed.priors, group_offsets=closed.offsets, method=METHODS[rule], calibration=calibration
    )
    assert out.stats is not None
    error = TO_CENTRED * float(((out.stats.baseline.numpy() - groups.rates) ** 2).mean())
    return Figures(rule, prior, str(chunk), cost, len(closed.rewards) / GROUPS, tests / GROUPS, most, error)


def measured() -> Iterator[Figures]:
    for rule in METHODS:
        for prior in PRIORS:
            rng = np.random.default_rng(0)
            groups = draw(prior, rng)
            calibration = calibration_for(draw(prior, rng)) if rule == "calibrated" else None
            found = {chunk: sampled(groups, rule, prior, chunk, COST, calibration) for chunk in (1, 4, "look")}
            yield from found.values()
            low, high = COST, 8 * COST  # brackets the cost at which looking ahead takes no more rollouts
            for _ in range(HALVINGS):
                cost = (low * high) ** 0.5
                dear = sampled(groups, rule, prior, "look", cost, calibration)
                low, high = (cost, high) if dear.rollouts > found[1].rollouts else (low, cost)
            yield sampled(groups, rule, prior, "look", high, calibration)


def table(results: Path = RESULTS) -> str:
    with results.open(newline="") as file:
        rows = list(csv.DictReader(file))
    lines = ["| rule | prior | `chunk` | cost | rollouts a group | rounds a group | most rounds | error |", "|---" * 8 + "|"]
    for row in rows:
        figures = f"{float(row['rollouts']):.2f} | {float(row['rounds']):.2f} | {row['most']} | {float(row['mse']):.4f}"
        lines.append(f"| `{row['rule']}` | {row['prior']} | {NAMES[row['chunk']]} | 1 / {1 / float(row['cost']):.0f} | {figures} |")
    return "\n".join(lines) + f"\n\n(`python bench/rounds.py` at commit {rows[0]['commit']}.)\n"


def main() -> None:
    about = (processor(), commit(), versions("numpy", "scipy"))
    with RESULTS.open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow((*(field.name for field in fields(Figures)), "device", "commit", "versions"))
        for figures in measured():
            values = vars(figures).values()
            writer.writerow((*(f"{value:.6g}" if isinstance(value, float) else value for value in values), *about))
            file.flush()
            print(figures, flush=True)
    PAGE.write_text(replaced(PAGE.read_text(), "rounds", table()))


if __name__ == "__main__":
    main()
