"""Describes what a figure was measured on: machine, commit and versions, the last columns of every file of results."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
from importlib import metadata
from pathlib import Path

ROOT = Path(__file__).parents[1]


def processor() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def commit() -> str:
    """The checked-out commit, with "-dirty" if any file differs from it except those that benchmarks write.

    In a copy of the tree without git history it is the variable V05_COMMIT, or "unknown".
    """
    if given := os.environ.get("V05_COMMIT"):
        return given
    if shutil.which("git") is None:
        return "unknown"

    def git(*arguments: str) -> str:
        return subprocess.run(["git", "-C", str(ROOT), *arguments], capture_output=True, text=True, check=False).stdout.strip()

    changed = git("status", "--porcelain", "--untracked-files=no", "--", ".", ":!bench/results", ":!README.md", ":!docs")
    found = git("describe", "--always", "--exclude=*")
    return found + ("-dirty" if changed else "") if found else "unknown"


def versions(*packages: str) -> str:
    """The versions of Python and of the installed ones among `packages`."""
    found = {"python": platform.python_version()}
    for name in packages:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return " ".join(f"{name}={version}" for name, version in found.items())
