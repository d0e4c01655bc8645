"""What commands share: the console, progress, options, and how a command fails or is interrupted."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn, track

from v05.messages import explained_places, printable

if TYPE_CHECKING:
    from v05.train.config import RunConfig

INTERRUPTED = 130  # exit status after Ctrl-C

Preset = Annotated[
    str,
    typer.Option(
        help="Task and policy: tiny (0.6M parameters); arithmetic, symbols or hard (1M); smoke (a test). Tasks for a --policy: "
        "gsm, sums, products, multiples."
    ),
]
Policy = Annotated[
    Path | None,
    typer.Option(
        help="Policy instead of the preset's: a Hugging Face model folder. Without --preset it is trained as a pretrained model: "
        "4096 rollouts, 128 a step, at a rate of 1e-5."
    ),
]
MaxNewTokens = Annotated[
    int | None,
    typer.Option(help="Length limit of a completion; with --policy. The preset's if it is for language models, else 256.", min=1),
]
Rollouts = Annotated[int | None, typer.Option(help="Training rollouts of a run; evaluation is not counted.", min=1)]
LearningRate = Annotated[float | None, typer.Option(help="AdamW's learning rate.")]
Settings = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        metavar="NAME=VALUE",
        help="Any field of config.json by its dotted name, after all else; the value as JSON or plain text. Repeatable.",
    ),
]
Threads = Annotated[int, typer.Option(help="Threads a run; 1 is fastest for small policies.", min=1)]


class Terminal(Console):
    """A console whose plain lines may quote anybody: what would drive the terminal is shown as text."""

    def out(self, *objects: Any, **options: Any) -> None:
        super().out(*(printable(str(each)) for each in objects), **options)


console = Terminal(stderr=True)


def output() -> Console:
    """Where a command's tables go; a file or a pipe gets them wide, as nothing wraps there."""
    return Console(width=None if sys.stdout.isatty() else 180)


def watched(items: Sequence[Any], what: str) -> Iterable[Any]:
    """The items, with a bar that shows how many were taken."""
    return track(items, what, console=console)


def overrides_of(
    context: typer.Context, rollouts: int | None, learning_rate: float | None, policy: Path | None, max_new_tokens: int | None
) -> dict[str, Any]:
    """The fields of a run that these options replace, for `run_config`. A policy without a preset counts as pretrained."""
    from v05.train.presets import PRETRAINED, given_policy

    overrides: dict[str, Any] = {}
    preset = context.params["preset"]
    if policy is not None:
        overrides |= {} if "preset" in on_command_line(context) else PRETRAINED
        overrides["policy"] = given_policy(preset, policy, max_new_tokens)
    elif max_new_tokens is not None:
        raise ValueError(
            f"--max-new-tokens {max_new_tokens} belongs to --policy; a preset has its own, under policy in config.json"
        )
    if rollouts is not None:
        overrides["total_rollouts"] = rollouts
    if learning_rate is not None:
        overrides["optimizer"] = {"learning_rate": learning_rate}
    return overrides


def on_command_line(context: typer.Context) -> set[str]:
    """The names of the options that the user gave."""
    sources = {name: context.get_parameter_source(name) for name in context.params}
    return {name for name, source in sources.items() if source is not None and source.name == "COMMANDLINE"}


def demand_input(argument: str, path: Path, wanted: str, *, folder: bool = False) -> None:
    """Raise ValueError, naming the argument and what it should be, unless there is something to read at `path`.

    A pipe counts as a file. With `folder`, a folder will do as well.
    """
    if path.is_dir() and not folder:
        raise ValueError(f"{argument} {path} is a folder, not a file; give {wanted}")
    if not path.exists():
        raise ValueError(f"{argument} {path} does not exist; give {wanted}")


def demand_task(run: RunConfig, argument: str = "task.path") -> None:
    """Raise ValueError if the run's prompts are to come from a file that is not there; `argument` is where the user named it."""
    from v05.tasks import JsonlConfig

    if isinstance(run.task, JsonlConfig):
        demand_input(argument, run.task.path, 'a JSON-lines file with one {"prompt": ..., "answer": ...} object per line')


def progress_bars() -> Progress:
    """Bars with a note beside each, on one rank only."""
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[note]}"),
        console=console,
        disable=rank() > 0,
    )


def rank() -> int:
    """This process's number under torchrun; 0 without it."""
    return int(os.environ.get("RANK", "0"))


def say(line: str) -> None:
    """Print once for all ranks."""
    if rank() == 0:
        console.out(line)


def set_threads(count: int) -> None:
    import torch

    torch.set_num_threads(count)


def fail(error: Exception) -> NoReturn:
    """End the command with status 2 and say why."""
    from pydantic import ValidationError

    text = explained_places(error) if isinstance(error, ValidationError) else str(error)
    console.out(f"v05: {text}", style="red", highlight=False)
    raise typer.Exit(2)


@contextmanager
def no_exit() -> Iterator[None]:
    """Whatever runs within may not end the command as if it had succeeded: a task's or a policy's code may call exit()."""
    try:
        yield
    except SystemExit as end:
        raise RuntimeError(f"exit({end.code!r}) was called before there was a result; something that the run calls did it") from end


def interrupted(out: Path) -> NoReturn:
    """End a command that goes on from `out` when called again."""
    console.out(f"interrupted; what was measured so far is in {out}, and the same command goes on from there")
    raise typer.Exit(INTERRUPTED)
