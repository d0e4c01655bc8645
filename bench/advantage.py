"""Time `fused_advantage` on the CPU against what it replaces and against the floor its memory traffic sets.

    python bench/advantage.py            # one thread; prints a table and writes bench/results/advantage.csv

Gate, then time: a provider whose result differs from the reference is not timed. The providers of a case get the same tensors
and run in alternating rounds in one process. A case's floor is timed in the same rounds: writing the output once by `fill_` and
reading the mask (or the token rewards too) once. verl and pandas join where they are installed, called as shipped.
"""

from __future__ import annotations

import csv
import platform
import subprocess
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

import numpy as np
import torch

from v05 import _core, reference
from v05.ops import fused_advantage

RESULTS = Path(__file__).parent / "results" / "advantage.csv"
FIELDS = ("provider", "case", "N", "T", "groups", "median", "p20", "p80", "bytes", "floor", "device", "commit", "versions")
FLOOR = "floor"
ROUNDS = 21
GROUP_SIZE = 16
SHAPES = ((512, 1024), (4096, 2048), (1024, 8192))
PACKED_TOKENS = 4_000_000
ROLLOUTS, ROLLOUT_GROUPS = 1_000_000, 250_000

Provider = Callable[[], object]


@dataclass
class Case:
    """Providers of one result: `expected` is what each but the floor must return. Milliseconds, bytes the result needs moved."""

    name: str
    n: int
    t: int
    groups: int
    bytes: int
    providers: dict[str, Provider]
    expected: torch.Tensor

    def gate(self) -> None:
        for name, provider in self.providers.items():
            if name != FLOOR:
                result = torch.as_tensor(provider()).double()
                torch.testing.assert_close(
                    result, self.expected, rtol=1e-4, atol=1e-4, msg=lambda text, name=name: f"{self.name}, {name}: {text}"
                )

    def measure(self) -> dict[str, list[float]]:
        times: dict[str, list[float]] = {name: [] for name in self.providers}
        for _ in range(ROUNDS):
            for name, provider in self.providers.items():
                started = time.perf_counter()
                provider()
                times[name].append(1e3 * (time.perf_counter() - started))
        return times


def plain_torch(rewards: torch.Tensor, ids: torch.Tensor, groups: int) -> torch.Tensor:
    """GRPO as one would write it: index_add_ for the moments, gather."""
    count = torch.zeros(groups).index_add_(0, ids, torch.ones_like(rewards))
    mean = torch.zeros(groups).index_add_(0, ids, rewards) / count
    deviation = rewards - mean[ids]
    std = (torch.zeros(groups).index_add_(0, ids, deviation**2) / (count - 1)).sqrt()
    return deviation / (std[ids] + 1e-6)


def read(tensor: torch.Tensor) -> torch.Tensor:
    """The fastest read torch has of a contiguous tensor: the sum of its bytes taken as int64 (a bool sum is 40 times slower)."""
    return tensor.view(torch.int64).sum()


