"""Measures times on the device and on the host in microseconds. This is the only module that needs CUDA."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from on_gpu.batch import Batch, Shape, batches_beyond

REPLAYS, HOST_ROUNDS, WHOLE_ROUNDS = 25, 7, 20
FEWEST = 3  # least rounds per figure, even if time is short
HOST_CALLS = 100


@dataclass(frozen=True)
class Times:
    """Microseconds per call, one number per round. A list is empty if the call cannot be timed in that way.

    Attributes:
        device: device time of calls in a replayed CUDA graph, one call on each batch.
        host: time until the call returns, without waiting for the device.
        whole: time from an idle device to the result.
    """

    device: list[float]
    host: list[float]
    whole: list[float]


class Clock:
    """Times the cases of a run that ends at `until` (time.monotonic()). If time is short, cases get fewer rounds."""

    def __init__(self, until: float, cases: int) -> None:
        self.until, self.left = until, cases
        self.device = torch.device("cuda", torch.cuda.current_device())

    def batches(self, shape: Shape) -> int:
        """How many batches a case cycles through, so that none is still in the L2 cache."""
        return batches_beyond(torch.cuda.get_device_properties(self.device).L2_cache_size, shape)

    def measure(self, call: Callable[[Batch], Any], batches: list[Batch], graphed: bool) -> Times:
        share = max(0.0, self.until - time.monotonic()) / max(self.left, 1) / 3
        self.left -= 1
        for batch in batches[:3]:
            call(batch)
        torch.cuda.synchronize()
        whole = rounds(WHOLE_ROUNDS, share, lambda i: self._whole(call, batches[i % len(batches)]))
        if not graphed:
            return Times([], [], whole)
        host = rounds(HOST_ROUNDS, share, lambda _: self._host(call, batches[0]))
        return Times(self._device(call, batches, share), host, whole)

    def _whole(self, call: Callable[[Batch], Any], batch: Batch) -> float:
        start, stop = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        torch.cuda.synchronize()
        start.record()
        call(batch)
        stop.record()
        torch.cuda.synchronize()
        return 1e3 * start.elapsed_time(stop)

    def _host(self, call: Callable[[Batch], Any], batch: Batch) -> float:
        torch.cuda.synchronize()
        start = time.perf_counter()
        for _ in range(HOST_CALLS):
            call(batch)
        return (time.perf_counter() - start) / HOST_CALLS * 1e6

    def _device(self, call: Callable[[Batch], Any], batches: list[Batch], share: float) -> list[float]:
        torch.cuda.synchronize()
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for batch in batches:
                call(batch)
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            results = [call(batch) for batch in batches]  # kept, so that fresh outputs do not reuse memory
        graph.replay()
        torch.cuda.synchronize()

        def replay(_: int) -> float:
            start, stop = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            start.record()
            graph.replay()
            stop.record()
            torch.cuda.synchronize()
            return 1e3 * start.elapsed_time(stop) / len(batches)

        times = rounds(REPLAYS, share, replay)
        del results
        return times


def rounds(most: int, seconds: float, once: Callable[[int], float]) -> list[float]:
    """The figures of up to `most` rounds. No round starts after `seconds`, except to reach FEWEST rounds."""
    end = time.monotonic() + seconds
    figures: list[float] = []
    while len(figures) < most and (len(figures) < FEWEST or time.monotonic() < end):
        figures.append(once(len(figures)))
    return figures
