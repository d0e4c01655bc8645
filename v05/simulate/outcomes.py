"""Recorded outcomes (how often each model solved each question), and the distribution of the success rates behind them."""

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

# Bounds of log a and log b, because the likelihood has no finite maximum if all outcomes are equal.
LOG_PARAMETERS = (-7.0, 7.0)


@dataclass(frozen=True, eq=False)
class Outcomes:
    """C cells. A cell is a model's answers to a question. All arrays are (C,).

    Attributes:
        model, question: int64 indices in order of first appearance.
        successes, trials: float64 counts. Trials are at least 1.
        priors: float64 in [0, 1], NaN for a cell without a prior. None if no column of priors was named.
        left_out: the number of rows left out because they have no trial, or no reward in a log of rollouts.
        source: the kind of log.
        remarks: sentences on files and rows that were left out.
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
    """Read outcomes from logs or runs, and sum up the rows of each model and question.

    Args:
        path: a log of a kind in `v05.simulate.logs`, a directory of logs of one kind, a run directory of `v05 train`, or a
            directory of runs. A run counts as one model, its last policy; the questions are the held-out prompts of its task.
        prior: a column of the log with predicted success rates. An empty value means no prior.
        progress: called from time to time with the number of rows read so far.
        reward: the column of rewards in a log of rollouts. None means the usual column of the log's kind.
        success_above: a reward above this is a success. None requires rewards of 0 and 1, or of -1 and 1.

    Raises:
        ValueError: a file is of no known kind; a value is not a number or impossible (the message names the line); rewards have
            more than two values; no row has a trial or a prior; a directory holds neither logs nor a finished run, or a damaged
            run.
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
    """Pass the rows of the logs in `path` to `tally`. Returns the kind of the logs, and remarks on files that were left out."""
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
        "which are not logs of rollouts": list(unknown),
        "which repeat the batch of the step before": tally.repeated,
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
    """The outcomes of R rows, summed up by model and question. The arrays are (R,)."""
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
    """(a, b) of the Beta distribution of success rates that maximises the marginal likelihood of all cells' outcomes."""
    pairs, repeats = np.unique(np.stack([outcomes.successes, outcomes.trials]), axis=1, return_counts=True)
    s, n = pairs

    def negative_log_likelihood(theta: NDArray[np.float64]) -> float:
        a, b = np.exp(theta)
        return float(-(repeats @ (betaln(s + a, n - s + b) - betaln(a, b))) / repeats.sum())

    found = minimize(negative_log_likelihood, np.zeros(2), method="L-BFGS-B", bounds=[LOG_PARAMETERS] * 2)
    a, b = np.exp(found.x)
    return float(a), float(b)
