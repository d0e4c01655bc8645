"""Writing to disks that fill up, fail and lose power."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError


@contextmanager
def explained(path: Path, outlook: str) -> Iterator[None]:
    """An OSError that names `path`, the remedy and the `outlook` for any error of writing within."""
    try:
        yield
    except (OSError, SafetensorError) as error:  # safetensors wraps what the system said
        raise OSError(f"{path} cannot be written ({error}); make room or give write access, then call again: {outlook}") from error


def flush(path: Path) -> None:
    """Have the disk hold a file's contents, or a directory's names."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
