"""Time `fused_advantage` on the CPU against a plain vectorised torch version and the floor of writing the output.

    python bench/advantage.py            # prints a table and appends to bench/results/advantage.csv

Gate, then time: a provider whose advantages differ from the reference is not timed. Every provider gets the same tensors, one
thread, alternating rounds in one process; the figures are medians.
"""

from __future__ import annotations

import csv
import platform
import statistics
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from v05 import reference
from v05.ops import fused_advantage

RESULTS = Path(__file__).parent / "results" / "advantage.csv"
FIELDS = ("provider", "case", "rollouts", "tokens", "groups", "median_ms", "p20_ms", "p80_ms", "device", "commit", "torch")
ROUNDS = 21
GROUP_SIZE = 16
SHAPES = ((512, 1024), (4096, 2048), (1024, 8192))


def plain_torch(rewards: torch.Tensor, ids: torch.Tensor, mask: torch.Tensor, groups: int) -> torch.Tensor:
    """GRPO as one would write it: index_add_ for the moments, gather, multiply by the mask."""
    count = torch.zeros(groups).index_add_(0, ids, torch.ones_like(rewards))
    mean = torch.zeros(groups).index_add_(0, ids, rewards) / count
    deviation = rewards - mean[ids]
    std = (torch.zeros(groups).index_add_(0, ids, deviation**2) / (count - 1)).sqrt()
    return (deviation / (std[ids] + 1e-6))[:, None] * mask


def measure(functions: dict[str, Callable[[], object]]) -> dict[str, list[float]]:
    """Milliseconds of each function, in alternating rounds after one warm-up."""
    times: dict[str, list[float]] = {name: [] for name in functions}
    for function in functions.values():
        function()
    for _ in range(ROUNDS):
        for name, function in functions.items():
            started = time.perf_counter()
            function()
            times[name].append(1e3 * (time.perf_counter() - started))
    return times


def case(n: int, t: int) -> dict[str, list[float]]:
    """All providers on one padded GRPO batch of n rollouts and t tokens."""
    generator = torch.Generator().manual_seed(0)
    groups = n // GROUP_SIZE
    ids = torch.arange(n) // GROUP_SIZE
    offsets = torch.arange(0, n + 1, GROUP_SIZE)
    rewards = torch.rand(n, generator=generator)
    mask = torch.arange(t) < torch.randint(1, t + 1, (n, 1), generator=generator)
    buffer = torch.empty(n, t)
    options = dict(group_offsets=offsets, response_mask=mask, method="grpo")
    providers: dict[str, Callable[[], torch.Tensor]] = {
        "v05": lambda: fused_advantage(rewards, **options).advantages,
        "v05, out=": lambda: fused_advantage(rewards, **options, out=buffer).advantages,
        "plain torch": lambda: plain_torch(rewards, ids, mask, groups),
    }
    exact = torch.from_numpy(reference.fused_advantage(rewards.double().numpy(), ids.numpy(), method="grpo")[0])
    for name, provider in providers.items():
        torch.testing.assert_close(provider().double(), exact[:, None] * mask, rtol=1e-4, atol=1e-4, msg=name)
    floors = {
        "floor: fill a fresh tensor": lambda: (torch.empty(n, t).fill_(0), mask.sum()),
        "floor: fill a mapped buffer": lambda: (buffer.fill_(0), mask.sum()),
    }
    return measure({**providers, **floors})


def main() -> None:
    torch.set_num_threads(1)
    commit = subprocess.run(["git", "describe", "--always", "--dirty"], capture_output=True, text=True, check=False).stdout.strip()
    rows = []
    for n, t in SHAPES:
        for provider, times in case(n, t).items():
            p20, p80 = np.percentile(times, (20, 80))
            figures = (f"{x:.4f}" for x in (statistics.median(times), p20, p80))
            rows.append(
                (
                    provider,
                    "padded grpo",
                    n,
                    t,
                    n // GROUP_SIZE,
                    *figures,
                    platform.processor() or platform.machine(),
                    commit,
                    torch.__version__,
                )
            )
            print(f"{n:>6} x {t:<6} {provider:<28} {rows[-1][5]:>10} ms")
    RESULTS.parent.mkdir(exist_ok=True)
    new = not RESULTS.exists()
    with RESULTS.open("a", newline="") as file:
        writer = csv.writer(file)
        writer.writerows([FIELDS, *rows] if new else rows)


if __name__ == "__main__":
    main()
