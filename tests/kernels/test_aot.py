"""Every kernel variant compiles for every target without a GPU, does not spill, and moves tokens 128 bits at a time."""

import csv
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

KNOWN = Path(__file__).parents[2] / "bench" / "results" / "aot.csv"


def aot(*arguments: str, cwd, **environment: str) -> subprocess.CompletedProcess:
    """Run in a process of its own, because this one uses the interpreter, and outside the repository, whose v05/ lacks the core."""
    others = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "v05.kernels.aot", *arguments]
    return subprocess.run(command, cwd=cwd, env=others | environment, capture_output=True, text=True)


@pytest.fixture(scope="module")
def recorded():
    """What the repository knows of each variant. It stands in for compiling a variant whose intermediate code, and compiler, are
    still those of the record.
    """
    with KNOWN.open(newline="") as file:
        return list(csv.DictReader(file))


@pytest.fixture(scope="module")
def compiled(recorded):
    """(kernel, variant) of the first variant of each kernel, which is compiled whatever is known."""
    first = {}
    for row in recorded:
        first.setdefault(row["kernel"], row["variant"])
    return set(first.items())


@pytest.fixture(scope="module")
def reports(recorded, compiled, tmp_path_factory):
    folder = tmp_path_factory.mktemp("aot")
    with (folder / "known.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, recorded[0])
        writer.writeheader()
        writer.writerows(row for row in recorded if (row["kernel"], row["variant"]) not in compiled)
    done = aot("--json", "reports.json", "--known", "known.csv", cwd=folder)
    assert done.returncode == 0, done.stderr
    return json.loads((folder / "reports.json").read_text())


def test_the_record_says_what_the_compiler_makes(reports, recorded):
    rows = {(row["kernel"], row["variant"], row["target"]): row for row in recorded}
    for report in reports:
        row = rows.get((report["kernel"], report["variant"], report["target"]), {})
        if (report["ir"], report["triton"]) == (row.get("ir"), row.get("triton")):
            assert {name: str(value) for name, value in report.items()} == row


def test_every_variant_for_every_target(reports):
    compiled = {(report["kernel"], report["variant"], report["target"]) for report in reports}
    assert len(compiled) == len(reports)
    kernels = {kernel for kernel, _, _ in compiled}
    assert kernels == {
        "add_up_kernel",
        "fused_advantage_kernel",
        "group_moments_kernel",
        "group_rows_kernel",
        "policy_loss_kernel",
        "statistics_kernel",
        "sum_token_rewards_kernel",
        "write_gradient_kernel",
    }
    variants = {(kernel, variant) for kernel, variant, _ in compiled}
    targets = ("sm_80", "sm_90", "sm_100", "gfx942")
    assert compiled == {(*variant, target) for variant in variants for target in targets}


def test_no_spills(reports):
    assert [report for report in reports if report["spill_bytes"] or report["stack"]] == []


def test_tokens_move_128_bits_at_a_time(reports):
    """On gfx942 a warp has 64 threads, so each thread of a block gets only 8 tokens: 64 bits of a uint8 mask."""
    for report in reports:
        loads_mask = report["variant"].startswith("padded")
        narrow_mask = report["target"] == "gfx942" and not report["variant"].endswith(("int64-mask", "float32-mask"))
        narrow_mask |= report["variant"].endswith("bits-mask")  # a load of 32 bits holds 32 tokens
        if report["kernel"] == "sum_token_rewards_kernel" or (loads_mask and not narrow_mask):
            assert report["ld128"] > 0, report
        if loads_mask or report["variant"].startswith("packed"):
            assert report["st128"] > 0, report
        if report["kernel"] in ("add_up_kernel", "write_gradient_kernel"):
            assert report["ld128"] > 0, report
        if report["kernel"] == "write_gradient_kernel" and not report["variant"].endswith("elsewhere"):
            assert report["st128"] > 0, report


def test_traffic_is_near_its_floor(reports):
    for report in reports:
        assert report["floor_bytes"] <= report["bytes"], report
        of_rollouts = report["kernel"] in ("group_moments_kernel", "group_rows_kernel")
        by_token = not (of_rollouts or report["variant"].startswith("per-rollout"))
        # A ratio or weight per sequence needs a first pass over a rollout's own tokens, which the second pass finds in the cache.
        twice = report["kernel"] == "policy_loss_kernel" and any(name in report["variant"] for name in ("sequence", "everything"))
        if by_token:  # all other kernels read few bytes, mostly a group's rewards, and read these two or three times
            assert report["bytes"] < (1.8 if twice else 1.1) * report["floor_bytes"], report


def test_registers_leave_warps_resident(reports):
    for report in reports:
        if report["kernel"] == "fused_advantage_kernel":
            # The mask of the next rollout is loaded while one is stored, so that few warps keep the memory busy. The fewer the
            # warps, the more bytes of the mask lie in registers.
            many = ("calibrated", "least-variance", "int64-mask")
            assert report["occupancy"] >= (0.25 if any(name in report["variant"] for name in many) else 0.3125), report


def test_says_that_the_interpreter_compiles_nothing(tmp_path):
    done = aot(cwd=tmp_path, TRITON_INTERPRET="1")
    assert done.returncode != 0
    assert "unset" in done.stderr
