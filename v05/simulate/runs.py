"""Reads the outcomes of finished `v05 train` runs on their held-out prompts."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from v05.files import read_object
from v05.simulate.logs import EVAL_SAMPLES
from v05.train.identity import with_contents
from v05.train.metrics import read_inputs

RUN_RESULT, RUN_CONFIG = "result.json", "config.json"
EVAL_OUTCOMES = "outcomes.jsonl"  # a folder of v05 eval has this file and a result.json; a run has only a result.json
MOST_HELD_OUT = 1 << 32  # bound on the held-out prompts of a task and on the samples of a prompt


def finished_runs(directory: Path) -> list[Path]:
    """The result files of the runs in `directory`, or of the run that `directory` is."""
    files = [directory / RUN_RESULT] if (directory / RUN_RESULT).exists() else sorted(directory.glob(f"*/{RUN_RESULT}"))
    return [file for file in files if not _is_evaluation(file.parent)]


def evaluations(directory: Path) -> list[Path]:
    """The folders of v05 eval in `directory`."""
    return [folder for folder in sorted(directory.glob("*/")) if _is_evaluation(folder)]


def _is_evaluation(folder: Path) -> bool:
    return any((folder / name).is_file() for name in (EVAL_SAMPLES, EVAL_OUTCOMES))


def read_runs(results: list[Path]) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.float64], NDArray[np.float64]]:
    """(C,) model, question, successes and trials. A model is a run, and a question is a held-out prompt of the run's task.

    Raises ValueError for a damaged file, and names it.
    """
    # Index of each task's first question, by the task and its file's content. Runs of one task have the same held-out prompts.
    first: dict[str, int] = {}
    questions, successes, trials = [], [], []
    for file in results:
        result, config = _object(file), _object(file.with_name(RUN_CONFIG))
        missing = [key for key in ("heldout_successes", "heldout_samples") if not result.get(key)]
        if missing:
            raise ValueError(f"{file} has no {', '.join(missing)}; a replay needs the successes on each held-out prompt")
        solved, samples = result["heldout_successes"], result["heldout_samples"]
        if not (_whole(samples) and isinstance(solved, list) and all(_whole(count) and count <= samples for count in solved)):
            raise ValueError(
                f"{file}: heldout_successes is not a list of whole numbers from 0 to heldout_samples={samples!r}; "
                "the run is damaged, leave its directory out"
            )
        task = with_contents(config, read_inputs(file.parent)).get("task")
        start = first.setdefault(json.dumps(task, sort_keys=True), MOST_HELD_OUT * len(first))
        questions.append(start + np.arange(len(solved)))
        successes.append(np.asarray(solved, dtype=np.float64))
        trials.append(np.full(len(solved), float(samples)))
    return (
        np.repeat(np.arange(len(results)), [len(solved) for solved in successes]),
        np.unique(np.concatenate(questions), return_inverse=True)[1],
        np.concatenate(successes),
        np.concatenate(trials),
    )


def _whole(value: Any) -> bool:
    return isinstance(value, int | float) and 0 <= value < MOST_HELD_OUT and value == int(value)


def _object(file: Path) -> dict[str, Any]:
    try:
        return read_object(file)
    except (OSError, ValueError) as error:
        raise ValueError(f"{file} cannot be read ({error}); the run is damaged, leave its directory out") from None
