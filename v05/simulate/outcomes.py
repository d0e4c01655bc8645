"""Recorded outcomes: how often each model solved each question; and the population of success rates they come from."""

from __future__ import annotations

import csv
import json
from array import array
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import minimize
from scipy.special import betaln

COLUMNS = ("model", "question", "successes", "trials")
RUN_RESULT, RUN_CONFIG = "result.json", "config.json"  # of a run directory
LONGEST_FIELD = 1 << 24  # characters; questions may be given by their texts
LINES_BETWEEN_REPORTS = 50_000
MOST_HELD_OUT = 1 << 32  # prompts of a task
# Bounds of log a and log b: where all outcomes are equal the likelihood has no maximum inside.
LOG_PARAMETERS = (-7.0, 7.0)


@dataclass(frozen=True, eq=False)
class Outcomes:
    """C cells: a model's answers to a question. All arrays are (C,).

    Attributes:
        model, question: int64, numbered in order of first appearance.
        successes, trials: float64; trials are at least 1.
        priors: float64 in [0, 1], NaN where there is none; None unless they were asked for.
        left_out: rows without a trial, which say nothing.
    """

    model: NDArray[np.int64]
    question: NDArray[np.int64]
    successes: NDArray[np.float64]
    trials: NDArray[np.float64]
    priors: NDArray[np.float64] | None = None
    left_out: int = 0

    def __len__(self) -> int:
        return len(self.trials)


def read_outcomes(path: Path, prior: str | None = None, progress: Callable[[int], None] = lambda lines: None) -> Outcomes:
    """The outcomes in `path`: a CSV file, or a run directory, or a directory of runs.

    Args:
        path: a CSV file with the columns model, question, successes and trials, read as a stream; rows of one model and
            question are added up. Or a directory: then a model is a finished run and a question a held-out prompt of its task.
        prior: a column of the file with success rates predicted for the rows; empty is no prior.
        progress: called now and then with the lines read so far.

    Raises:
        ValueError: a column is missing, a value is no number (with its line) or impossible (with its row), nothing is left or
            no row has a prior, the file is no CSV; the directory holds no finished run, or one that is damaged.
    """
    if path.is_dir():
        if prior is not None:
            raise ValueError(f"{path} is a directory and has no column {prior!r}; use --prior irt or a noise level")
        return _read_runs(path)
    numbers: tuple[dict[str, int], dict[str, int]] = ({}, {})
    model, question = array("q"), array("q")
    successes, trials, priors = array("d"), array("d"), array("d")
    with path.open(newline="", encoding="utf-8-sig") as file:
        reader = _rows(path, file)
        _, header = next(reader, (0, []))
        wanted = (*COLUMNS, *([] if prior is None else [prior]))
        missing = [name for name in wanted if name not in header]
        if missing:
            raise ValueError(f"{path} has no column {', '.join(missing)}; it has {', '.join(header) or 'no header'}")
        places = [header.index(name) for name in wanted]
        for line, row in reader:
            if not row:
                continue
            try:
                cells = [row[place] for place in places]
                successes.append(float(cells[2]))
                trials.append(float(cells[3]))
                if prior is not None:
                    priors.append(float(cells[4]) if cells[4] else np.nan)
            except (IndexError, ValueError):
                raise ValueError(f"{path}, line {line}: {','.join(row)!r} lacks {', '.join(wanted[2:])} as numbers") from None
            model.append(numbers[0].setdefault(cells[0], len(numbers[0])))
            question.append(numbers[1].setdefault(cells[1], len(numbers[1])))
            if line % LINES_BETWEEN_REPORTS == 0:
                progress(line)
    return _cells(
        str(path),
        np.frombuffer(model, np.int64),
        np.frombuffer(question, np.int64),
        np.frombuffer(successes),
        np.frombuffer(trials),
        None if prior is None else np.frombuffer(priors),
    )


def _rows(path: Path, file: TextIO) -> Iterator[tuple[int, list[str]]]:
    """The rows of a CSV file, each with the number of its last line."""
    before = csv.field_size_limit(LONGEST_FIELD)
    reader = csv.reader(file)
    try:
        for row in reader:
            yield reader.line_num, row
    except (csv.Error, UnicodeDecodeError) as error:
        raise ValueError(f"{path}, near line {reader.line_num}: {error}; give a CSV file in UTF-8, quotes closed") from None
    finally:
        csv.field_size_limit(before)


def _cells(
    source: str,
    model: NDArray[np.int64],
    question: NDArray[np.int64],
    successes: NDArray[np.float64],
    trials: NDArray[np.float64],
    priors: NDArray[np.float64] | None,
) -> Outcomes:
    """Rows checked and added up by model and question."""
    whole = (np.floor(trials) == trials) & (np.floor(successes) == successes)
    bad = ~(whole & (trials >= 0) & (successes >= 0) & (successes <= trials) & np.isfinite(trials))
    if bad.any():
        row = int(np.flatnonzero(bad)[0])
        raise ValueError(
            f"{source}: row {row + 1} has successes={successes[row]:g}, trials={trials[row]:g} ({int(bad.sum())} such rows); "
            "give whole numbers with 0 <= successes <= trials"
        )
    if priors is not None and (outside := (priors < 0) | (priors > 1)).any():
        row = int(np.flatnonzero(outside)[0])
        raise ValueError(f"{source}: row {row + 1} has the prior {priors[row]:g}; give success rates in [0, 1], or nothing")
    tried = trials > 0
    if not tried.any():
        raise ValueError(f"{source} has no row with trials > 0 ({len(trials)} rows); there is nothing to replay")
    if priors is not None and np.isnan(priors[tried]).all():
        raise ValueError(f"{source} has no prior in any row with trials > 0; fill the column, or use --prior irt or a noise level")
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
    )


def _read_runs(directory: Path) -> Outcomes:
    """Held-out successes of the finished runs in `directory`, or of the one it is."""
    files = [directory / RUN_RESULT] if (directory / RUN_RESULT).exists() else sorted(directory.glob(f"*/{RUN_RESULT}"))
    if not files:
        raise ValueError(f"{directory} holds no finished run: there is no {RUN_RESULT} in it or one level below; let a run finish")
    first: dict[str, int] = {}  # task -> number of its first question: runs of one task were held out the same prompts
    questions, successes, trials = [], [], []
    for file in files:
        result, config = _json(file), _json(file.with_name(RUN_CONFIG))
        missing = [key for key in ("heldout_successes", "heldout_samples") if not result.get(key)]
        if missing:
            raise ValueError(f"{file} has no {', '.join(missing)}: successes on each held-out prompt are needed")
        solved = result["heldout_successes"]
        start = first.setdefault(json.dumps(config.get("task"), sort_keys=True), MOST_HELD_OUT * len(first))
        questions.append(start + np.arange(len(solved)))
        successes.append(np.asarray(solved, dtype=np.float64))
        trials.append(np.full(len(solved), float(result["heldout_samples"])))
    return _cells(
        str(directory),
        np.repeat(np.arange(len(files)), [len(solved) for solved in successes]),
        np.unique(np.concatenate(questions), return_inverse=True)[1],
        np.concatenate(successes),
        np.concatenate(trials),
        None,
    )


def _json(file: Path) -> dict[str, Any]:
    """The object in a file of a run."""
    try:
        value = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"{file} cannot be read ({error}); the run is damaged, leave its directory out") from None
    if not isinstance(value, dict):
        raise ValueError(f"{file} holds no JSON object; the run is damaged, leave its directory out")
    return value


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
