"""Where a run's figures go beside metrics.jsonl: TensorBoard always, Weights & Biases when asked for.

Both show every figure over training rollouts, which all methods share, under its record's kind and its own name: "step/accuracy",
"evaluation/accuracy", "probe/baseline_mse". What only a list can hold stays in metrics.jsonl.
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
    """Takes figures as they come, from one process."""

    def start(self, rollouts: int) -> None:
        """Begin, or go on: what was shown beyond `rollouts` is about to happen again and must not stand twice."""
        ...

    def show(self, figures: Mapping[str, float], rollouts: int) -> None:
        """Figures of the run once it had spent `rollouts`."""
        ...

    def flush(self) -> None:
        """Have the disk hold what was shown: a checkpoint follows."""
        ...

    def close(self) -> None: ...


@contextmanager
def interrupted_later() -> Iterator[None]:
    """Ctrl-C takes effect at the end of the block.

    TensorBoard hands figures to a thread through a queue. An exception within the queue's locks can lose the thread's wake-up or
    leave a lock taken, and closing would then wait for a thread that waits.
    """
    handler = signal.getsignal(signal.SIGINT)
    if handler is None or threading.current_thread() is not threading.main_thread():  # not Python's, or never raised here
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
    """The finite numbers of a record, but for what they are shown over."""
    return {
        f"{kind}/{name}": float(value)
        for name, value in values.items()
        if isinstance(value, int | float) and math.isfinite(value) and name not in ("rollouts", "step")
    }


class TensorBoard:
    """Event files in `directory`/tensorboard, one a start; each has TensorBoard drop what is to be repeated of those before."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory / TENSORBOARD
        self._writer: SummaryWriter | None = None

    def start(self, rollouts: int) -> None:
        from torch.utils.tensorboard.writer import SummaryWriter  # now: the trainer's functions serve hosts without it too

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
    """A run of `project` on Weights & Biases; its id is kept in `directory`, so that an interrupted run goes on under it.

    Figures repeated after an interruption carry steps that Weights & Biases has: online it drops what is earlier than its last.
    With WANDB_MODE=offline each start leaves a folder of its own, under the same id, for `wandb sync`.

    Raises:
        ValueError: the package wandb is not installed, or does not let us in.
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
        """Weights & Biases writes by itself."""

    def close(self) -> None:
        if self._run is not None:
            self._run.finish()


def import_wandb() -> ModuleType:
    try:
        return importlib.import_module("wandb")
    except ImportError:
        raise ValueError("--wandb needs the package 'wandb'; install it with: pip install wandb") from None
