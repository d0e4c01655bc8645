"""Times the op on one thread at each level of x86-64 instructions: `python bench/instruction_sets.py [--write]`.

An installed core holds code for several levels and uses the best that the processor supports. This script builds a separate core
for each level, in build/, and runs processes of all levels in turns. A figure is the fastest of many calls, because other load can
only add time. --write puts the table into docs/speed.md.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import runpy
import subprocess
import sys
import sysconfig
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from headline import replaced
from machine import ROOT, commit, processor

LEVELS = {"x86-64-v3": "AVX2", "x86-64-v4": "AVX-512"}
PAGE = ROOT / "docs" / "speed.md"
MANY, FEW, GROUP_SIZE = 1_000_000, 4096, 4
TURNS, SECONDS = 3, 0.6  # turns of a level, and seconds per case in a turn


def cases() -> dict[str, Callable[[], Any]]:
    import torch
    from peers.inline import plain_torch

    from v05.ops import fused_advantage

    torch.set_num_threads(1)
    made: dict[str, Callable[[], Any]] = {}
    for n in (MANY, FEW):
        draw = torch.Generator().manual_seed(0)
        rewards, offsets = torch.randint(0, 2, (n,), generator=draw).float(), torch.arange(0, n + 1, GROUP_SIZE)
        prior = torch.rand(n // GROUP_SIZE, dtype=torch.float64, generator=draw)
        ids = (torch.arange(n) // GROUP_SIZE)[torch.randperm(n, generator=draw)]
        by_offset = {"rewards": rewards, "group_offsets": offsets, "out": torch.empty(n)}
        by_id = {"rewards": rewards, "group_ids": ids, "num_groups": n // GROUP_SIZE, "out": torch.empty(n)}
        calls = {
            "grpo": lambda a=by_offset: fused_advantage(**a, method="grpo"),
            "grpo, no statistics": lambda a=by_offset: fused_advantage(**a, method="grpo", stats=False),
            "v05": lambda a=by_offset, p=prior: fused_advantage(**a, prior=p),
            "v05, no statistics": lambda a=by_offset, p=prior: fused_advantage(**a, prior=p, stats=False),
            "calibrated": lambda a=by_offset, p=prior: fused_advantage(**a, prior=p, method="calibrated"),
            "grpo, ids in any order": lambda a=by_id: fused_advantage(**a, method="grpo"),
            "v05, ids in any order": lambda a=by_id, p=prior: fused_advantage(**a, prior=p),
            "plain torch's index_add, ids in any order": lambda r=rewards, i=ids, g=n // GROUP_SIZE: plain_torch(r, i, g),
        }
        made |= {f"{name}, {n:,}": call for name, call in calls.items()}
    return made


def measure(core: str) -> dict[str, float]:
    """Microseconds of the fastest call by case, with the core in the file `core`."""
    spec = importlib.util.spec_from_file_location("v05._core", core)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["v05._core"] = module  # before v05 imports its own core
    spec.loader.exec_module(module)
    figures = {}
    for name, call in cases().items():
        call()
        best, end = float("inf"), time.perf_counter() + SECONDS
        while time.perf_counter() < end:
            start = time.perf_counter()
            call()
            best = min(best, time.perf_counter() - start)
        figures[name] = best * 1e6
    return figures


def build(level: str) -> Path:
    folder = ROOT / "build" / "instruction_sets" / level
    folder.mkdir(parents=True, exist_ok=True)
    core = folder / f"_core{sysconfig.get_config_var('EXT_SUFFIX')}"
    build_core = runpy.run_path(str(ROOT / "packaging" / "in_place.py"))["build_core"]
    build_core(core, folder, f"-march={level}", "-DV05_MULTIVERSION=")
    return core


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true", help="put the table into docs/speed.md")
    parser.add_argument("--measure", metavar="CORE", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.measure:
        print(json.dumps(measure(arguments.measure)))
        return
    flags = Path("/proc/cpuinfo").read_text()
    levels = [level for level, flag in {"x86-64-v3": "avx2", "x86-64-v4": "avx512vl"}.items() if flag in flags]
    cores = {level: build(level) for level in levels}
    found: dict[str, dict[str, float]] = {level: {} for level in levels}
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    for turn in range(TURNS):
        for level in levels if turn % 2 == 0 else reversed(levels):
            print(f"turn {turn + 1} of {TURNS}: {level}", file=sys.stderr)
            command = [sys.executable, __file__, "--measure", str(cores[level])]
            done = subprocess.run(command, env=environment, check=True, stdout=subprocess.PIPE, text=True)
            for case, figure in json.loads(done.stdout).items():
                found[level][case] = min(figure, found[level].get(case, float("inf")))
    lines = [
        "| method, rollouts | " + " | ".join(f"{LEVELS[level]}, us" for level in levels) + " |",
        "|---" * (len(levels) + 1) + "|",
    ]
    for case in found[levels[0]]:
        method, _, n = case.rpartition(", ")
        lines.append(f"| {method}, {n} | " + " | ".join(f"{found[level][case]:,.0f}" for level in levels) + " |")
    table = "\n".join(lines) + "\n"
    print(table)
    if arguments.write:
        told = f"\n`python bench/instruction_sets.py --write` at commit {commit()}; the fastest calls on {processor()}, 1 thread.\n"
        PAGE.write_text(replaced(PAGE.read_text(), "instruction sets", table + told))


if __name__ == "__main__":
    main()
