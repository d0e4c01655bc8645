"""Time `fused_advantage` on a GPU against a plain torch version and the card's own copy bandwidth.

    python bench/gpu_advantage.py        # prints a table and appends to bench/results/gpu_advantage.csv; says "no GPU" without one

Gate, then time: a provider whose advantages differ from the reference is not timed. Buffers rotate through more memory than the
L2 cache holds, times are device events, figures are medians; `of_copy` is the share of the bandwidth that a plain device-to-device
copy reached in the same run, counting for each provider the bytes that a launch must move at least.
"""

from __future__ import annotations

import csv
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from machine import commit

from v05 import reference
from v05.ops import fused_advantage

RESULTS = Path(__file__).parent / "results" / "gpu_advantage.csv"
FIELDS = (
    "provider",
    "case",
    "rollouts",
    "tokens",
    "groups",
    "median_us",
    "p20_us",
    "p80_us",
    "floor_bytes",
    "of_copy",
    "device",
    "commit",
    "torch",
)
ROUNDS = 101
GROUP_SIZE = 16
ROTATED_BYTES = 512 << 20  # beyond any L2
SHAPES = ((512, 1024), (4096, 2048), (1024, 8192))


@dataclass(frozen=True)
class Batch:
    """One GRPO batch on the device, with buffers to write into."""

    rewards: torch.Tensor
    offsets: torch.Tensor
    ids: torch.Tensor
    mask: torch.Tensor
    out: torch.Tensor


def make_batch(n: int, t: int, seed: int) -> Batch:
    generator = torch.Generator().manual_seed(seed)
    mask = torch.arange(t) < torch.randint(1, t + 1, (n, 1), generator=generator)
    return Batch(
        torch.rand(n, generator=generator).cuda(),
        torch.arange(0, n + 1, GROUP_SIZE).cuda(),
        (torch.arange(n) // GROUP_SIZE).cuda(),
        mask.cuda(),
        torch.empty(n, t, device="cuda"),
    )


def v05_padded(batch: Batch) -> torch.Tensor:
    return fused_advantage(
        batch.rewards, group_offsets=batch.offsets, response_mask=batch.mask, method="grpo", out=batch.out
    ).advantages


def plain_torch(batch: Batch) -> torch.Tensor:
    """GRPO as one would write it: index_add_ for the moments, gather, multiply by the mask."""
    groups = batch.offsets.numel() - 1
    zeros = torch.zeros(groups, device="cuda")
    count = zeros.index_add(0, batch.ids, torch.ones_like(batch.rewards))
    deviation = batch.rewards - (zeros.index_add(0, batch.ids, batch.rewards) / count)[batch.ids]
    std = (zeros.index_add(0, batch.ids, deviation**2) / (count - 1)).sqrt()
    return (deviation / (std[batch.ids] + 1e-6))[:, None] * batch.mask


def microseconds(function: Callable[[Batch], object], batches: list[Batch]) -> np.ndarray:
    """Device time of each of ROUNDS calls, after a pass over all batches to compile and warm up."""
    for batch in batches:
        function(batch)
    times = []
    for i in range(ROUNDS):
        start, stop = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        function(batches[i % len(batches)])
        stop.record()
        torch.cuda.synchronize()
        times.append(1e3 * start.elapsed_time(stop))
    return np.array(times)


def main() -> None:
    if not torch.cuda.is_available():
        print("no GPU: nothing was timed")
        sys.exit(0)
    device = torch.cuda.get_device_name()
    rows = []
    for n, t in SHAPES:
        batches = [make_batch(n, t, seed) for seed in range(max(2, ROTATED_BYTES // (5 * n * t)))]
        first = batches[0]
        exact = reference.advantages(first.rewards.double().cpu().numpy(), first.ids.cpu().numpy(), method="grpo")[0]
        expected = torch.from_numpy(exact).cuda()[:, None] * first.mask
        floor = n * t * (first.out.element_size() + first.mask.element_size())
        source = torch.empty_like(first.out)
        copied = microseconds(lambda batch, source=source: batch.out.copy_(source), batches)
        copy_bandwidth = 2 * n * t * 4 / np.median(copied)  # bytes a microsecond, read and written
        for name, provider in {"v05, out=": v05_padded, "plain torch": plain_torch}.items():
            torch.testing.assert_close(provider(first).double(), expected, rtol=1e-4, atol=1e-4, msg=name)
            times = microseconds(provider, batches)
            figures = [float(x) for x in (np.median(times), *np.percentile(times, (20, 80)))]
            share = floor / figures[0] / copy_bandwidth
            rows.append((name, "padded grpo", n, t, n // GROUP_SIZE, *figures, floor, share, device, commit(), torch.__version__))
            print(f"{n:>6} x {t:<6} {name:<14} {figures[0]:>10.1f} us   {share:6.1%} of the copy's bandwidth")
    RESULTS.parent.mkdir(exist_ok=True)
    new = not RESULTS.exists()
    with RESULTS.open("a", newline="") as file:
        csv.writer(file).writerows([FIELDS, *rows] if new else rows)


if __name__ == "__main__":
    main()