def grpo(rewards: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    return torch.from_numpy(reference.fused_advantage(rewards.double().numpy(), ids.numpy(), method="grpo")[0])


def padded(n: int, t: int) -> Iterator[Case]:
    """Padded output from outcome rewards and a bool mask, then from the tensors verl keeps."""
    generator = torch.Generator().manual_seed(0)
    groups = n // GROUP_SIZE
    ids = torch.arange(n) // GROUP_SIZE
    offsets = torch.arange(0, n + 1, GROUP_SIZE)
    rewards = torch.rand(n, generator=generator)
    lengths = torch.randint(1, t + 1, (n, 1), generator=generator)
    mask = torch.arange(t) < lengths
    expected = grpo(rewards, ids)[:, None] * mask
    buffer = torch.empty(n, t)
    options = dict(group_offsets=offsets, response_mask=mask, method="grpo")
    providers: dict[str, Provider] = {
        "v05": lambda: fused_advantage(rewards, **options).advantages,
        "plain torch": lambda: plain_torch(rewards, ids, groups)[:, None] * mask,
        FLOOR: lambda: (torch.empty(n, t).fill_(0), read(mask)),
    }
    yield Case("padded, fresh output", n, t, groups, 5 * n * t, providers, expected)
    providers = {
        "v05": lambda: fused_advantage(rewards, **options, out=buffer).advantages,
        FLOOR: lambda: (buffer.fill_(0), read(mask)),
    }
    yield Case("padded, out=", n, t, groups, 5 * n * t, providers, expected)

    token_rewards = torch.zeros(n, t).scatter_(1, lengths - 1, rewards[:, None])
    mask64 = mask.long()
    uid = np.array([f"{g:08x}-5f3a-4c1e-9d2b-7a6e5c4d3b2a" for g in range(groups)], dtype=object).repeat(GROUP_SIZE)
    providers = {
        "v05": lambda: fused_advantage(token_rewards, group_ids=uid, response_mask=mask64, method="grpo").advantages,
        FLOOR: lambda: (torch.empty(n, t).fill_(0), read(mask64), read(token_rewards)),
    }
    try:
        from verl.trainer.ppo import core_algos
    except ImportError as missing:
        print(f"verl is not timed: {missing}")
    else:
        vectorized, loop = core_algos.compute_grpo_vectorized_outcome_advantage, core_algos.compute_grpo_outcome_advantage
        providers["verl vectorized"] = lambda: vectorized(token_rewards, mask64, uid)[0]
        providers["verl loop"] = lambda: loop(token_rewards, mask64, uid)[0]
    yield Case("verl's tensors", n, t, groups, 16 * n * t, providers, expected)


def packed() -> Iterator[Case]:
    n = 4096
    groups = n // GROUP_SIZE
    generator = torch.Generator().manual_seed(0)
    cuts = torch.randint(0, PACKED_TOKENS + 1, (n - 1,), generator=generator).sort().values
    cu_seqlens = torch.cat((torch.tensor([0]), cuts, torch.tensor([PACKED_TOKENS])))
    rewards = torch.rand(n, generator=generator)
    ids = torch.arange(n) // GROUP_SIZE
    expected = grpo(rewards, ids).repeat_interleave(cu_seqlens.diff())
    buffer = torch.empty(PACKED_TOKENS)
    options = dict(group_offsets=torch.arange(0, n + 1, GROUP_SIZE), cu_seqlens=cu_seqlens, method="grpo")
    providers: dict[str, Provider] = {
        "v05": lambda: fused_advantage(rewards, **options).advantages,
        "plain torch": lambda: plain_torch(rewards, ids, groups).repeat_interleave(cu_seqlens.diff()),
        FLOOR: lambda: torch.empty(PACKED_TOKENS).fill_(0),
    }
    yield Case("packed, fresh output", n, PACKED_TOKENS, groups, 4 * PACKED_TOKENS, providers, expected)
    providers = {
        "v05": lambda: fused_advantage(rewards, **options, out=buffer).advantages,
        FLOOR: lambda: buffer.fill_(0),
    }
    yield Case("packed, out=", n, PACKED_TOKENS, groups, 4 * PACKED_TOKENS, providers, expected)


def rollouts() -> Iterator[Case]:
    """Per-rollout output, ids in random order: once ids that are positions, once ids of any value, once strings."""
    generator = torch.Generator().manual_seed(0)
    n, groups = ROLLOUTS, ROLLOUT_GROUPS
    ids = torch.randperm(n, generator=generator) // (n // groups)
    rewards = torch.rand(n, generator=generator)
    # The same formula as the reference, whose loop over groups would take minutes here.
    count, total = np.bincount(ids), np.bincount(ids, weights=rewards)
    deviation = rewards.double().numpy() - (total / count)[ids]
    variance = np.bincount(ids, weights=deviation**2) / (count - 1)
    expected = torch.from_numpy(deviation / (np.sqrt(variance) + 1e-6)[ids])
    options = dict(method="grpo", stats=False)
    providers: dict[str, Provider] = {
        "v05": lambda: fused_advantage(rewards, group_ids=ids, num_groups=groups, **options).advantages,
        "plain torch": lambda: plain_torch(rewards, ids, groups),
        FLOOR: lambda: (torch.empty(n).fill_(0), read(ids), read(rewards)),
    }
    yield Case("rollouts, ids are positions", n, 1, groups, 16 * n, providers, expected)

    scattered = ids * 1_000_003_000_017 - 2**60
    providers = {
        "v05": lambda: fused_advantage(rewards, group_ids=scattered, **options).advantages,
        "plain torch": lambda: plain_torch(rewards, torch.unique(scattered, return_inverse=True)[1], groups),
        FLOOR: lambda: (torch.empty(n).fill_(0), read(scattered), read(rewards)),
    }
    yield Case("rollouts, ids of any value", n, 1, groups, 16 * n, providers, expected)

    names = [f"prompt-{i}" for i in ids.tolist()]
    array = np.array(names, dtype=object)
    numbers = torch.from_numpy(np.unique(ids.numpy(), return_index=True)[1]).argsort().argsort()[ids].double()
    providers = {"v05": lambda: _core.factorize(array)[0], "v05, list": lambda: _core.factorize(names)[0]}
    try:
        import pandas as pd
    except ImportError as missing:
        print(f"pandas is not timed: {missing}")
    else:
        providers["pandas"] = lambda: pd.factorize(array)[0]
    yield Case("string ids to numbers", n, 1, groups, 16 * n, providers, numbers)


def versions() -> str:
    found = {"python": platform.python_version()}
    for name in ("torch", "numpy", "pandas", "verl"):
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return " ".join(f"{name}={version}" for name, version in found.items())


def device() -> str:
    """The processor's own name, and the widest instruction set torch sees."""
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    name = names[0] if names else platform.machine()
    return f"{name}, {torch.backends.cpu.get_cpu_capability()}, {torch.get_num_threads()} thread"


def main() -> None:
    torch.set_num_threads(1)
    describe = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty", "--exclude=*"]
    commit = subprocess.run(describe, capture_output=True, text=True, check=False).stdout.strip()
    RESULTS.parent.mkdir(exist_ok=True)
    with RESULTS.open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(FIELDS)
        for cases in (*(padded(n, t) for n, t in SHAPES), packed(), rollouts()):
            for case in cases:
                case.gate()
                times = case.measure()
                floor = float(np.median(times[FLOOR])) if FLOOR in times else float("nan")
                ours = float(np.median(times["v05"]))
                for provider, samples in times.items():
                    median, p20, p80 = np.median(samples), *np.percentile(samples, (20, 80))
                    sizes = (case.n, case.t, case.groups)
                    figures = (f"{x:.4f}" for x in (median, p20, p80))
                    about = (case.bytes, f"{floor:.4f}", device(), commit, versions())
                    writer.writerow((provider, case.name, *sizes, *figures, *about))
                    shape = f"{case.n} x {case.t}"
                    print(
                        f"{case.name:<28} {shape:<16} {provider:<16} {median:9.3f} ms"
                        f" {median / floor:6.2f} x floor {median / ours:7.2f} x v05"
                    )


if __name__ == "__main__":
    main()
