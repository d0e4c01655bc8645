"""Draws rollouts from recorded outcomes under each budget and compares each method's baseline with the true success rate.

A step has STEP groups, as in training. The replay calls v05's own allocator and op. The calibrator learns from the rollouts that
were drawn in earlier steps, never from the true rates. All methods see the same rewards.

In replay "superpopulation" the success rate of a cell with s successes in n trials is drawn from Beta(s + a, n - s + b), where (a,
b) is fitted to all cells by marginal likelihood. Its rewards are Bernoulli draws. In replay "finite" the recorded trials are drawn
without replacement, and s / n counts as the true rate. That understates the error of every method when few trials are left.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.special import expit, logit

from v05.arguments import unknown
from v05.budget import ClosedGroups, RolloutAllocator
from v05.methods import find_method
from v05.ops import fused_advantage
from v05.prior.calibration import Calibrator
from v05.simulate.outcomes import Outcomes, fit_population

STEP = 2048  # groups per step
WARM_UP = 2  # unmeasured steps that fill the calibrator's window
MEASURED = 32  # measured steps; the standard error of their mean is about one percent
REPLAYS = ("superpopulation", "finite")
TO_CENTRED = 4.0  # converts squared errors of rewards in [0, 1] to those of rewards in [-1, 1]
LEASE = 64  # rollouts leased at a time; rule "total" compares the gains of all groups before each lease
REFERENCE = 16  # the usual group size of GRPO
AS_OSLA = "as v05+osla"
# The op's method behind each name in the results.
METHODS = {
    "grpo": "grpo",
    "v05": "v05",
    "calibrated": "calibrated",
    "v05+osla": "v05",
    "mean+budget": "grpo",
    "calibrated+budget": "calibrated",
}
FIXED = ("grpo", "v05", "calibrated")  # methods that are measured at every fixed group size


@dataclass(frozen=True, eq=False)
class Groups:
    """G groups. `rates` and `priors` are (G,) in [0, 1], with NaN for no prior; `rewards` is (G, maximum), 0 or 1."""

    rates: NDArray[np.float64]
    priors: NDArray[np.float64]
    rewards: NDArray[np.float64]


class Source:
    """Draws groups from the cells of outcomes in random order. Every cell is drawn once before any is drawn again.

    Args:
        outcomes: the outcomes. They need priors unless `noise` is given.
        noise: if given, the priors are the true rates with normal noise of this standard deviation on their logits.
        replay: "superpopulation" or "finite".
        maximum: rewards per group. Replay "finite" leaves out cells with fewer trials.
        rng: the source of randomness.

    Raises:
        ValueError: the replay is unknown, no cell has enough trials, or the noise is negative or not finite.
    """

    def __init__(self, outcomes: Outcomes, noise: float | None, replay: str, maximum: int, rng: np.random.Generator) -> None:
        if replay not in REPLAYS:
            raise ValueError(unknown(f"replay={replay!r}", replay, REPLAYS))
        if noise is not None and not 0 <= noise < np.inf:
            raise ValueError(f"the prior's noise is {noise}; give a finite standard deviation >= 0")
        enough = np.ones(len(outcomes), dtype=bool) if replay == "superpopulation" else outcomes.trials >= maximum
        if not enough.any():
            most = int(outcomes.trials.max())
            raise ValueError(
                f"replay='finite' needs cells of maximum={maximum} trials, but the largest cell has {most}; lower --maximum to that"
            )
        self._successes, self._trials = outcomes.successes[enough], outcomes.trials[enough]
        self._priors = None if outcomes.priors is None else outcomes.priors[enough]
        self.cells = len(self._trials)
        self._noise = noise
        self._finite = replay == "finite"
        self._maximum = maximum
        self._rng = rng
        self._population = fit_population(outcomes)
        self._queue = np.zeros(0, dtype=np.int64)

    def draw(self, groups: int) -> Groups:
        while len(self._queue) < groups:
            self._queue = np.concatenate([self._queue, self._rng.permutation(self.cells)])
        cells, self._queue = self._queue[:groups], self._queue[groups:]
        s, n = self._successes[cells], self._trials[cells]
        if self._finite:
            rates = s / n
            rewards = self._without_replacement(s, n)
        else:
            a, b = self._population
            rates = self._rng.beta(s + a, n - s + b)
            rewards = self._rng.random((groups, self._maximum)) < rates[:, None]
        if self._noise is not None:
            priors = expit(logit(rates) + self._noise * self._rng.normal(size=groups))
        else:
            assert self._priors is not None
            priors = self._priors[cells]
        return Groups(rates, priors, rewards.astype(np.float64))

    def _without_replacement(self, s: NDArray[np.float64], n: NDArray[np.float64]) -> NDArray[np.bool_]:
        rewards = np.empty((len(s), self._maximum), dtype=bool)
        left = s.copy()
        for index in range(self._maximum):
            rewards[:, index] = self._rng.random(len(s)) * (n - index) < left
            left -= rewards[:, index]
        return rewards


@dataclass
class Errors:
    """Sums over the groups of a method and budget: squared errors of the baseline (centred units), their squares, and rollouts."""

    groups: int = 0
    squared: float = 0.0
    fourth: float = 0.0
    rollouts: int = 0

    def add(self, baselines: NDArray[np.float64], rates: NDArray[np.float64], rollouts: int) -> None:
        squared = TO_CENTRED * (baselines - rates) ** 2
        self.groups += len(rates)
        self.squared += float(squared.sum())
        self.fourth += float((squared**2).sum())
        self.rollouts += rollouts


@dataclass(frozen=True)
class Record:
    """The result of a method under a budget over all measured groups. --json writes these records.

    Attributes:
        method: how baselines are computed.
        budget: how rollouts are allocated.
        mean_rollouts: mean number of rollouts per group.
        mse: mean squared error of the baseline, in centred units squared.
        mse_standard_error: standard error of that mean.
    """

    method: str
    budget: str
    mean_rollouts: float
    mse: float
    mse_standard_error: float


class Replay:
    """Runs all methods and budgets on the same groups. Call `step` WARM_UP + MEASURED times, then read `records`.

    Args:
        draw: draws the given number of groups, for example `Source.draw`.
        initial, maximum: rollouts of a group before its first test, and at most.
        cost: cost of one rollout in the one-step look-ahead rule, in centred units squared. None means 1 / maximum**2.

    Raises:
        ValueError: an argument is out of bounds.
    """

    def __init__(self, draw: Callable[[int], Groups], initial: int, maximum: int, cost: float | None) -> None:
        RolloutAllocator(rule="osla", initial=initial, maximum=maximum, cost=cost)  # raises for invalid arguments
        self._draw = draw
        self._initial, self._maximum, self._cost = initial, maximum, cost
        self._calibrators: defaultdict[str, Calibrator] = defaultdict(Calibrator)  # by budget
        self._errors: defaultdict[tuple[str, str], Errors] = defaultdict(Errors)
        self._steps = 0

    def step(self) -> None:
        """Draw a step's groups and measure every method and budget on them."""
        groups = self._draw(STEP)
        sizes = range(self._initial, self._maximum + 1)
        for size in sizes:
            closed = self._allocate(groups, rule="uniform", initial=size)
            for method in FIXED:
                self._measure(method, f"{size} each", groups, closed)
        closed = self._allocate(groups, rule="osla", initial=self._initial)
        self._measure("v05+osla", "one-step look-ahead", groups, closed)
        totals = {f"{size} on average": size * STEP for size in sizes} | {AS_OSLA: len(closed.rewards)}
        for budget, total in totals.items():
            calibration = self._calibrators[budget].calibration
            closed = self._allocate(groups, rule="total", initial=self._initial, total=total, calibration=calibration)
            for method in ("mean+budget", "calibrated+budget"):
                self._measure(method, budget, groups, closed)
        self._steps += 1

    def _allocate(self, groups: Groups, *, rule: str, initial: int, **options: Any) -> ClosedGroups:
        """The closed groups, with the rewards that they get under a rule of the allocator."""
        allocator = RolloutAllocator(rule=rule, initial=initial, maximum=self._maximum, cost=self._cost, **options)
        allocator.open(np.arange(STEP), groups.priors)
        limit = LEASE if rule == "total" else STEP * self._maximum
        while not allocator.done:
            leases = allocator.lease(limit)
            allocator.report(leases.lease_id, groups.rewards[leases.group.astype(np.int64), leases.index])
        return allocator.drain()

    def _measure(self, method: str, budget: str, groups: Groups, closed: ClosedGroups) -> None:
        calibrator = self._calibrators[budget]
        output = fused_advantage(
            closed.rewards,
            closed.priors,
            group_offsets=closed.offsets,
            method=METHODS[method],
            calibration=calibrator.calibration,
        )
        assert output.stats is not None
        if self._steps >= WARM_UP:
            self._errors[method, budget].add(output.stats.baseline.numpy(), groups.rates, len(closed.rewards))
        if find_method(METHODS[method]).is_calibrated:  # later steps use the fit
            calibrator.observe(np.add.reduceat(closed.rewards, closed.offsets[:-1]), np.diff(closed.offsets), closed.priors)
            calibrator.fit()

    @property
    def records(self) -> list[Record]:
        """The records of every method and budget, sorted by method and mean rollouts.

        The methods at fixed sizes also get a record at the mean rollouts of v05+osla, interpolated between two sizes: some groups
        would have one rollout more than others.
        """
        records = [_record(method, budget, errors) for (method, budget), errors in self._errors.items()]
        mean = next(r.mean_rollouts for r in records if r.method == "v05+osla")
        for method in FIXED:
            points = [r for r in records if r.method == method]
            rollouts = [r.mean_rollouts for r in points]
            mse = np.interp(mean, rollouts, [r.mse for r in points])
            error = np.interp(mean, rollouts, [r.mse_standard_error for r in points])
            records.append(Record(method, AS_OSLA, mean, float(mse), float(error)))
        return sorted(records, key=lambda r: (list(METHODS).index(r.method), r.mean_rollouts))


def _record(method: str, budget: str, errors: Errors) -> Record:
    mse = errors.squared / errors.groups
    spread = max(0.0, errors.fourth / errors.groups - mse**2)
    return Record(method, budget, errors.rollouts / errors.groups, mse, float(np.sqrt(spread / errors.groups)))


def rollouts_needed(records: Sequence[Record], method: str, mse: float) -> float | None:
    """Mean rollouts at which the method's error first falls to `mse`, interpolated between records. None if it never does."""
    before: Record | None = None
    for record in (r for r in records if r.method == method):
        if record.mse <= mse:
            if before is None or before.mse == record.mse:
                return record.mean_rollouts
            share = (before.mse - mse) / (before.mse - record.mse)
            return before.mean_rollouts + share * (record.mean_rollouts - before.mean_rollouts)
        before = record
    return None
