"""What this machine gives: cores to use, and a folder to keep things in."""

from __future__ import annotations

import os
from pathlib import Path


def usable_cores() -> int:
    """Cores this process may use, which in a container are fewer than the machine's."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def cache_root() -> Path:
    """Where warm starts and prompts' features are kept: $V05_CACHE, or ~/.cache/v05."""
    return Path(os.environ.get("V05_CACHE") or Path.home() / ".cache" / "v05")
