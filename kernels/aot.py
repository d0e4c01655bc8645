"""Compile every kernel for a list of GPU targets without a GPU, and report properties of the machine code.

    python -m v05.kernels.aot [--json FILE] [--csv FILE] [--known FILE]

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
- `ir`: a hash of the intermediate code that Triton's front end makes of the variant.
- `triton`: the version of Triton whose back end compiled that code.

With --known, a row of an earlier table is taken over if its `ir` and `triton` are still the variant's. Only the other variants are
compiled.
"""

from __future__ import annotations

import argparse
import csv
import hashlib
import importlib
import itertools
import json
import multiprocessing
import os
import pkgutil
import re
import struct
import subprocess
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from types import ModuleType
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler.compiler import ir as triton_ir
from triton.compiler.compiler import make_backend

import v05.kernels
from v05.kernels.launcher import COMPILER_OPTIONS
from v05.kernels.variant import Variant

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
NVIDIA_TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
VARIANTS_AT_ONCE = 10  # disassembled together, because NVIDIA's disassembler takes 0.2 s to start
INSTRUCTION = re.compile(r"^\s*/\*([0-9a-f]{4,})\*/\s+(.*);", re.MULTILINE)
LOCATION = re.compile(r"^#loc.*\n| loc\((?:[^()]|\([^()]*\))*\)", re.MULTILINE)  # lines of the source, which change with comments


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
    ir: str
    triton: str


OF_THE_CODE = ("registers", "stack", "spill_bytes", "shared", "ld128", "st128", "instructions", "ahead")  # columns
Known = Mapping[tuple[str, str, str, str], Mapping[str, int]]  # (kernel, variant, target, ir): columns OF_THE_CODE


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
    return reports([(launch, variant)], target)[0]


def reports(variants: Sequence[tuple[ModuleType, Variant]], target: str, known: Known | None = None) -> list[Report]:
    """The reports of several variants. Variants that are in `known` are not compiled."""
    options = COMPILER_OPTIONS[TARGETS[target].backend]
    hashes = [ir_of(variant, target) if known else "" for _, variant in variants]
    codes = [
        (known or {}).get((variant.kernel.__name__, variant.name, target, of_ir))
        for (_, variant), of_ir in zip(variants, hashes, strict=True)
    ]
    unknown = [place for place, code in enumerate(codes) if code is None]
    compiled = [triton.compile(variants[place][1].source(), TARGETS[target], options) for place in unknown]
    read = _read_amdgcn if TARGETS[target].backend == "hip" else _read_cubins
    for place, made, code in zip(unknown, compiled, read([made.asm for made in compiled], target), strict=True):
        codes[place] = {**code, "shared": made.metadata.shared}
        hashes[place] = hash_of(made.asm["source"], target)
    made_of = []
    for (launch, variant), code, of_ir in zip(variants, codes, hashes, strict=True):
        assert code is not None
        asked, floor = launch.traffic(variant)
        made_of.append(
            Report(
                kernel=variant.kernel.__name__,
                variant=variant.name,
                target=target,
                bytes=asked,
                floor_bytes=floor,
                occupancy=occupancy(target, code["registers"], options["num_warps"]),
                ir=of_ir,
                triton=triton.__version__,
                **code,
            )
        )
    return made_of


def ir_of(variant: Variant, target: str) -> str:
    """The hash of a variant's intermediate code. Only Triton's front end runs, which is quick."""
    backend = make_backend(TARGETS[target])
    options = backend.parse_options(dict(COMPILER_OPTIONS[TARGETS[target].backend]))
    context = triton_ir.context()
    triton_ir.load_dialects(context)
    backend.load_dialects(context)
    of_backend = (backend.get_codegen_implementation(options), backend.get_module_map())
    return hash_of(str(variant.source().make_ir(TARGETS[target], options, *of_backend, context)), target)


def hash_of(code: str, target: str) -> str:
    """A hash of intermediate code, without its lines in the source, and of the compiler's options."""
    options = sorted(COMPILER_OPTIONS[TARGETS[target].backend].items())
    return hashlib.sha256(f"{options}\n{LOCATION.sub('', code)}".encode()).hexdigest()[:16]


def read_known(path: Path) -> Known:
    """The rows of a table written by --csv that the installed version of Triton compiled."""
    with path.open(newline="") as file:
        return {
            (row["kernel"], row["variant"], row["target"], row["ir"]): {name: int(row[name]) for name in OF_THE_CODE}
            for row in csv.DictReader(file)
            if row.get("triton") == triton.__version__
        }


def _reports_named(names: Sequence[tuple[str, str]], known: Known) -> list[Report]:
    """The reports, for every target, of the variants with these (module, variant). Worker processes get the names in place of the
    variants."""
    variants = []
    for module, wanted in names:
        launch = importlib.import_module(module)
        variants.append((launch, next(variant for variant in launch.variants() if variant.name == wanted)))
    by_target = [reports(variants, target, known) for target in TARGETS]
    return [made for of_variant in zip(*by_target, strict=True) for made in of_variant]


