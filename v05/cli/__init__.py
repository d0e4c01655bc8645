"""The command line, `v05 COMMAND`. Each command has a file, which parses options and prints results; other modules do the work."""

from __future__ import annotations

import sys

try:
    import rich  # noqa: F401 (the commands need it)
    import typer
except ImportError as error:
    if sys.argv[1:2] == ["doctor"]:  # doctor needs none of these packages, and names the missing ones
        from v05.doctor import main as examine

        sys.exit(examine(sys.argv[2:]))
    sys.exit(f"v05: the command line needs the package {error.name!r}; install it with: pip install 'v05[train]'")

# Commands import heavy modules such as torch inside their functions, so that --help is quick.
from v05.cli import check_task, compare, doctor, evaluate, fit_prior, report, simulate, train

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",  # which wraps paragraphs anew; "rich" keeps the line breaks of docstrings
    help="Better policy gradients from fewer rollouts: train with, compare and simulate V_0.5 (arXiv 2603.10848) and its rivals.",
)
app.command()(train.train)
app.command()(compare.compare)
app.command()(report.report)
app.command("fit-prior")(fit_prior.fit_prior)
app.command("eval")(evaluate.evaluate)
app.command("check-task")(check_task.check_task)
app.command()(simulate.simulate)
app.command()(doctor.doctor)


def main() -> None:
    """Entry point of the command `v05`."""
    try:
        app()
    except SystemExit as end:  # typer ends every command with SystemExit, unless there is a bug
        if (
            distributed := sys.modules.get("v05.train.distributed")
        ) is not None:  # imported only by a run, which joined a torchrun job
            distributed.leave_world(end.code if isinstance(end.code, int) else int(end.code is not None))
        raise
