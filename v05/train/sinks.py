"""Sinks for a run's metrics besides metrics.jsonl: TensorBoard always, Weights & Biases on request.

Both plot every number over training rollouts, which are comparable between methods. A number's name is its record's kind and its
own name, such as "step/accuracy", "evaluation/accuracy" or "probe/baseline_mse". Lists are only in metrics.jsonl.
"""

from __future__ import annotations

import importlib
import math
import signal
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any, Protocol

from v05.files import read_text
from v05.train.config import RunConfig
from v05.train.presets import label_of

if TYPE_CHECKING:
    from torch.utils.tensorboard.writer import SummaryWriter

TENSORBOARD, WANDB_ID = "tensorboard", "wandb_id"


class Sink(Protocol):
    """Receives the metrics of a run, in one process."""

    def start(self, rollouts: int) -> None:
        """Begin a run, or resume it after `rollouts`: later metrics will be shown again, and must not appear twice."""
        ...

    def show(self, figures: Mapping[str, float], rollouts: int) -> None:
        """Show the metrics `figures` of the run after `rollouts`."""
        ...

    def flush(self) -> None:
        """Write all metrics to the disk, because a checkpoint follows."""
        ...

    def close(self) -> None: ...


@contextmanager
def interrupted_later() -> Iterator[None]:
    """Delay the effect of Ctrl-C to the end of the block.

    TensorBoard passes metrics to a thread through a queue. An exception while the queue holds a lock can lose the thread's wake-up
    or leave the lock taken, and closing would then wait forever.
    """
    handler = signal.getsignal(signal.SIGINT)
    # The handler is not Python's, or this thread never gets the signal.
    if handler is None or threading.current_thread() is not threading.main_thread():
        yield
        return
    came = False

    def remember(*_: object) -> None:
        nonlocal came
        came = True

    signal.signal(signal.SIGINT, remember)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, handler)
        if came:
            signal.raise_signal(signal.SIGINT)


def figures_of(kind: str, values: Mapping[str, Any]) -> dict[str, float]:
    """The finite numbers of a record as "kind/name", without rollouts and step, which are the horizontal axis."""
    return {
        f"{kind}/{name}": float(value)
        for name, value in values.items()
        if isinstance(value, int | float) and math.isfinite(value) and name not in ("rollouts", "step")
    }


class TensorBoard:
    """Writes event files to `directory`/tensorboard, one per start. Each tells TensorBoard to drop the metrics that will be
    repeated."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory / TENSORBOARD
        self._writer: SummaryWriter | None = None

    def start(self, rollouts: int) -> None:
        # Imported here, so that the trainer's functions also work without TensorBoard.
        from torch.utils.tensorboard.writer import SummaryWriter

        with interrupted_later():
            self._writer = SummaryWriter(str(self._directory), purge_step=rollouts + 1 if rollouts else 0)

    def show(self, figures: Mapping[str, float], rollouts: int) -> None:
        assert self._writer is not None
        for name, value in figures.items():
            self._writer.add_scalar(name, value, rollouts)

    def flush(self) -> None:
        assert self._writer is not None
        self._writer.flush()

    def close(self) -> None:
        if self._writer is not None:
            self._writer.close()


class WeightsAndBiases:
    """A run of `project` on Weights & Biases. Its id is kept in `directory`, so that an interrupted run resumes under the same id.

    After an interruption, some steps are logged again; online, Weights & Biases drops steps that are not later than its last one.
    With WANDB_MODE=offline, each start writes a folder of its own, under the same id, for `wandb sync`.

    Raises:
        ValueError: the package wandb is not installed, or the login fails.
    """

    def __init__(self, directory: Path, project: str, config: RunConfig) -> None:
        self._wandb = import_wandb()
        self._directory = directory
        self._project = project
        self._config = config
        self._run: Any = None

    def start(self, rollouts: int) -> None:
        file = self._directory / WANDB_ID
        try:
            self._run = self._wandb.init(
                project=self._project,
                id=read_text(file).strip() if file.exists() else None,
                resume="allow",
                name=f"{label_of(self._config)}-seed{self._config.seed}",
                group=label_of(self._config),
                config=self._config.model_dump(mode="json"),
                dir=str(self._directory),
            )
        except self._wandb.Error as error:
            raise ValueError(f"--wandb {self._project}: {error}; log in with wandb login, or set WANDB_MODE=offline") from error
        file.write_text(self._run.id + "\n")

    def show(self, figures: Mapping[str, float], rollouts: int) -> None:
        self._run.log(dict(figures), step=rollouts)

    def flush(self) -> None:
        """Do nothing: Weights & Biases writes on its own."""

    def close(self) -> None:
        if self._run is not None:
            self._run.finish()


def import_wandb() -> ModuleType:
    try:
        return importlib.import_module("wandb")
    except ImportError:
        raise ValueError("--wandb needs the package 'wandb'; install it with: pip install wandb") from None
