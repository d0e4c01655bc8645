"""The fixture of the benchmarks. It checks a provider's result, times it, and adds a row to bench/results/advantage.csv.

A provider whose result differs from the reference fails its test and is not timed. The rows of a run replace the file, so that all
its figures come from one machine and one commit.
"""

from __future__ import annotations

import csv
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from machine import commit, processor, versions

RESULTS = Path(__file__).parent / "results" / "advantage.csv"
FLOOR = "floor"
ROUNDS = 31
PACKAGES = ("torch", "numpy", "pandas", "verl", "skyrl")

Call = Callable[[], object]
Measure = Callable[..., None]


@dataclass(frozen=True)
class Row:
    """One provider of one case: milliseconds per call, and the least number of bytes that a call must move."""

    provider: str
    case: str
    N: int
    T: int
    groups: int
    median: float
    p20: float
    p80: float
    bytes: int
    floor: float
    device: str
    commit: str
    versions: str


@pytest.fixture
def measure(benchmark: Any, request: pytest.FixtureRequest) -> Measure:
    """measure(provider, case, (N, T, groups), call, expected, bytes, calls=1) checks the result of `call` and times it.

    A time is the mean of `calls` consecutive calls.
    """
    rows: list[dict[str, Any]] = request.config.stash[_ROWS]

    def run(
        provider: str,
        case: str,
        shape: tuple[int, int, int],
        call: Call,
        expected: torch.Tensor | None,
        traffic: int,
        calls: int = 1,
    ) -> None:
        if expected is not None:
            torch.testing.assert_close(torch.as_tensor(call()).double(), expected, rtol=1e-4, atol=1e-4)
        benchmark.group = f"{case}, {shape[0]} x {shape[1]}"
        benchmark.name = provider
        benchmark.pedantic(call, rounds=ROUNDS, iterations=calls, warmup_rounds=3)
        times = 1e3 * np.array(benchmark.stats.stats.data)
        median, p20, p80 = (float(x) for x in (np.median(times), *np.percentile(times, (20, 80))))
        rows.append(dict(provider=provider, case=case, shape=shape, bytes=traffic, median=median, p20=p20, p80=p80))

    return run


_ROWS = pytest.StashKey[list[dict[str, Any]]]()


def pytest_configure(config: pytest.Config) -> None:
    config.stash[_ROWS] = []
    torch.set_num_threads(1)


def pytest_sessionfinish(session: pytest.Session) -> None:
    rows = session.config.stash[_ROWS]
    if not rows or session.testsfailed:
        return
    floors = {(row["case"], row["shape"]): row["median"] for row in rows if row["provider"] == FLOOR}
    device = f"{processor()}, {torch.backends.cpu.get_cpu_capability()}, {torch.get_num_threads()} thread"
    about = dict(device=device, commit=commit(), versions=versions(*PACKAGES))
    RESULTS.parent.mkdir(exist_ok=True)
    with RESULTS.open("w", newline="") as file:
        writer = csv.DictWriter(file, [field.name for field in fields(Row)], lineterminator="\n")
        writer.writeheader()
        for row in rows:
            n, t, groups = row.pop("shape")
            floor = floors.get((row["case"], (n, t, groups)), float("nan"))
            figures = asdict(Row(**row, N=n, T=t, groups=groups, floor=floor, **about))
            writer.writerow({name: f"{x:.4f}" if isinstance(x, float) else x for name, x in figures.items()})
