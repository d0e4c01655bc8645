"""Writing to disks that fill up, fail and lose power."""

from __future__ import annotations

import os
import secrets
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


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A scratch file beside `path`; what is written to it within takes the place of `path`, whole, or nothing changes. The folder
    is made if need be."""
    path.parent.mkdir(parents=True, exist_ok=True)
    # Processes of one node or several, which may have the same number in their containers, may write the same file.
    scratch = path.with_name(f"{path.name}.{secrets.token_hex(4)}.partial")
    try:
        yield scratch
        flush(scratch)
        os.replace(scratch, path)
    finally:
        scratch.unlink(missing_ok=True)


def flush(path: Path) -> None:
    """Have the disk hold a file's contents, or a directory's names."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
