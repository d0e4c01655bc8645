"""Checkpoints: what a run needs to go on after anything, `kill -9` and power cuts included. No pickle.

A checkpoint is a directory RUN/checkpoint-STEP of safetensors files, state.json, allocator.bin and a manifest with the size and
SHA-256 of each of them. It is written beside its place, flushed to the disk and renamed, so that a directory of that name is
whole; its predecessor stays, and is what a run goes on from should the newest one be damaged later. Only directories whose name is
exactly one that is given here are read or deleted, never links: whatever else lies in a run's directory is somebody else's.
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

FORMAT = 1  # of the files; a new number refuses nothing old but is refused by what is older
KEPT = 2  # checkpoints in a run directory
MANIFEST, STATE, ALLOCATOR, TENSORS = "manifest.json", "state.json", "allocator.bin", ".safetensors"
PARTIAL = ".partial"  # directories being written or deleted; never read
MAX_SHARE = 0.01  # of a run's time that goes into checkpoints


@dataclass(frozen=True)
class Checkpoint:
    """A run between two steps.

    Attributes:
        state: counters, cursors and other JSON values.
        tensors: file name -> tensor name -> CPU or accelerator tensor; read back to the CPU.
        allocator: the allocator's snapshot.
    """

    state: dict[str, Any]
    tensors: dict[str, dict[str, torch.Tensor]]
    allocator: bytes


class DamagedCheckpointError(ValueError):
    """Files that are missing, cut short or changed since they were written."""


class CheckpointSchedule:
    """Says when the next checkpoint is due: `seconds` after the last one, or later where writing would cost over MAX_SHARE.

    The first is due at once; with seconds = 0 every step is.
    """

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds
        self._next = 0.0

    def due(self) -> bool:
        return time.monotonic() >= self._next

    def written(self, cost: float) -> None:
        """A checkpoint was written just now and took `cost` seconds."""
        self._next = time.monotonic() + (max(self._seconds, cost / MAX_SHARE) if self._seconds else 0.0)


def write_checkpoint(directory: Path, step: int, checkpoint: Checkpoint) -> None:
    """Put a checkpoint into a run directory, whole or not at all, and delete those it makes superfluous.

    Raises:
        OSError: the disk is full or the directory cannot be written. Earlier checkpoints are as they were.
    """
    target = directory / name_of(step)
    scratch = target.with_suffix(PARTIAL)
    earlier = find_checkpoints(directory)
    outlook = f"{earlier[-1].name} is intact and the run goes on from it" if earlier else "the run starts over"
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
    """Of a checkpoint's directory."""
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
    """The checkpoint to go on from, its files verified; None without one. Deletes damaged ones and what was left half-written.

    Raises:
        ValueError: all checkpoints are damaged, or one was written in a newer format. Nothing is deleted then.
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
        raise ValueError(f"{directory} holds no sound checkpoint: {reasons}; delete them to start the run over")
    for path, reason in damaged.items():
        report(f"{reason}; deleted, an earlier checkpoint takes its place")
        _delete(path)
    for path in _written(directory, PARTIAL):
        shutil.rmtree(path)
    return sound


def find_checkpoints(directory: Path) -> list[Path]:
    """The checkpoints of a run directory, oldest first."""
    return _written(directory, "")


def _written(directory: Path, suffix: str) -> list[Path]:
    """The directories, links left out, that are called as `name_of` says and then `suffix`; by step."""
    found = {}
    for path in directory.glob("checkpoint-*"):
        digits = re.fullmatch(r"checkpoint-(\d+)", path.name.removesuffix(suffix), re.ASCII)
        if digits and path.name == name_of(int(digits[1])) + suffix and path.is_dir() and not path.is_symlink():
            found[int(digits[1])] = path
    return [found[step] for step in sorted(found)]


def verify_checkpoint(path: Path) -> None:
    """Compare the files with the manifest.

    Raises:
        DamagedCheckpointError: names the file and what is wrong with it.
        ValueError: a newer v05 wrote it.
    """
    version, files, writer = _read_manifest(path)
    if version > FORMAT:
        raise ValueError(f"{path} has format {version}, this v05 reads {FORMAT}; go on with v05 {writer} or newer")
    for name in (STATE, ALLOCATOR):
        if name not in files:
            raise DamagedCheckpointError(f"{path}: {MANIFEST} does not list {name}")
    for name, expected in files.items():
        if not (path / name).is_file():
            raise DamagedCheckpointError(f"{path}: {name} is missing")
        if (found := _fingerprint(path / name)) != expected:
            raise DamagedCheckpointError(f"{path}: {name} has {found}, its manifest says {expected}")


def _read_manifest(path: Path) -> tuple[int, dict[str, Any], str]:
    """Its format, what it says of each file by the file's name, and the version of v05 that wrote it."""
    try:
        manifest = read_object(path / MANIFEST)
        version, files = manifest["format"], manifest["files"]
        if type(version) is not int or not isinstance(files, dict):
            raise ValueError(f"format={version!r} is no number, or files={files!r:.60} are not listed by name")
    except (OSError, KeyError, ValueError) as error:
        raise DamagedCheckpointError(f"{path}: {MANIFEST} is missing or unreadable ({error!r})") from error
    if elsewhere := [name for name in files if Path(name).name != name]:
        raise DamagedCheckpointError(f"{path}: {MANIFEST} names {elsewhere[0]!r}, which is no file in the checkpoint")
    return version, files, str(manifest.get("v05"))


def read_checkpoint(path: Path) -> Checkpoint:
    """A verified checkpoint's contents."""
    _, files, _ = _read_manifest(path)
    return Checkpoint(
        state=read_object(path / STATE),
        tensors={name.removesuffix(TENSORS): load_file(path / name) for name in files if name.endswith(TENSORS)},
        allocator=(path / ALLOCATOR).read_bytes(),
    )


def delete_checkpoints(directory: Path) -> None:
    """Delete all checkpoints of a run that needs them no more."""
    for path in find_checkpoints(directory):
        _delete(path)


def _delete(path: Path) -> None:
    """Rename, then delete: what a kill leaves behind is not taken for a damaged checkpoint."""
    partial = path.with_suffix(PARTIAL)
    os.replace(path, partial)
    shutil.rmtree(partial)


def _fingerprint(path: Path) -> dict[str, Any]:
    return {"bytes": path.stat().st_size, "sha256": sha256(path)}
