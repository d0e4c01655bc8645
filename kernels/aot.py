"""Compile every kernel for a list of GPU targets without a GPU, and report what the compiler made of it.

    python -m v05.kernels.aot [--json FILE] [--csv FILE]

A variant is one way in which a launch calls its kernel. Every folder of this package is a kernel, and its `launch.py`
says which variants there are (`variants`) and what a launch moves (`traffic`). Registers are per thread; a spill or a stack
frame means that values live in slow memory; ld128 and st128 count the 128-bit global loads and stores in the code, without
which a bandwidth-bound kernel is slow; `instructions` is the length of the code, and `ahead` how many of them stand before the
first 128-bit store, that of the first tokens, or before the last store of a code without one. `bytes` is what all programs of a
launch ask of memory for a batch of ROLLOUTS x TOKENS, `floor_bytes` what a launch must move that reads its inputs and writes its
outputs once; what lies between them are a group's rewards, read again by each of its programs, mostly from cache. `occupancy` is
the share of a multiprocessor's warps that its registers allow to be resident.
"""

from __future__ import annotations

import argparse
import csv
import importlib
import itertools
import json
import multiprocessing
import os
import pkgutil
import re
import subprocess
import tempfile
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from types import ModuleType
from typing import Any

import triton
from triton.backends.compiler import GPUTarget

import v05.kernels
from v05.kernels.launcher import COMPILER_OPTIONS
from v05.kernels.variant import Variant

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
CUOBJDUMP = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"


@dataclass(frozen=True)
class Report:
    """What the compiler made of one variant for one target."""

    kernel: str
    variant: str
    target: str
    registers: int
    stack: int
    spill_bytes: int
    shared: int
    ld128: int
    st128: int
    instructions: int
    ahead: int
    bytes: int
    floor_bytes: int
    occupancy: float


def occupancy(target: str, registers: int, warps: int) -> float:
    """Share of a multiprocessor's warps that a program of `warps` warps leaves room for, by its registers alone."""
    allocated = -(-registers // 8) * 8  # registers are handed out in eights
    if TARGETS[target].backend == "hip":  # 512 vector registers a lane of each SIMD, 8 waves at most
        return min(8, 512 // allocated) / 8
    resident = 65536 // (allocated * 32 * warps) * warps
    return min(64, resident) / 64


def launches() -> Iterator[ModuleType]:
    """The launch of every kernel of this package."""
    for found in pkgutil.iter_modules(v05.kernels.__path__):
        if found.ispkg:
            yield importlib.import_module(f"v05.kernels.{found.name}.launch")


def report(launch: ModuleType, variant: Variant, target: str) -> Report:
    """Compile (or take from Triton's cache) and read the machine code."""
    compiled = triton.compile(variant.source(), TARGETS[target], COMPILER_OPTIONS[TARGETS[target].backend])
    read = _read_amdgcn if "amdgcn" in compiled.asm else _read_cubin
    code = read(compiled.asm)
    asked, floor = launch.traffic(variant)
    return Report(
        kernel=variant.kernel.__name__,
        variant=variant.name,
        target=target,
        shared=compiled.metadata.shared,
        bytes=asked,
        floor_bytes=floor,
        occupancy=occupancy(target, code["registers"], compiled.metadata.num_warps),
        **code,
    )


def _report_named(name: tuple[str, str, str]) -> Report:
    """The report of a variant that a process is told by name: (module, variant, target)."""
    module, wanted, target = name
    launch = importlib.import_module(module)
    return report(launch, next(variant for variant in launch.variants() if variant.name == wanted), target)


def _read_cubin(code: dict[str, Any]) -> dict[str, int]:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as cubin:
        cubin.write(code["cubin"])
        cubin.flush()
        command = [str(CUOBJDUMP), "-sass", "-res-usage", cubin.name]
        text = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    lines = re.findall(r"^\s*/\*[0-9a-f]{4,}\*/\s+(.*);", text, re.MULTILINE)
    spill_stores = re.findall(r"\bSTL(?:\.(64|128))?\b", text)
    return {
        "registers": _number(r"\bREG:(\d+)", text),
        "stack": _number(r"\bSTACK:(\d+)", text),
        "spill_bytes": sum(int(bits or 32) // 8 for bits in spill_stores),  # a spill is no LOCAL, it is an STL
        "ld128": len(re.findall(r"\bLDG[\w.]*\.128\b", text)),
        "st128": len(re.findall(r"\bSTG[\w.]*\.128\b", text)),
        **_ahead_of_stores(lines, r"\bSTG[\w.]*\.128\b", r"\bSTG\b"),
    }


def _read_amdgcn(code: dict[str, Any]) -> dict[str, int]:
    text = code["amdgcn"]
    return {
        "registers": _number(r"\.vgpr_count:\s*(\d+)", text),
        "stack": _number(r"\.private_segment_fixed_size:\s*(\d+)", text),
        "spill_bytes": 4 * _number(r"\.vgpr_spill_count:\s*(\d+)", text),
        "ld128": len(re.findall(r"\b(?:global|buffer)_load_dwordx4\b", text)),
        "st128": len(re.findall(r"\b(?:global|buffer)_store_dwordx4\b", text)),
        **_ahead_of_stores(re.findall(r"^\t([a-z]\w+ .*)$", text, re.MULTILINE), r"_store_dwordx4\b", r"_store_"),
    }


def _ahead_of_stores(lines: list[str], wide: str, any_width: str) -> dict[str, int]:
    """How many instructions there are, and how many before the first wide store or, where none is, before the last store."""
    wide_stores = [place for place, line in enumerate(lines) if re.search(wide, line)]
    stores = [place for place, line in enumerate(lines) if re.search(any_width, line)]
    return {"instructions": len(lines), "ahead": wide_stores[0] if wide_stores else stores[-1]}


def _number(pattern: str, text: str) -> int:
    found = re.search(pattern, text)
    if found is None:
        raise RuntimeError(f"the compiler's output has no {pattern!r}; its format must have changed")
    return int(found[1])


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m v05.kernels.aot", description=__doc__.split("\n")[0])
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the table as a list of records")
    parser.add_argument("--csv", type=Path, metavar="FILE", help="write the table as comma-separated values")
    arguments = parser.parse_args()
    if triton.knobs.runtime.interpret:
        parser.error("TRITON_INTERPRET is set: the interpreter compiles nothing; unset it")

    columns = [column.name for column in fields(Report)]
    print(f"{columns[0]:<25}{columns[1]:<34}{columns[2]:<8}" + "".join(f"{name:>12}" for name in columns[3:]))
    wanted = [
        (launch.__name__, variant.name, target)
        for launch in launches()
        for variant, target in itertools.product(launch.variants(), TARGETS)
    ]
    reports = []
    # Processes, since the compiler holds the interpreter; spawned, since Triton has threads.
    with ProcessPoolExecutor(os.cpu_count(), multiprocessing.get_context("spawn")) as pool:
        for made in pool.map(_report_named, wanted):
            row = asdict(made)
            told = "".join(f"{row[name]:>12}" for name in columns[3:])
            print(f"{row['kernel']:<25}{row['variant']:<34}{row['target']:<8}{told}", flush=True)
            reports.append(row)
    if arguments.json is not None:
        arguments.json.write_text(json.dumps(reports, indent=1) + "\n")
    if arguments.csv is not None:
        with arguments.csv.open("w", newline="") as file:
            writer = csv.DictWriter(file, columns)
            writer.writeheader()
            writer.writerows(reports)


if __name__ == "__main__":
    main()
