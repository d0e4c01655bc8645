"""Compile every kernel for a list of GPU targets without a GPU, and report properties of the machine code.

    python -m v05.kernels.aot [--json FILE] [--csv FILE]

A variant is one way in which a launch calls its kernel. Every folder of this package is a kernel. Its `launch.py` has the function
`variants`, which yields the variants, and `traffic`, which counts the bytes that a launch moves. The columns of the report are

- `registers`: registers per thread.
- `stack`, `spill_bytes`: bytes per thread. A spill or a stack frame means that values are kept in slow memory.
- `shared`: bytes of shared memory.
- `ld128`, `st128`: numbers of 128-bit global loads and stores. Without them a kernel that is bound by bandwidth is slow.
- `instructions`: the length of the code.
- `ahead`: how many instructions precede the first 128-bit store (of the first tokens), or the last store if none is 128 bits wide.
- `bytes`: the bytes that all programs of a launch request for a batch of ROLLOUTS x TOKENS.
- `floor_bytes`: the bytes of a launch that reads its inputs and writes its outputs once. The difference to `bytes` are mostly the
  rewards of a group, which each of its programs reads again, usually from the cache.
- `occupancy`: the share of a multiprocessor's warps that can be resident with so many registers.
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
    """The properties of one variant's machine code for one target, as the docstring of this module explains them."""

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
    """The share of a multiprocessor's warps that can be resident in programs of `warps` warps, by their registers alone."""
    allocated = -(-registers // 8) * 8  # registers are allocated in units of 8
    if TARGETS[target].backend == "hip":  # each SIMD has 512 vector registers per lane, and at most 8 waves
        return min(8, 512 // allocated) / 8
    resident = 65536 // (allocated * 32 * warps) * warps
    return min(64, resident) / 64


def launches() -> Iterator[ModuleType]:
    """Yield the `launch` module of every kernel."""
    for found in pkgutil.iter_modules(v05.kernels.__path__):
        if found.ispkg:
            yield importlib.import_module(f"v05.kernels.{found.name}.launch")


def report(launch: ModuleType, variant: Variant, target: str) -> Report:
    """Compile a variant, or take it from Triton's cache, and analyse its machine code."""
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
    """The report of the variant with this (module, variant, target), which worker processes get in place of the variant."""
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
        "spill_bytes": sum(int(bits or 32) // 8 for bits in spill_stores),  # a spill is an STL; LOCAL does not count it
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
    """The number of instructions, and of those before the first wide store, or before the last store if none is wide."""
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
        parser.error("TRITON_INTERPRET is set, and the interpreter compiles nothing; unset it")

    columns = [column.name for column in fields(Report)]
    print(f"{columns[0]:<25}{columns[1]:<34}{columns[2]:<8}" + "".join(f"{name:>12}" for name in columns[3:]))
    wanted = [
        (launch.__name__, variant.name, target)
        for launch in launches()
        for variant, target in itertools.product(launch.variants(), TARGETS)
    ]
    reports = []
    # Processes, because the compiler holds the interpreter lock. They are spawned, because Triton has threads.
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
