"""Checks the rows of logs and keeps a few numbers of each, however long their texts are."""

from __future__ import annotations

from array import array
from collections.abc import Callable, Iterator
from hashlib import blake2b
from math import isinf, nan
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from v05.simulate.logs import NO_REWARDS, TRL, Log, LogFile, Outcome, columns_of_numbers
from v05.simulate.tables import NotANumberError, Row, listed, number

ROWS_BETWEEN_REPORTS = 10_000
LONGEST_KEY = 64  # characters; longer texts of models and questions are replaced by their hashes
MOST_VALUES = 5  # different rewards that a message names
REPEATED_BATCH = 32  # rows; smaller batches may be equal by chance


class Tally:
    """Collects the outcomes of logs row by row.

    Args:
        prior, reward: columns, as in `read_outcomes`.
        success_above: a reward above this is a success.
        progress: called from time to time with the number of rows read so far.
    """

    def __init__(self, prior: str | None, reward: str | None, success_above: float | None, progress: Callable[[int], None]) -> None:
        self._prior, self._reward, self._success_above, self._progress = prior, reward, success_above, progress
        self._numbers: tuple[dict[str, int], dict[str, int]] = ({}, {})  # indices of models and of questions
        self._model, self._question = array("q"), array("q")
        self._successes, self._trials, self._priors = array("d"), array("d"), array("d")
        self._rewards: dict[float, str] = {}  # the first different rewards and their places
        self._other_numbers: list[str] = []  # columns to suggest for --reward
        self._kind: Log | None = None  # kind of the last file
        self._rows = 0
        self._batch = b""  # hash of the last file's texts
        self.repeated: list[Path] = []  # files that repeat the file before

    def read(self, log: Log, file: LogFile, columns: list[str], rows: Iterator[Row]) -> None:
        """Add a file's rows.

        Raises:
            ValueError: a column is missing, or a row lacks a number or has an impossible one; the message names its place.
        """
        if self._prior is not None and self._prior not in columns:
            raise ValueError(f"{file.path} has no column {self._prior}; it has {listed(columns)}")
        if not log.rewards and (self._reward is not None or self._success_above is not None):
            raise ValueError(f"{file.path} holds {log.name}; --reward and --success-above are for logs of rollouts, leave them out")
        self._kind = log
        start = len(self._trials)
        texts = blake2b()
        for index, row in enumerate(rows, start=1):
            lacking = [name for name in log.columns if name not in row.values and name not in log.numbers]
            if lacking:
                raise ValueError(f"{row.place}: {row.quote!r} lacks {', '.join(lacking)}; repair the file or leave it out")
            try:
                for outcome in log.outcomes(row, file, self._reward):
                    self._add(log, row, index, outcome)
            except (NotANumberError, LookupError, TypeError, AttributeError):
                needed = [name for name in (self._reward, *log.numbers, self._prior) if name] or log.columns
                form = "numbers" if log.numbers else f"in {log.name}"
                raise ValueError(
                    f"{row.place}: {row.quote!r} lacks {', '.join(needed)} as {form}; repair the file or leave it out"
                ) from None
            if log.name == TRL:
                texts.update(f"{row.values['prompt']}\0{row.values['completion']}\0".encode(errors="surrogatepass"))
            if self._rows == 0:
                self._other_numbers = columns_of_numbers(row, {*NO_REWARDS, *log.columns, *log.numbers, self._reward or ""})
            self._rows += 1
            if self._rows % ROWS_BETWEEN_REPORTS == 0:
                self._progress(self._rows)
        # TRL logs its last batch again at each step that reuses it (num_iterations or steps_per_generation above 1).
        if log.name == TRL and len(self._trials) - start >= REPEATED_BATCH and texts.digest() == self._batch:
            for values in (self._model, self._question, self._successes, self._trials, self._priors):
                del values[start:]
            self.repeated.append(file.path)
        self._batch = texts.digest()

    def _add(self, log: Log, row: Row, index: int, outcome: Outcome) -> None:
        successes, trials = outcome.successes, outcome.trials
        if not log.rewards:
            possible = 0 <= successes <= trials and not isinf(trials) and successes == int(successes) and trials == int(trials)
            if not possible:
                raise ValueError(
                    f"{row.place}: row {index} has successes={successes:g}, trials={trials:g} "
                    "instead of whole numbers with 0 <= successes <= trials"
                )
        elif trials and self._success_above is not None:
            successes = float(successes > self._success_above)
        elif trials and successes not in self._rewards and len(self._rewards) < MOST_VALUES:
            self._rewards[successes] = row.place
        if self._prior is not None:
            value = row.values.get(self._prior)
            prior = nan if value in (None, "") else number(value)
            if prior < 0 or prior > 1:
                raise ValueError(
                    f"{row.place}: row {index} has the prior {prior:g}; give success rates in [0, 1], or leave it empty"
                )
            self._priors.append(prior)
        for values, numbered, text in zip((self._model, self._question), self._numbers, outcome[:2], strict=True):
            key = text if len(text) <= LONGEST_KEY else blake2b(text.encode(errors="surrogatepass"), digest_size=16).hexdigest()
            values.append(numbered.setdefault(key, len(numbered)))
        self._successes.append(successes)
        self._trials.append(trials)

    @property
    def arrays(
        self,
    ) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.float64], NDArray[np.float64], NDArray[np.float64] | None]:
        """(R,) model, question, successes, trials, and priors (None unless a column was named).

        Raises ValueError if no row has a reward, or if rewards have more than two values and `success_above` was not given.
        """
        successes, trials = np.frombuffer(self._successes), np.frombuffer(self._trials)
        seen = set(self._rewards)
        others = f"; or choose another column with --reward: {listed(self._other_numbers)}" if self._other_numbers else ""
        if self._kind is not None and self._kind.rewards and len(trials) and not trials.any():
            raise ValueError(
                f"none of the {len(trials)} rows has a reward{f' in the column {self._reward}' if self._reward else ''}; "
                f"fill the column{others}"
            )
        if seen <= {-1.0, 1.0} and -1.0 in seen:
            successes = np.where(trials > 0, (successes + 1) / 2, 0.0)
        elif not seen <= {0.0, 1.0}:
            place = next(place for value, place in self._rewards.items() if value not in (0.0, 1.0))
            values = ", ".join(f"{value:g}" for value in sorted(seen)) + (", ..." if len(seen) == MOST_VALUES else "")
            raise ValueError(
                f"{place}: rewards are {values}, but only 0 and 1 (or -1 and 1) show which rollouts succeeded; "
                f"give --success-above X to count rewards above X as successes{others}"
            )
        priors = None if self._prior is None else np.frombuffer(self._priors)
        return np.frombuffer(self._model, np.int64), np.frombuffer(self._question, np.int64), successes, trials, priors
