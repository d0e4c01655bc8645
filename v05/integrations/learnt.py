"""What priors and calibrators have learnt, in a file: in a host's checkpoint, or, where a host has no door for that, beside it."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from safetensors import SafetensorError, safe_open
from safetensors.numpy import load_file, save_file

from v05.files import explained, replacing
from v05.prior import ValuePrior

if TYPE_CHECKING:
    from v05.prior.calibration import Calibrator

    Learners = Mapping[str, ValuePrior | Calibrator]  # by the name that the file has for them

logger = logging.getLogger(__name__)
OF_CLASS = "class of "  # with a learner's name, in the file's metadata: what it was


def keep_learnt(path: Path, learners: Learners) -> None:
    """Write what learners have learnt. A file that is there is replaced whole, or stays.

    Raises OSError where it cannot be written.
    """
    arrays = {f"{name}.{key}": value for name, part in learners.items() for key, value in part.state_dict().items()}
    with explained(path, "the run goes on from its last checkpoint"), replacing(path) as scratch:
        save_file(arrays, scratch, {OF_CLASS + name: type(part).__qualname__ for name, part in learners.items()})


def restore_learnt(path: Path, learners: Learners) -> None:
    """Have learners go on from what the file has of them; where there is none, nothing happens.

    Raises ValueError where it is another file, or one of them was another when it was written. Nothing is restored then.
    """
    if not path.exists():
        return
    try:
        with safe_open(path, framework="numpy") as file:
            classes = file.metadata() or {}
        arrays = load_file(path)
    except (OSError, SafetensorError) as error:
        raise ValueError(f"{path} cannot be read ({error}); delete it, or give another path") from error
    known = {name: classes[OF_CLASS + name] for name in learners if OF_CLASS + name in classes}
    if not known:
        raise ValueError(f"{path} is no file of what a prior has learnt; give another path")
    for name, was in known.items():
        now = type(learners[name]).__qualname__
        if was != now:
            raise ValueError(
                f"{path} holds what a {was} learnt, and this run's {name} is a {now}; give another path, or set the prior that it "
                "is of before the settings"
            )
    before = {name: learners[name].state_dict() for name in known}
    for name in known:
        state = {key.removeprefix(f"{name}."): value for key, value in arrays.items() if key.startswith(f"{name}.")}
        try:
            learners[name].load_state_dict(state)
        except (ValueError, KeyError, TypeError, IndexError) as error:
            for restored in known:
                learners[restored].load_state_dict(before[restored])
            raise ValueError(f"{path} is damaged: of what the {name} learnt, {error}; delete it, or give another path") from error


class LearntFile:
    """A run's file, which its learners go on from and are kept in batch after batch.

    Raises ValueError as `restore_learnt` does, and OSError where it cannot be written: now, not after the first batch.
    """

    def __init__(self, path: Path, learners: Learners) -> None:
        self.path = path
        self._learners = learners
        found = path.exists()
        restore_learnt(path, learners)
        keep_learnt(path, learners)
        logger.info("what the prior learns is kept in %s, %s", path, "from which it goes on" if found else "a new file")

    def keep(self) -> None:
        """Replace the file. One that cannot be written is no reason to end a run: it is logged, and the next may be."""
        try:
            keep_learnt(self.path, self._learners)
        except OSError as error:
            logger.warning("what the prior learnt of this batch is not kept in %s: %s", self.path, error.__cause__)
