"""Measures seconds and bytes of one provider on one problem, after a check of its results."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from losses.problem import Problem, Size, make_problem
from losses.providers import LIGER, OURS, Provider, ours, providers
from v05.ops import token_statistics

FEWEST, MOST = 3, 15  # rounds per figure
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 3e-2}  # relative, of the loss and of the gradients' norms
COPIED = 1 << 30  # bytes that the copy moves


@dataclass(frozen=True)
class Figures:
    """The medians of a provider's figures.

    Attributes:
        seconds: time of forward and backward pass.
        forward_seconds: time of the statistics alone, without a gradient. Only for v05.
        peak_bytes: peak memory beyond the inputs and the gradient of the weight.
    """

    seconds: float
    forward_seconds: float | None
    peak_bytes: int


def measure(name: str, size: Size, device: torch.device, dtype: torch.dtype, wheels: Path | None, seconds: float) -> Figures | str:
    """The figures of a provider, or the reason why there are none: it differs from v05 or cannot run."""
    problem = make_problem(size, device, dtype)
    provider = providers("hidden" if size.hidden else "logits", wheels, device)[name]
    meter = _GpuMeter(problem) if device.type == "cuda" else _CpuMeter(problem)
    try:
        peak = meter.peak(lambda: provider(problem).backward())
        problem.gradients()
    except (RuntimeError, torch.OutOfMemoryError) as error:
        return f"{type(error).__name__}: {str(error).splitlines()[0]}"
    if name != OURS and (why := _difference(name, provider, problem)):
        return why
    problem = make_problem(size, device, dtype)  # a new problem, because in-place gradients have overwritten the logits

    def whole() -> None:
        provider(problem).backward()
        problem.gradients()

    def forward() -> None:
        with torch.no_grad():
            token_statistics(problem.given, problem.targets, weight=problem.weight)

    share = seconds / 2
    return Figures(meter.seconds(whole, share), meter.seconds(forward, share) if name == OURS else None, peak)


def copy_bandwidth(device: torch.device) -> float:
    """Bytes per second, read and written, of a copy."""
    source = torch.empty(COPIED, dtype=torch.uint8, device=device).zero_()
    target = torch.empty_like(source)
    meter = _GpuMeter(None) if device.type == "cuda" else _CpuMeter(None)
    return 2 * COPIED / meter.seconds(lambda: target.copy_(source), 1.0)


def product_seconds(size: Size, device: torch.device, dtype: torch.dtype, seconds: float) -> float:
    """Seconds of a step's three matrix products (logits, gradients of hidden states and weight), in chunks of tokens."""
    rows = min(size.tokens, 1024)
    hidden = torch.randn(rows, size.hidden, device=device, dtype=dtype)
    weight = torch.randn(size.vocabulary, size.hidden, device=device, dtype=dtype)
    logits = torch.empty(rows, size.vocabulary, device=device, dtype=dtype)
    of_hidden, of_weight = torch.empty_like(hidden), torch.empty_like(weight)

    def products() -> None:
        torch.mm(hidden, weight.t(), out=logits)
        torch.mm(logits, weight, out=of_hidden)
        torch.mm(logits.t(), hidden, out=of_weight)

    meter = _GpuMeter(None) if device.type == "cuda" else _CpuMeter(None)
    return meter.seconds(products, seconds) * size.tokens / rows


def _difference(name: str, provider: Provider, problem: Problem) -> str | None:
    """How a provider's loss or gradients differ from v05's, or None. For Liger from logits only the loss is compared."""
    found = []
    for way in (ours, provider):
        loss = way(problem)
        value = float(loss.detach())
        if name == LIGER and problem.weight is None:
            found.append([value])
            continue
        loss.backward()
        found.append([value, *(float(gradient.float().norm()) for gradient in problem.gradients())])
    wanted, got = found
    tolerance = TOLERANCE[problem.given.dtype]
    close = all(abs(a - b) <= tolerance * abs(a) for a, b in zip(wanted, got, strict=True))
    return None if close else f"loss and norms of gradients are {got}, those of v05 {wanted}"


class _GpuMeter:
    def __init__(self, problem: Problem | None) -> None:
        self.problem = problem

    def peak(self, call: Callable[[], object]) -> int:
        assert self.problem is not None
        call()  # compiles
        self.problem.gradients()
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
        torch.cuda.synchronize()
        of_weight = self.problem.weight
        return torch.cuda.max_memory_allocated() - before - (0 if of_weight is None else of_weight.nbytes)

    def seconds(self, call: Callable[[], object], budget: float) -> float:
        call()
        times: list[float] = []
        end = time.monotonic() + budget
        while len(times) < MOST and (len(times) < FEWEST or time.monotonic() < end):
            start, stop = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            start.record()
            call()
            stop.record()
            torch.cuda.synchronize()
            times.append(start.elapsed_time(stop) / 1e3)
        return statistics.median(times)


class _CpuMeter:
    """Measures on a CPU. The peak is that of the process, which must have done nothing but make the problem."""

    def __init__(self, problem: Problem | None) -> None:
        self.problem = problem

    def peak(self, call: Callable[[], object]) -> int:
        assert self.problem is not None
        before = _resident("VmRSS")
        call()
        of_weight = self.problem.weight
        return _resident("VmHWM") - before - (0 if of_weight is None else of_weight.nbytes)

    def seconds(self, call: Callable[[], object], budget: float) -> float:
        times: list[float] = []
        end = time.monotonic() + budget
        while len(times) < MOST and (len(times) < FEWEST or time.monotonic() < end):
            start = time.perf_counter()
            call()
            times.append(time.perf_counter() - start)
        return statistics.median(times)


def _resident(name: str) -> int:
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(name))
    return int(line.split()[1]) * 1024
