"""Compile every kernel for a list of GPU targets without a GPU, and report what the compiler made of it.

    python -m v05.kernels.aot [--json FILE] [--csv FILE]

A variant is one way in which a launcher calls its kernel. Registers are per thread; a spill or a stack frame means that
values live in slow memory; ld128 and st128 count the 128-bit global loads and stores in the code, without which a
bandwidth-bound kernel is slow. `bytes` is what all programs of a launch ask of memory for a batch of ROLLOUTS x TOKENS,
`floor_bytes` what a launch must move that reads its inputs and writes its outputs once; what lies between them are a
group's rewards, read again by each of its programs, mostly from cache. `occupancy` is the share of a multiprocessor's
warps that its registers allow to be resident.
"""

from __future__ import annotations

import argparse
import csv
import json
import re
import subprocess
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from v05.kernels import advantage, fusion
from v05.ops import TABLE_ROWS

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
ROLLOUTS, TOKENS, GROUPS = 4096, 2048, 256
ELEMENT_BYTES = {"u1": 1, "u8": 1, "bf16": 2, "fp32": 4, "i64": 8, "fp64": 8}
CUOBJDUMP = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"


@dataclass(frozen=True)
class Variant:
    """One way to call a kernel.

    Attributes:
        name: unique within the kernel.
        kernel: the jit function.
        pointers: element type of each pointer argument that is given; the others are None. All are 16-byte aligned, as
            torch allocates.
        constants: the constexpr arguments.
    """

    name: str
    kernel: Any
    pointers: dict[str, str]
    constants: dict[str, int | bool]

    def but(self, name: str, constants: dict[str, int | bool] | None = None, **pointers: str) -> Variant:
        return replace(self, name=name, pointers=self.pointers | pointers, constants=self.constants | (constants or {}))

    def source(self) -> ASTSource:
        signature: dict[str, str] = {}
        constants: dict[str, Any] = {}
        aligned = []
        for parameter in self.kernel.params:
            name = parameter.name
            if parameter.is_constexpr or (name.startswith("p_") and name not in self.pointers):
                signature[name] = "constexpr"
                constants[name] = self.constants.get(name)
            elif name.startswith("p_"):
                signature[name] = "*" + self.pointers[name]
                aligned.append(parameter.num)
            else:
                signature[name] = parameter.annotation_type or "i32"
                if name == "T":
                    aligned.append(parameter.num)
        attributes = {(num,): [["tt.divisibility", 16]] for num in aligned}
        return ASTSource(self.kernel, signature, constants, attributes)


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
    bytes: int
    floor_bytes: int
    occupancy: float


def traffic(variant: Variant) -> tuple[int, int]:
    """(bytes, floor_bytes) of one launch on ROLLOUTS x TOKENS in GROUPS equal groups, counted from the kernel's source."""
    size = {name: ELEMENT_BYTES[element] for name, element in variant.pointers.items()}
    tokens = ROLLOUTS * TOKENS
    if variant.kernel is advantage.sum_token_rewards_kernel:
        once = tokens * (size["p_token_rewards"] + size["p_mask"]) + ROLLOUTS * size["p_rewards"]
        return once, once
    per_rollout = not {"p_mask", "p_cu_seqlens"} & variant.pointers.keys()
    _, splits, chunks = advantage.launch_shape(ROLLOUTS, GROUPS, None if per_rollout else TOKENS, advantage.MAX_BLOCK_ROWS)
    row = sum(size.get(name, 0) for name in ("p_rewards", "p_order", "p_valid"))  # what a rollout is read as
    group = 2 * size["p_offsets"] + size.get("p_prior", 0)
    outputs = (ROLLOUTS if per_rollout else tokens) * size["p_out"] + tokens * size.get("p_mask", 0)
    outputs += GROUPS * TABLE_ROWS[variant.constants["BASELINE"]] * size["p_table"]
    lengths = ROLLOUTS * chunks * 2 * size.get("p_cu_seqlens", 0)
    statistics = 2 * ROLLOUTS // GROUPS * (row + size.get("p_counted", 0)) + group  # two passes over a group
    asked = GROUPS * splits * chunks * statistics + ROLLOUTS * chunks * row + lengths + outputs
    floor = ROLLOUTS * (row + size.get("p_counted", 0)) + GROUPS * group + lengths // (2 * chunks) + outputs
    return asked, floor


