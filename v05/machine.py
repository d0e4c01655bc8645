"""Resources of this machine: the usable cores and the cache folder."""

from __future__ import annotations

import os
from pathlib import Path


def usable_cores() -> int:
    """The number of cores that this process may use. In a container it can be lower than the machine's."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def cache_root() -> Path:
    """The folder for cached warm starts and prompt features: $V05_CACHE, or ~/.cache/v05."""
    return Path(os.environ.get("V05_CACHE") or Path.home() / ".cache" / "v05")
