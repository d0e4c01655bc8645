"""A run checks and then times every case of every shape."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
import triton
from machine import commit
from peers import verl_wheel

from on_gpu import results
from on_gpu.batch import SHAPES, Batch, Shape, make_batch
from on_gpu.cases import COPY, Case, Truth, cases, refuse_wrong, verl_cases
from on_gpu.clock import Times
from on_gpu.results import Row
from on_gpu.targets import MIDDLE

MOST_CHARACTERS = 500  # length limit of a failure's message, because a compiler's may be very long


class Timer(Protocol):
    """The interface of `on_gpu.clock.Clock`."""

    device: torch.device

    def batches(self, shape: Shape) -> int: ...
    def measure(self, call: Callable[[Batch], Any], batches: list[Batch], graphed: bool) -> Times: ...


def plan_of(wheel: Path | None, compiler: Callable[[Any], Any]) -> list[tuple[Shape, list[Case]]]:
    """Each shape with its cases. Whole calls on verl's tensors have only one shape."""
    verl = {} if wheel is None else verl_wheel.estimators(wheel)
    every = cases(compiler)
    return [(shape, every + (verl_cases(verl) if shape == MIDDLE else [])) for shape in SHAPES]


def measure_all(plan: Sequence[tuple[Shape, Sequence[Case]]], timer: Timer, device_name: str) -> tuple[list[Row], list[str]]:
    """The rows of all cases with right results, and a message for each failed case. Progress goes to stderr."""
    rows: list[Row] = []
    failures: list[str] = []
    about = (device_name, commit(), torch.__version__, triton.__version__)
    for shape, of_shape in plan:
        batches = [make_batch(shape, seed, timer.device) for seed in range(timer.batches(shape))]
        truth = Truth(batches[0])
        floors: dict[str, int] = {}
        timed: dict[str, Times] = {}
        for case in of_shape:
            try:
                refuse_wrong(case, truth)
                timed[case.name] = timer.measure(case.call, batches, case.graphed)
            except Exception as error:  # no failure may stop the other cases
                failures.append(f"{case.name}, {shape}: {type(error).__name__}: {str(error)[:MOST_CHARACTERS]}")
                progress(f"FAILED {failures[-1]}")
                continue
            floors[case.name] = case.floor_bytes(batches[0])
            progress(f"{shape}: {case.name}")
        rows += rows_of(shape, timed, floors, about)
        del batches, truth
    return rows, failures


def rows_of(shape: Shape, timed: dict[str, Times], floors: dict[str, int], about: tuple[str, str, str, str]) -> list[Row]:
    copied = results.summary(timed[COPY].device)[0] if COPY in timed else None
    rows = []
    for name, times in timed.items():
        device = results.summary(times.device)
        host, whole = results.summary(times.host)[0], results.summary(times.whole)[0]
        share = results.share_of_copy(floors[name], device[0], floors.get(COPY, 0), copied)
        rows.append(Row(name, *shape, *device, host, whole, floors[name], share, *about))
    return rows


def progress(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
