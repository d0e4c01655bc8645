"""Recorded outcomes: how often each model solved each question; and the population of success rates they come from."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import minimize
from scipy.special import betaln

from v05.simulate.logs import KNOWN, Log, LogFile, log_files, log_of, unknown_log
from v05.simulate.runs import RUN_RESULT, evaluations, finished_runs, read_runs
from v05.simulate.tables import SUFFIXES, column, read_rows
from v05.simulate.tally import Tally

# Bounds of log a and log b: where all outcomes are equal the likelihood has no maximum inside.
LOG_PARAMETERS = (-7.0, 7.0)


@dataclass(frozen=True, eq=False)
class Outcomes:
    """C cells: a model's answers to a question. All arrays are (C,).

    Attributes:
        model, question: int64, numbered in order of first appearance.
        successes, trials: float64; trials are at least 1.
        priors: float64 in [0, 1], NaN where there is none; None unless they were asked for.
        left_out: rows without a trial, which say nothing; in a log of rollouts, those without a reward.
        source: what kind of log was read.
        remarks: what was left out, and why.
    """

    model: NDArray[np.int64]
    question: NDArray[np.int64]
    successes: NDArray[np.float64]
    trials: NDArray[np.float64]
    priors: NDArray[np.float64] | None = None
    left_out: int = 0
    source: str = "counts"
    remarks: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.trials)


def read_outcomes(
    path: Path,
    prior: str | None = None,
    progress: Callable[[int], None] = lambda rows: None,
    *,
    reward: str | None = None,
    success_above: float | None = None,
) -> Outcomes:
    """The outcomes in `path`, with rows of one model and question added up: a log of a kind in `v05.simulate.logs`, or a directory
    of logs of one kind, read as a stream; or a run directory of `v05 train`, or a directory of runs.

    Args:
        path: of a run, the model is its last policy, and the questions are the held-out prompts of its task.
        prior: a column of the log with success rates predicted for the rows; empty is no prior.
        progress: called now and then with the rows read so far.
        reward: the column of rewards in a log of rollouts; left out, the usual one of its kind.
        success_above: a greater reward is a success; left out, rewards must be 0 or 1, or else -1 or 1.

    Raises:
        ValueError: a file is of no known kind; a value is no number or impossible (with its line); rewards have more values than
            two; nothing is left, or no row has a prior; a directory holds neither logs nor a finished run, or a damaged run.
        ImportError: a file is parquet, and pyarrow is not installed.
    """
    if path.name == RUN_RESULT:
        path = path.parent
    if path.is_dir() and (runs := finished_runs(path)):
        if prior is not None:
            raise ValueError(f"{path} is a directory and has no column {prior!r}; use --prior irt or a noise level")
        if reward is not None or success_above is not None:
            raise ValueError(f"{path} holds runs of v05; --reward and --success-above belong to logs of rollouts, leave them out")
        remarks = [f"{len(others)} folders of v05 eval left out; name one to replay it"] if (others := evaluations(path)) else []
        return replace(_cells(str(path), "held-out prompts of v05 train", *read_runs(runs), None), remarks=tuple(remarks))
    tally = Tally(prior and column(prior), reward and column(reward), success_above, progress)
    log, remarks = _read_logs(path, tally)
    cells = _cells(str(path), log.name, *tally.arrays)
    if cells.left_out:
        remarks.append(f"{cells.left_out} rows without a {'reward' if log.rewards else 'trial'} left out")
    return replace(cells, remarks=tuple(remarks))


def _read_logs(path: Path, tally: Tally) -> tuple[Log, list[str]]:
    """Give the rows of the logs in `path` to `tally`. Returns the kind of the logs, and remarks on files that were left out."""
    files, repeating = log_files(path) if path.is_dir() else ([path], [])
    kinds: dict[Log, Path] = {}
    unknown: dict[Path, str] = {}
    for file in files:
        rows = read_rows(file, KNOWN)
        columns = [name for header in islice(rows, 1) for name in header.values]
        log = log_of(columns)
        if log is None:
            unknown[file] = unknown_log(file, columns)
            continue
        kinds.setdefault(log, file)
        if len(kinds) > 1:
            different = " and ".join(f"{log.name} ({file})" for log, file in kinds.items())
            raise ValueError(f"{path} holds {different}; give a file or a folder with logs of one kind")
        tally.read(log, LogFile(file, path), columns, rows)
    if not kinds and path.is_dir():
        logs = next(iter(unknown.values()), f"there is no file with the ending {', '.join(SUFFIXES)}")
        raise ValueError(
            f"{path} holds no finished run: there is no {RUN_RESULT} in it or one level below; let a run finish. "
            f"It holds no log of rollouts either: {logs}"
        )
    if not kinds:
        raise ValueError(unknown[path])
    left_out = {
        "which repeat other files or hold evaluations beside training": repeating,
        "which are no logs of rollouts": list(unknown),
        "which log the batch of the step before again": tally.repeated,
    }
    return next(iter(kinds)), [
        f"{len(those)} files left out, {why} ({those[0].relative_to(path)}{', ...' if len(those) > 1 else ''})"
        for why, those in left_out.items()
        if those
    ]


def _cells(
    place: str,
    source: str,
    model: NDArray[np.int64],
    question: NDArray[np.int64],
    successes: NDArray[np.float64],
    trials: NDArray[np.float64],
    priors: NDArray[np.float64] | None,
) -> Outcomes:
    """Rows added up by model and question."""
    tried = trials > 0
    if not tried.any():
        raise ValueError(f"{place} has no row with trials > 0 ({len(trials)} rows); there is nothing to replay")
    if priors is not None and np.isnan(priors[tried]).all():
        raise ValueError(f"{place} has no prior in any row with trials > 0; fill the column, or use --prior irt or a noise level")
    width = int(question.max()) + 1
    keys, cell = np.unique((model * width + question)[tried], return_inverse=True)

    def total(values: NDArray[np.float64]) -> NDArray[np.float64]:
        return np.bincount(cell, values[tried], minlength=len(keys)).astype(np.float64)

    return Outcomes(
        model=keys // width,
        question=keys % width,
        successes=total(successes),
        trials=total(trials),
        priors=None if priors is None else total(priors) / np.bincount(cell, minlength=len(keys)),
        left_out=int((~tried).sum()),
        source=source,
    )


def fit_population(outcomes: Outcomes) -> tuple[float, float]:
    """(a, b) of the Beta that the success rates of all cells make likeliest: s of n given p ~ Beta(a, b), p integrated out."""
    pairs, repeats = np.unique(np.stack([outcomes.successes, outcomes.trials]), axis=1, return_counts=True)
    s, n = pairs

    def negative_log_likelihood(theta: NDArray[np.float64]) -> float:
        a, b = np.exp(theta)
        return float(-(repeats @ (betaln(s + a, n - s + b) - betaln(a, b))) / repeats.sum())

    found = minimize(negative_log_likelihood, np.zeros(2), method="L-BFGS-B", bounds=[LOG_PARAMETERS] * 2)
    a, b = np.exp(found.x)
    return float(a), float(b)
