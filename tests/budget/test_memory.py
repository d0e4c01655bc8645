"""If memory runs out anywhere in a call, the allocator stays as it was before the call."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def test_a_call_without_memory_changes_nothing(tmp_path: Path) -> None:
    if shutil.which("g++") is None:
        pytest.skip("needs g++")
    program = tmp_path / "memory"
    sources = [Path(__file__).with_name("allocator_memory.cpp"), *(ROOT / "csrc" / "allocator").glob("*.cpp")]
    options = ["-std=c++20", "-O1", "-pthread", f"-I{ROOT / 'csrc' / 'include'}"]
    env = {**os.environ, "LD_PRELOAD": ""}  # without the library of a sanitizer
    subprocess.run(["g++", *options, "-o", program, *sources], check=True, env=env)
    result = subprocess.run([program], capture_output=True, text=True, check=False, env=env, timeout=120)
    assert (result.returncode, result.stdout) == (0, "ok\n"), result.stdout + result.stderr
