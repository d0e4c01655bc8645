"""The progress display of `v05 train`: a panel in a terminal, occasional plain lines in a log."""

from __future__ import annotations

import math
import time
from types import TracebackType
from typing import TYPE_CHECKING

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.panel import Panel
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

if TYPE_CHECKING:
    from v05.train.state import Progress as RunProgress

LINE_SECONDS = 30.0  # between lines of a log while there is no new evaluation
BLOCKS = "▁▂▃▄▅▆▇█"


class LiveView:
    """Shows the progress of one run on `console`, if that is not quiet."""

    def __init__(self, title: str, console: Console) -> None:
        self._title = title
        self._console = console
        self._bar = Progress(
            BarColumn(bar_width=None),
            TextColumn("{task.completed:,.0f} of {task.total:,.0f} rollouts"),
            TimeRemainingColumn(),
            TextColumn("left"),
            console=console,
            expand=True,
        )
        self._task = self._bar.add_task("", total=None)
        self._state: RunProgress | None = None
        self._accuracies: list[float] = []
        self._told = -math.inf
        self._live = Live(get_renderable=self._panel, console=console) if console.is_terminal else None

    def __enter__(self) -> LiveView:
        if self._live is not None:
            self._live.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self._live is not None:
            self._live.stop()

    def show(self, state: RunProgress) -> None:
        """Show this state of the run."""
        evaluated = self._state is None or state.evaluations != self._state.evaluations
        self._state = state
        self._bar.update(self._task, completed=state.rollouts, total=state.total)
        if evaluated:
            self._accuracies.append(state.accuracy)
        if self._live is None and (evaluated or time.monotonic() - self._told > LINE_SECONDS):
            self._told = time.monotonic()
            self._console.out(self._line(), highlight=False)

    def _figures(self) -> list[tuple[str, str]]:
        """(name, value) of each number beside the progress bar."""
        state = self._state
        if state is None:
            return [("held-out accuracy", "being measured")]
        return [
            ("held-out accuracy", f"{state.accuracy:.3f}"),
            ("rollouts/s", f"{state.rollouts_per_second:,.0f}"),
            ("rollouts per prompt", f"{state.group_size:.1f}"),
            ("priors rejected", f"{state.prior_rejected:.0%}"),
        ]

    def _line(self) -> str:
        assert self._state is not None
        left = self._bar.tasks[0].time_remaining
        known = [f"{name} {value}" for name, value in self._figures() if "nan" not in value]
        if left is not None and self._state.rollouts < self._state.total:
            known.append(f"{int(left) // 60}:{int(left) % 60:02d} left")
        return f"{self._state.rollouts:,} of {self._state.total:,} rollouts: {', '.join(known)}"

    def _panel(self) -> RenderableType:
        figures = Table.grid(expand=True)
        shown = [(name, "-" if "nan" in value else value) for name, value in self._figures()]
        if self._console.encoding.startswith("utf"):
            shown[0] = (shown[0][0], f"{shown[0][1]} {sparkline(self._accuracies)}")
        for _ in shown:
            figures.add_column()
        figures.add_row(*(Text.assemble((f"{name} ", "dim"), (value, "bold")) for name, value in shown))
        return Panel(Group(self._bar, figures), title=self._title, title_align="left", border_style="dim")


def sparkline(values: list[float]) -> str:
    """The last 16 values as block characters, scaled from their lowest to their highest; empty if there are no two different
    values."""
    values = values[-16:]
    low, high = min(values, default=0.0), max(values, default=0.0)
    if len(values) < 2 or low == high:
        return ""
    return "".join(BLOCKS[round((value - low) / (high - low) * (len(BLOCKS) - 1))] for value in values)
