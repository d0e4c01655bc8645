"""If memory runs out anywhere in a call, the allocator stays as it was before the call."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

from helpers.programs import ENVIRONMENT, build_with_allocator


def test_a_call_without_memory_changes_nothing(tmp_path: Path) -> None:
    if shutil.which("g++") is None:
        pytest.skip("needs g++")
    program = tmp_path / "memory"
    build_with_allocator(Path(__file__).with_name("allocator_memory.cpp"), program, ["-O1"])
    result = subprocess.run([program], capture_output=True, text=True, check=False, env=ENVIRONMENT, timeout=120)
    assert (result.returncode, result.stdout) == (0, "ok\n"), result.stdout + result.stderr