def occupancy(target: str, registers: int, warps: int) -> float:
    """Share of a multiprocessor's warps that a program of `warps` warps leaves room for, by its registers alone."""
    allocated = -(-registers // 8) * 8  # registers are handed out in eights
    if TARGETS[target].backend == "hip":  # 512 vector registers a lane of each SIMD, 8 waves at most
        return min(8, 512 // allocated) / 8
    resident = 65536 // (allocated * 32 * warps) * warps
    return min(64, resident) / 64


def variants() -> Iterator[Variant]:
    """Every layout with every baseline in float32, then each other choice once, on padded shrinkage; calibrated, whose baseline
    differs from rollout to rollout under leave-one-out, has that on scalars and on the largest blocks."""
    statistics = {"p_table": "fp64"}
    inputs = {"p_rewards": "fp32", "p_offsets": "i64", "p_order": "i64", "p_prior": "fp64"}
    layouts = {"padded": {"p_mask": "u8"}, "packed": {"p_cu_seqlens": "i64"}, "per-rollout": {}}
    baselines = {
        "mean": fusion.GROUP_MEAN,
        "prior": fusion.PRIOR,
        "shrinkage": fusion.SHRINKAGE,
        "calibrated": fusion.CALIBRATED,
    }
    plain = {
        "SCALE": advantage.UNSCALED.value,
        "LEAVE_ONE_OUT": False,
        "RAW_SINGLETON": False,
        "BLOCK_ROWS": 16,
        "BLOCK_T": advantage.BLOCK_T,
    }
    made = {}
    for layout, pointers in layouts.items():
        for baseline, number in baselines.items():
            name = f"{layout}-{baseline}"
            made[name] = Variant(
                name,
                advantage.fused_advantage_kernel,
                inputs | statistics | pointers | {"p_out": "fp32"},
                plain | {"BASELINE": number.value},
            )
    yield from made.values()
    base = made["padded-shrinkage"]
    yield base.but("padded-shrinkage-valid-counted", p_valid="u1", p_counted="u1")
    yield base.but("padded-shrinkage-leave-one-out", {"LEAVE_ONE_OUT": True})
    yield base.but("padded-shrinkage-group-scale", {"SCALE": advantage.GROUP_SCALE.value})
    yield base.but("padded-shrinkage-batch-scale", {"SCALE": advantage.BATCH_SCALE.value}, p_batch_divisor="fp64")
    yield base.but("padded-shrinkage-large-groups", {"BLOCK_ROWS": advantage.MAX_BLOCK_ROWS})
    yield base.but("padded-shrinkage-int64-mask", p_mask="i64")
    yield base.but("padded-shrinkage-float32-mask", p_mask="fp32")
    yield base.but("padded-shrinkage-bfloat16", p_out="bf16")
    yield base.but("padded-shrinkage-float64", p_rewards="fp64", p_out="fp64")
    yield made["padded-calibrated"].but("padded-calibrated-leave-one-out", {"LEAVE_ONE_OUT": True})
    blocks = {"LEAVE_ONE_OUT": True, "BLOCK_ROWS": advantage.CALIBRATED_BLOCK_ROWS}
    yield made["per-rollout-calibrated"].but("per-rollout-calibrated-leave-one-out", blocks)
    for mask, element in {"uint8": "u8", "int64": "i64", "float32": "fp32"}.items():
        yield Variant(
            f"{mask}-mask",
            advantage.sum_token_rewards_kernel,
            {"p_token_rewards": "fp32", "p_mask": element, "p_rewards": "fp64"},
            {"BLOCK_T": advantage.BLOCK_T},
        )


def report(variant: Variant, target: str) -> Report:
    """Compile (or take from Triton's cache) and read the machine code."""
    compiled = triton.compile(variant.source(), TARGETS[target], advantage.COMPILER_OPTIONS[TARGETS[target].backend])
    read = _read_amdgcn if "amdgcn" in compiled.asm else _read_cubin
    code = read(compiled.asm)
    asked, floor = traffic(variant)
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


def _read_cubin(code: dict[str, Any]) -> dict[str, int]:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as cubin:
        cubin.write(code["cubin"])
        cubin.flush()
        command = [str(CUOBJDUMP), "-sass", "-res-usage", cubin.name]
        text = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    spill_stores = re.findall(r"\bSTL(?:\.(64|128))?\b", text)
    return {
        "registers": _number(r"\bREG:(\d+)", text),
        "stack": _number(r"\bSTACK:(\d+)", text),
        "spill_bytes": sum(int(bits or 32) // 8 for bits in spill_stores),  # a spill is no LOCAL, it is an STL
        "ld128": len(re.findall(r"\bLDG[\w.]*\.128\b", text)),
        "st128": len(re.findall(r"\bSTG[\w.]*\.128\b", text)),
    }


def _read_amdgcn(code: dict[str, Any]) -> dict[str, int]:
    text = code["amdgcn"]
    return {
        "registers": _number(r"\.vgpr_count:\s*(\d+)", text),
        "stack": _number(r"\.private_segment_fixed_size:\s*(\d+)", text),
        "spill_bytes": 4 * _number(r"\.vgpr_spill_count:\s*(\d+)", text),
        "ld128": len(re.findall(r"\b(?:global|buffer)_load_dwordx4\b", text)),
        "st128": len(re.findall(r"\b(?:global|buffer)_store_dwordx4\b", text)),
    }


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
    if not isinstance(advantage.fused_advantage_kernel, triton.JITFunction):
        parser.error("TRITON_INTERPRET is set: the interpreter compiles nothing; unset it")

    columns = [column.name for column in fields(Report)]
    print(f"{columns[0]:<25}{columns[1]:<34}{columns[2]:<8}" + "".join(f"{name:>12}" for name in columns[3:]))
    reports = []
    for variant in variants():
        for target in TARGETS:
            row = asdict(report(variant, target))
            print(f"{row['kernel']:<25}{row['variant']:<34}{target:<8}" + "".join(f"{row[name]:>12}" for name in columns[3:]))
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
