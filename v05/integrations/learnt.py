"""Saves the state of priors and calibrators to a file, in a host's checkpoint or, for hosts without a hook for that, beside it."""

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

    Learners = Mapping[str, ValuePrior | Calibrator]  # by their names in the file

logger = logging.getLogger(__name__)
OF_CLASS = "class of "  # prefix of a learner's name in the file's metadata; the value is the name of its class


def keep_learnt(path: Path, learners: Learners) -> None:
    """Write the states of the learners to a file. An existing file is replaced atomically.

    Raises OSError if the file cannot be written.
    """
    arrays = {f"{name}.{key}": value for name, part in learners.items() for key, value in part.state_dict().items()}
    with explained(path, "the run resumes from its last checkpoint"), replacing(path) as scratch:
        save_file(arrays, scratch, {OF_CLASS + name: type(part).__qualname__ for name, part in learners.items()})


def restore_learnt(path: Path, learners: Learners) -> None:
    """Load the states of the learners from a file. A missing file changes nothing.

    Raises ValueError if the file is damaged or of another kind, or if a learner had another class when it was written. Nothing is
    restored then.
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
        raise ValueError(f"{path} does not hold the state of a prior; give another path")
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
    """The file of a run's learners. They resume from it at the start, and it is replaced after every batch.

    The file is also written at the start, so that an unwritable path raises OSError then and not after the first batch. Raises
    ValueError as `restore_learnt` does.
    """

    def __init__(self, path: Path, learners: Learners) -> None:
        self.path = path
        self._learners = learners
        found = path.exists()
        restore_learnt(path, learners)
        keep_learnt(path, learners)
        logger.info("what the prior learns is kept in %s, %s", path, "from which it resumes" if found else "a new file")

    def keep(self) -> None:
        """Replace the file. A failure is logged and does not end the run; the next batch tries again."""
        try:
            keep_learnt(self.path, self._learners)
        except OSError as error:
            logger.warning("what the prior learnt of this batch is not kept in %s: %s", self.path, error.__cause__)
