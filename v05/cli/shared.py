"""Code shared by the commands: the console, progress bars, common options, checks of inputs, and ends by error or interruption."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer
from rich.console import Console
from rich.measure import Measurement
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn, track
from rich.table import Table

from v05.messages import explained_places, printable

if TYPE_CHECKING:
    from v05.train.config import RunConfig

WIDEST = 400  # columns
INTERRUPTED = 130  # exit status after Ctrl-C

Preset = Annotated[
    str,
    typer.Option(
        help="Task, policy and sizes of a run. With a small policy made here: tiny (0.6M parameters, minutes on one core); "
        "arithmetic, symbols or hard (1M); demo (symbols, short); smoke (seconds, a test that learns nothing). With an "
        "instruct model given by --policy: gsm, sums, products or multiples."
    ),
]
Policy = Annotated[
    Path | None,
    typer.Option(
        help="Train this Hugging Face model folder instead of the preset's policy. Without --preset, the settings suit a "
        "pretrained model of 0.1 to 0.6 billion parameters: 4096 rollouts, 128 per step, learning rate 1e-5."
    ),
]
MaxNewTokens = Annotated[
    int | None,
    typer.Option(
        help="Longest completion, in tokens; only with --policy. Default: the preset's limit if it is for language models, else "
        "256. Raise it if many completions are cut off before their answer.",
        min=1,
    ),
]
Rollouts = Annotated[
    int | None, typer.Option(help="Rollouts to train on in each run; evaluation does not count. Default: the preset's.", min=1)
]
LearningRate = Annotated[
    float | None,
    typer.Option(
        help="AdamW's learning rate. Default: the preset's, which is 3e-4 for most small policies and 1e-5 for a pretrained one."
    ),
]
Settings = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        metavar="NAME=VALUE",
        help="Set any field of config.json by its dotted name, such as loss.clip_high=0.28. The value is JSON or plain text. May "
        "be repeated; applied after all other options.",
    ),
]
Threads = Annotated[
    int, typer.Option(help="CPU threads of torch. 1 is fastest for the small policies; raise it for larger models on a CPU.", min=1)
]


class Terminal(Console):
    """A console that shows control characters as text: lines may quote files, servers and policies, which must not drive the
    terminal."""

    def out(self, *objects: Any, **options: Any) -> None:
        super().out(*(printable(str(each)) for each in objects), **options)


console = Terminal(stderr=True)


def output() -> Console:
    """The console for a command's tables, on stdout. A file or a pipe is as wide as any table."""
    return Console(width=None if sys.stdout.isatty() else WIDEST)


def print_table(table: Table) -> None:
    """Print a table on stdout. Where the terminal is too narrow, leave out the last columns and name them.

    Cut to the width of the terminal, the cells of a wide table would all be unreadable.
    """
    stdout, left_out = output(), list[str]()
    unbounded = stdout.options.update(width=WIDEST)
    while Measurement.get(stdout, unbounded, table).maximum > stdout.width and len(table.columns) > 1:
        left_out.insert(0, str(table.columns.pop().header))
    stdout.print(table)
    if left_out:
        console.out(f"left out, as the terminal is {stdout.width} columns wide: {', '.join(left_out)}")


def watched(items: Sequence[Any], what: str) -> Iterable[Any]:
    """The items, with a progress bar that counts those already taken."""
    return track(items, what, console=console)


def overrides_of(
    context: typer.Context, rollouts: int | None, learning_rate: float | None, policy: Path | None, max_new_tokens: int | None
) -> dict[str, Any]:
    """The overrides of `run_config` that these options ask for. A policy without a preset is trained as a pretrained model.

    Raises ValueError if --max-new-tokens is given without --policy.
    """
    from v05.train.presets import PRETRAINED, given_policy

    overrides: dict[str, Any] = {}
    preset = context.params["preset"]
    if policy is not None:
        overrides |= {} if "preset" in on_command_line(context) else PRETRAINED
        overrides["policy"] = given_policy(preset, policy, max_new_tokens)
    elif max_new_tokens is not None:
        raise ValueError(
            f"--max-new-tokens {max_new_tokens} belongs to --policy; "
            f"to change a preset's limit, use --set policy.max_new_tokens={max_new_tokens}"
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
    """Progress bars with a note (`task.fields["note"]`) beside each; only rank 0 shows them."""
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
    """This process's rank under torchrun; 0 without torchrun."""
    return int(os.environ.get("RANK", "0"))


def say(line: str) -> None:
    """Print a line to stderr, on rank 0 only."""
    if rank() == 0:
        console.out(line)


def set_threads(count: int) -> None:
    import torch

    torch.set_num_threads(count)


def fail(error: Exception) -> NoReturn:
    """End the command with status 2 and the error's message."""
    from pydantic import ValidationError

    text = explained_places(error) if isinstance(error, ValidationError) else str(error)
    console.out(f"v05: {text}", style="red", highlight=False)
    raise typer.Exit(2)


@contextmanager
def no_exit() -> Iterator[None]:
    """Turn a SystemExit inside into a RuntimeError: if a task's or a policy's code calls exit(), the command must not seem to
    succeed."""
    try:
        yield
    except SystemExit as end:
        raise RuntimeError(
            f"exit({end.code!r}) was called before there was a result, by code that the run uses (its task or policy)"
        ) from end


def interrupted(out: Path) -> NoReturn:
    """End an interrupted command whose results so far are in `out`, from which the same command resumes."""
    console.out(f"interrupted; the results so far are in {out}, and the same command resumes from there")
    raise typer.Exit(INTERRUPTED)
