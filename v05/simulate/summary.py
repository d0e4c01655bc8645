"""The output of a simulation: a table of errors, a description of the data, and a conclusion."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
from rich.table import Table

from v05.simulate.outcomes import Outcomes
from v05.simulate.replay import METHODS, REFERENCE, Record, rollouts_needed

SMALLEST_SAVING = 0.1  # rollouts a prompt


def table(records: Sequence[Record], initial: int, maximum: int) -> Table:
    """Each method's error at the fewest, v05+osla's and the most mean rollouts, and its rollouts for the target's error."""

    def of(method: str, rollouts: float) -> Record | None:
        return next((r for r in records if r.method == method and abs(r.mean_rollouts - rollouts) < 1e-9), None)

    osla = next(r for r in records if r.method == "v05+osla").mean_rollouts
    points = (float(initial), osla, float(maximum))
    target = _target(records, initial, maximum)
    drawn = Table(title="mean squared error of the baseline (centred units) by mean rollouts per prompt")
    needed_for = f"rollouts to match grpo at {target.mean_rollouts:.0f}"
    for column in ("method", *(f"at {mean:.4g}" for mean in points), needed_for):
        drawn.add_column(column, justify="left" if column == "method" else "right", no_wrap=True)
    for method in METHODS:
        found = (of(method, mean) for mean in points)
        needed = rollouts_needed(records, method, target.mse)
        drawn.add_row(
            method,
            *("" if r is None else f"{r.mse:.4f} ± {r.mse_standard_error:.4f}" for r in found),
            "not reached" if needed is None else f"≤ {needed:.1f}" if needed == _fewest(records, method) else f"{needed:.1f}",
        )
    return drawn


def what_was_read(outcomes: Outcomes, prior: str) -> Iterator[str]:
    """Sentences on the outcomes: how many were read, which rows were left out, and what cannot be estimated from them."""
    models, questions = len(np.unique(outcomes.model)), len(np.unique(outcomes.question))
    trials = f"{outcomes.trials.sum():,.0f} rollouts in {len(outcomes):,} groups"
    yield f"read {outcomes.source}: {trials}, of {models:,} models or steps and {questions:,} prompts"
    yield from outcomes.remarks
    if outcomes.trials.max() == 1:
        yield "no group has two rollouts, so the spread of success rates cannot be estimated: the figures rest on a guess"
    if prior == "irt" and len(outcomes) == questions > 1:
        yield "no prompt is in two groups, so the prior cannot tell prompts apart and is the mean of each model or step"


def conclusion(records: Sequence[Record], initial: int, maximum: int) -> str:
    """A sentence on which method reaches the error of the group's mean with the fewest rollouts."""
    target = _target(records, initial, maximum)
    size = target.mean_rollouts
    needed = [(rollouts_needed(records, method, target.mse), method) for method in METHODS if method != target.method]
    rollouts, method = min(((rollouts, method) for rollouts, method in needed if rollouts is not None), default=(size, ""))
    if rollouts > size - SMALLEST_SAVING:
        return (
            f"On these logs, no method has the baseline error that the mean (grpo) has at {size:.0f} with fewer rollouts a prompt."
        )
    at = f"{rollouts:.1f} rollouts a prompt{' or fewer' if rollouts == _fewest(records, method) else ''}"
    return f"On these logs, {method} at {at} has the baseline error that the mean (grpo) has at {size:.0f}."


def _target(records: Sequence[Record], initial: int, maximum: int) -> Record:
    """The record of grpo at the group size whose error the other methods have to reach."""
    size = max(initial, min(REFERENCE, maximum))
    return next(r for r in records if r.method == "grpo" and abs(r.mean_rollouts - size) < 1e-9)


def _fewest(records: Sequence[Record], method: str) -> float:
    """The fewest mean rollouts at which the method was measured."""
    return min(r.mean_rollouts for r in records if r.method == method)
