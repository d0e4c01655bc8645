"""Checkpoints, from which a run resumes after any interruption, including `kill -9` and power cuts. They contain no pickle.

A checkpoint is a directory RUN/checkpoint-STEP of safetensors files, state.json, allocator.bin and a manifest with the size and
SHA-256 of each file. It is written under a temporary name, flushed to the disk and renamed, so a directory with the final name is
always complete. The previous checkpoint is kept, in case the newest one is damaged later. This module reads and deletes only
directories whose name has exactly this form, and no symbolic links, because other files in a run directory may belong to the user.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from v05 import __version__
from v05.files import explained, flush, flush_folder, read_object, sha256

FORMAT = 1  # of the files; newer versions of v05 must keep reading old formats, older versions refuse newer ones
KEPT = 2  # checkpoints that stay in a run directory
MANIFEST, STATE, ALLOCATOR, TENSORS = "manifest.json", "state.json", "allocator.bin", ".safetensors"
PARTIAL = ".partial"  # suffix of directories that are being written or deleted; they are never read
MAX_SHARE = 0.01  # largest share of a run's time that writing checkpoints may take


@dataclass(frozen=True)
class Checkpoint:
    """The state of a run between two steps.

    Attributes:
        state: counters, cursors and other JSON values.
        tensors: file name -> tensor name -> tensor. Tensors on any device can be written; they are read back to the CPU.
        allocator: the allocator's snapshot.
    """

    state: dict[str, Any]
    tensors: dict[str, dict[str, torch.Tensor]]
    allocator: bytes


class DamagedCheckpointError(ValueError):
    """A checkpoint file is missing, cut short or changed since it was written."""


class CheckpointSchedule:
    """Decides when the next checkpoint is due: `seconds` after the last one, or later if writing takes more than MAX_SHARE.

    The first checkpoint is due at once. With `seconds` = 0 a checkpoint is due after every step.
    """

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds
        self._next = 0.0

    def due(self) -> bool:
        return time.monotonic() >= self._next

    def written(self, cost: float) -> None:
        """Note that a checkpoint has just been written, which took `cost` seconds."""
        self._next = time.monotonic() + (max(self._seconds, cost / MAX_SHARE) if self._seconds else 0.0)


def write_checkpoint(directory: Path, step: int, checkpoint: Checkpoint) -> None:
    """Write a checkpoint to a run directory, completely or not at all, and delete all but the newest KEPT.

    Raises:
        OSError: the disk is full or the directory cannot be written. Earlier checkpoints stay as they were.
    """
    target = directory / name_of(step)
    scratch = target.with_suffix(PARTIAL)
    earlier = find_checkpoints(directory)
    outlook = f"{earlier[-1].name} is intact and the run resumes from it" if earlier else "the run starts over"
    with explained(target, outlook):
        scratch.mkdir()
        try:
            _write_files(scratch, checkpoint)
            os.replace(scratch, target)
        except Exception:
            shutil.rmtree(scratch, ignore_errors=True)
            raise
        flush(directory)
    for path in find_checkpoints(directory)[:-KEPT]:
        _delete(path)


def name_of(step: int) -> str:
    """The name of the checkpoint directory of this step."""
    return f"checkpoint-{step:08d}"


def _write_files(directory: Path, checkpoint: Checkpoint) -> None:
    for name, tensors in checkpoint.tensors.items():
        save_file(tensors, directory / (name + TENSORS))
    (directory / STATE).write_text(json.dumps(checkpoint.state, indent=1, allow_nan=False), encoding="utf-8")
    (directory / ALLOCATOR).write_bytes(checkpoint.allocator)
    files = {path.name: _fingerprint(path) for path in sorted(directory.iterdir())}
    manifest = {"format": FORMAT, "v05": __version__, "files": files}
    (directory / MANIFEST).write_text(json.dumps(manifest, indent=1), encoding="utf-8")
    flush_folder(directory)


def newest_checkpoint(directory: Path, report: Callable[[str], None]) -> Path | None:
    """The newest checkpoint whose files are intact; None if there is no checkpoint.

    Deletes damaged checkpoints and unfinished directories; `report` gets a line for each damaged one.

    Raises:
        ValueError: all checkpoints are damaged, or one has a newer format. Nothing is deleted then.
    """
    damaged: dict[Path, str] = {}
    sound = None
    for path in reversed(find_checkpoints(directory)):
        try:
            verify_checkpoint(path)
        except DamagedCheckpointError as error:
            damaged[path] = str(error)
        else:
            sound = path
            break
    if damaged and sound is None:
        reasons = "; ".join(damaged.values())
        raise ValueError(f"{directory} holds no intact checkpoint: {reasons}; delete them to start the run over")
    for path, reason in damaged.items():
        report(f"{reason}; deleted this checkpoint, an earlier one takes its place")
        _delete(path)
    for path in _written(directory, PARTIAL):
        shutil.rmtree(path)
    return sound


def find_checkpoints(directory: Path) -> list[Path]:
    """The checkpoints of a run directory, oldest first."""
    return _written(directory, "")


def _written(directory: Path, suffix: str) -> list[Path]:
    """The directories named as by `name_of`, followed by `suffix`, in the order of their steps. Symbolic links are left out."""
    found = {}
    for path in directory.glob("checkpoint-*"):
        digits = re.fullmatch(r"checkpoint-(\d+)", path.name.removesuffix(suffix), re.ASCII)
        if digits and path.name == name_of(int(digits[1])) + suffix and path.is_dir() and not path.is_symlink():
            found[int(digits[1])] = path
    return [found[step] for step in sorted(found)]


def verify_checkpoint(path: Path) -> None:
    """Compare a checkpoint's files with its manifest.

    Raises:
        DamagedCheckpointError: a file is missing or differs; the message names it.
        ValueError: a newer version of v05 wrote the checkpoint.
    """
    version, files, writer = _read_manifest(path)
    if version > FORMAT:
        raise ValueError(f"{path} has format {version}, this v05 reads format {FORMAT}; resume with v05 {writer} or newer")
    for name in (STATE, ALLOCATOR):
        if name not in files:
            raise DamagedCheckpointError(f"{path}: {MANIFEST} does not list {name}")
    for name, expected in files.items():
        if not (path / name).is_file():
            raise DamagedCheckpointError(f"{path}: {name} is missing")
        if (found := _fingerprint(path / name)) != expected:
            raise DamagedCheckpointError(f"{path}: {name} has {found}, its manifest says {expected}")


def _read_manifest(path: Path) -> tuple[int, dict[str, Any], str]:
    """(format, fingerprint of each file by its name, version of v05 that wrote the checkpoint)."""
    try:
        manifest = read_object(path / MANIFEST)
        version, files = manifest["format"], manifest["files"]
        if type(version) is not int or not isinstance(files, dict):
            raise ValueError(f"format={version!r} is not an integer, or files={files!r:.60} is not an object")
    except (OSError, KeyError, ValueError) as error:
        raise DamagedCheckpointError(f"{path}: {MANIFEST} is missing or unreadable ({error!r})") from error
    if elsewhere := [name for name in files if Path(name).name != name]:
        raise DamagedCheckpointError(f"{path}: {MANIFEST} names {elsewhere[0]!r}, which is not a file in the checkpoint")
    return version, files, str(manifest.get("v05"))


def read_checkpoint(path: Path) -> Checkpoint:
    """The contents of a checkpoint that `verify_checkpoint` has accepted."""
    _, files, _ = _read_manifest(path)
    return Checkpoint(
        state=read_object(path / STATE),
        tensors={name.removesuffix(TENSORS): load_file(path / name) for name in files if name.endswith(TENSORS)},
        allocator=(path / ALLOCATOR).read_bytes(),
    )


def delete_checkpoints(directory: Path) -> None:
    """Delete all checkpoints of a finished run."""
    for path in find_checkpoints(directory):
        _delete(path)


def _delete(path: Path) -> None:
    """Rename, then delete, so that a kill in between leaves no directory that looks like a damaged checkpoint."""
    partial = path.with_suffix(PARTIAL)
    os.replace(path, partial)
    shutil.rmtree(partial)


def _fingerprint(path: Path) -> dict[str, Any]:
    return {"bytes": path.stat().st_size, "sha256": sha256(path)}