def _read_cubins(codes: Sequence[Mapping[str, Any]], target: str) -> list[dict[str, int]]:
    """One disassembly of all machine code, one after the other; only the targets of jumps are then other than in each alone."""
    if not codes:
        return []
    texts = [_machine_code(code["cubin"]) for code in codes]
    with tempfile.NamedTemporaryFile(suffix=".bin") as binary:
        binary.write(b"".join(texts))
        binary.flush()
        command = [str(NVIDIA_TOOLS / "nvdisasm"), "--no-dataflow", "--binary", target.replace("sm_", "SM"), binary.name]
        told = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    placed = [(int(address, 16), line) for address, line in INSTRUCTION.findall(told)]
    ends = list(itertools.accumulate(map(len, texts)))
    read = []
    for code, text, end in zip(codes, texts, ends, strict=True):
        lines = [line for address, line in placed if end - len(text) <= address < end]
        if len(lines) != len(text) // 16:  # bytes of an instruction
            raise RuntimeError(f"{len(lines)} instructions of {len(text)} bytes; the disassembler's output must have changed")
        joined = "\n".join(lines)
        spill_stores = re.findall(r"\bSTL(?:\.(64|128))?\b", joined)
        read.append(
            _resources(code["cubin"])
            | {
                "spill_bytes": sum(int(bits or 32) // 8 for bits in spill_stores),  # a spill is no LOCAL, it is an STL
                "ld128": len(re.findall(r"\bLDG[\w.]*\.128\b", joined)),
                "st128": len(re.findall(r"\bSTG[\w.]*\.128\b", joined)),
                **_ahead_of_stores(lines, r"\bSTG[\w.]*\.128\b", r"\bSTG\b"),
            }
        )
    return read


def _machine_code(cubin: bytes) -> bytes:
    """The section .text.NAME of an ELF file of 64 bits with one kernel."""
    (table,) = struct.unpack_from("<Q", cubin, 0x28)
    size, count, of_names = struct.unpack_from("<HHH", cubin, 0x3A)
    sections = [struct.unpack_from("<II8x8xQQ", cubin, table + i * size) for i in range(count)]  # name, type, offset, length
    names = sections[of_names][2]
    (found,) = (section for section in sections if cubin.startswith(b".text.", names + section[0]))
    return cubin[found[2] : found[2] + found[3]]


def _resources(cubin: bytes) -> dict[str, int]:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [str(NVIDIA_TOOLS / "cuobjdump"), "-res-usage", file.name]
        text = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    return {"registers": _number(r"\bREG:(\d+)", text), "stack": _number(r"\bSTACK:(\d+)", text)}


def _read_amdgcn(codes: Sequence[Mapping[str, Any]], _: str) -> list[dict[str, int]]:
    return [
        {
            "registers": _number(r"\.vgpr_count:\s*(\d+)", text),
            "stack": _number(r"\.private_segment_fixed_size:\s*(\d+)", text),
            "spill_bytes": 4 * _number(r"\.vgpr_spill_count:\s*(\d+)", text),
            "ld128": len(re.findall(r"\b(?:global|buffer)_load_dwordx4\b", text)),
            "st128": len(re.findall(r"\b(?:global|buffer)_store_dwordx4\b", text)),
            **_ahead_of_stores(re.findall(r"^\t([a-z]\w+ .*)$", text, re.MULTILINE), r"_store_dwordx4\b", r"_store_"),
        }
        for text in (code["amdgcn"] for code in codes)
    ]


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
    parser.add_argument("--known", type=Path, metavar="FILE", help="compile only what this table of --csv does not know")
    arguments = parser.parse_args()
    if triton.knobs.runtime.interpret:
        parser.error("TRITON_INTERPRET is set, and the interpreter compiles nothing; unset it")

    columns = [column.name for column in fields(Report)]
    print(f"{columns[0]:<25}{columns[1]:<34}{columns[2]:<8}" + "".join(f"{name:>12}" for name in columns[3:-2]))
    known = {} if arguments.known is None else read_known(arguments.known)
    wanted = [(launch.__name__, variant.name) for launch in launches() for variant in launch.variants()]
    batches = [wanted[i : i + VARIANTS_AT_ONCE] for i in range(0, len(wanted), VARIANTS_AT_ONCE)]
    rows = []
    # Processes, since the compiler holds the interpreter; spawned, since Triton has threads.
    with ProcessPoolExecutor(os.cpu_count(), multiprocessing.get_context("spawn")) as pool:
        for made in itertools.chain.from_iterable(pool.map(_reports_named, batches, itertools.repeat(known))):
            row = asdict(made)
            told = "".join(f"{row[name]:>12}" for name in columns[3:-2])
            print(f"{row['kernel']:<25}{row['variant']:<34}{row['target']:<8}{told}", flush=True)
            rows.append(row)
    if arguments.json is not None:
        arguments.json.write_text(json.dumps(rows, indent=1) + "\n")
    if arguments.csv is not None:
        with arguments.csv.open("w", newline="") as file:
            writer = csv.DictWriter(file, columns)
            writer.writeheader()
            writer.writerows(rows)


if __name__ == "__main__":
    main()
