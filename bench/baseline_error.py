"""Measures the error of baselines at equal rollouts: `python bench/baseline_error.py OUTCOMES.csv HISTORY.jsonl`.

Replays real outcomes (as `v05 simulate OUTCOMES.csv` does: cross-fitted item-response prior, superpopulation) and the five regimes
of bench/regimes.py under every method and budget, with 4 to 16 rollouts and cost 1/256. Then times a warm fit of the calibrator.
Writes bench/results/baseline_error.csv and prints the cases in which calibrated fusion is worse than the methods in RIVALS.
"""

from __future__ import annotations

import argparse
import csv
import time
from collections.abc import Callable, Iterator
from dataclasses import astuple, replace
from pathlib import Path

import numpy as np
from machine import commit, processor, versions
from regimes import REGIMES, draw_from, read_successes
from rich.progress import track

from v05.prior.calibration import Calibrator
from v05.simulate.item_response import cross_fitted
from v05.simulate.outcomes import read_outcomes
from v05.simulate.replay import AS_OSLA, MEASURED, WARM_UP, Groups, Record, Replay, Source

RESULTS = Path(__file__).parent / "results" / "baseline_error.csv"
FIELDS = ("case", "method", "budget", "mean_rollouts", "mse", "mse_standard_error", "device", "commit", "versions")
INITIAL, MAXIMUM = 4, 16
SEED = 0
# The methods that calibrated fusion must not be worse than, at the same mean rollouts.
RIVALS = {"calibrated": ("grpo", "v05"), "calibrated+budget": ("grpo", "v05", "v05+osla", "mean+budget")}


def replayed(case: str, draw: Callable[[int], Groups]) -> list[Record]:
    simulation = Replay(draw, INITIAL, MAXIMUM, None)
    for _ in track(range(WARM_UP + MEASURED), case):
        simulation.step()
    return simulation.records


def cases(outcomes: Path, history: Path) -> Iterator[tuple[str, list[Record]]]:
    rng = np.random.default_rng(SEED)
    read = read_outcomes(outcomes)
    read = replace(read, priors=cross_fitted(read, rng))
    yield outcomes.stem, replayed(outcomes.stem, Source(read, None, "superpopulation", MAXIMUM, rng).draw)
    successes = read_successes(history)
    for regime in REGIMES:
        yield regime, replayed(regime, draw_from(successes, regime, MAXIMUM, np.random.default_rng(SEED)))


def verdicts(case: str, records: list[Record]) -> Iterator[str]:
    """Error ratios at v05+osla's mean rollouts, and all budgets at which calibrated fusion is worse by over two standard errors."""
    at = {r.method: r for r in records if r.budget == AS_OSLA or r.method == "v05+osla"}
    ours = at["calibrated+budget"]
    ratios = ", ".join(f"{ours.mse / at[name].mse:.3f} x {name}" for name in RIVALS["calibrated+budget"])
    yield f"{case}: calibrated+budget at {ours.mean_rollouts:.2f} rollouts {ours.mse:.4f} = {ratios}"
    for method, rivals in RIVALS.items():
        for r in (r for r in records if r.method == method):
            for other in (o for o in records if o.method in rivals and abs(o.mean_rollouts - r.mean_rollouts) < 1e-9):
                error = (r.mse_standard_error**2 + other.mse_standard_error**2) ** 0.5
                if r.mse > other.mse + 2 * error:
                    yield f"  WORSE: {method} {r.mse:.4f}, {other.method} {other.mse:.4f} at {r.mean_rollouts:.2f} rollouts"


def fit_milliseconds(draw: Callable[[int], Groups], repeats: int = 20) -> float:
    """Median milliseconds of a warm fit to a full window that has 128 new groups."""
    calibrator = Calibrator()
    seconds = []
    for repeat in range(repeats + 1):
        groups = draw(4096 if repeat == 0 else 128)
        calibrator.observe(groups.rewards.sum(axis=1), np.full(len(groups.rates), MAXIMUM), groups.priors)
        started = time.process_time()
        calibrator.fit()
        seconds.append(time.process_time() - started)
    return 1e3 * float(np.median(seconds[1:]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("outcomes", type=Path, help="columns model, question, successes, trials")
    parser.add_argument("history", type=Path, help="policy history, JSON lines")
    arguments = parser.parse_args()
    about = (processor(), commit(), versions("numpy", "scipy"))
    RESULTS.parent.mkdir(exist_ok=True)
    with RESULTS.open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(FIELDS)
        for case, records in cases(arguments.outcomes, arguments.history):
            writer.writerows((case, *astuple(record), *about) for record in records)
            print(*verdicts(case, records), sep="\n", flush=True)
    draw = draw_from(read_successes(arguments.history), "fair prior", MAXIMUM, np.random.default_rng(SEED))
    print(f"a warm fit of the calibrator to 4096 groups: {fit_milliseconds(draw):.1f} ms of CPU time")


if __name__ == "__main__":
    main()
