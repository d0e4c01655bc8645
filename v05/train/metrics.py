"""A run directory's records: metrics.jsonl, one JSON object a line, written as they happen and readable at any time.

Kinds: "step" (one optimiser step), "probe" (the baseline against a large-sample truth), "evaluation" (held-out accuracy, and how
well the prior predicted held-out prompts), "final" (greedy accuracy, mean@k and pass@k at the end), "group" (completions to read: a
few groups of each step that follows an evaluation).
Beside them outcomes/ holds what each held-out prompt came to, a file an evaluation.
"""

from __future__ import annotations

import fcntl
import json
import math
import os
import weakref
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from v05.files import explained, read_object, read_objects, replacing
from v05.train.identity import inputs_of, paths_of, with_contents
from v05.train.records import check_record, check_result

METRICS, CONFIG, INPUTS, RESULT, OUTCOMES = "metrics.jsonl", "config.json", "inputs.json", "result.json", "outcomes"
POLICY = "policy"  # the folder of the trained policy


def changed_settings(config: BaseModel, directory: Path) -> list[str]:
    """In what a directory's run differs: settings by name, and files whose content has changed. A file that was moved is the same.

    What an earlier version did not know yet was at its default. ValueError names a file of the run that cannot be read.
    """
    theirs, mine = read_object(directory / CONFIG), config.model_dump(mode="json")
    paths, now = paths_of(config), inputs_of(config)
    then = {name: digest for name, digest in read_inputs(directory).items() if name in now}
    changed = [f"the content of {paths[name]}" for name in then if then[name] != now[name]]
    known = {name: now[name] for name in then}  # their contents have been compared, so that their paths need not be
    theirs, mine = with_contents(theirs, known), with_contents(mine, known)
    fields = type(config).model_fields
    settings = [name for name in mine | theirs if name not in mine or mine[name] != theirs.get(name, fields[name].default)]
    return settings + changed


def read_inputs(directory: Path) -> dict[str, Any]:
    """The digests of what a directory's run read (v05.train.identity); nothing where an earlier version wrote the run."""
    return read_object(directory / INPUTS) if (directory / INPUTS).is_file() else {}


def refuse_to_overwrite(config: BaseModel, directory: Path) -> None:
    """ValueError if the directory holds a finished run, the records of one with other settings or data, or what no run wrote."""
    metrics = directory / METRICS
    if (directory / RESULT).exists():
        changed = _known_changes(config, directory)
        told = f"; the run there differs in {', '.join(changed)}" if changed else ""
        raise ValueError(f"{directory} holds a finished run; give another directory{told}")
    if not metrics.exists():
        for name in (CONFIG, POLICY):
            there = (directory / name).exists() or (directory / name).is_symlink()
            if there and (name == POLICY or _known_changes(config, directory) != []):
                raise ValueError(f"{directory} holds {name} of something else, which the run would replace; give another directory")
    elif metrics.stat().st_size:  # else a start that failed
        changed = changed_settings(config, directory)
        if changed:
            raise ValueError(f"{directory} holds a run that differs in {', '.join(changed)}; give another directory")


def _known_changes(config: BaseModel, directory: Path) -> list[str] | None:
    """The changed settings; None where the directory's files do not say."""
    try:
        return changed_settings(config, directory)
    except (OSError, ValueError):
        return None


class MetricsLog:
    """Appends records to the metrics of a run directory, and keeps other processes from doing the same.

    Raises ValueError where another process that is still alive writes this run.
    """

    def __init__(self, directory: Path) -> None:
        self._path = directory / METRICS
        self._descriptor = os.open(self._path, os.O_RDWR | os.O_CREAT, 0o666)
        weakref.finalize(self, os.close, self._descriptor)
        try:
            fcntl.flock(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)  # goes with the process, however it ends
        except BlockingIOError:
            raise ValueError(f"{directory} is being written by another process; wait for it or stop it") from None

    def cut(self, length: int) -> None:
        """Forget what was recorded after the first `length` bytes: it is about to happen again. ValueError names a line before them
        that is no record."""
        found = os.fstat(self._descriptor).st_size
        if found < length:
            raise ValueError(f"{self._path} has {found} bytes, fewer than the {length} of the checkpoint; give another directory")
        os.ftruncate(self._descriptor, length)
        try:
            read_metrics(self._path.parent)
        except ValueError as error:
            raise ValueError(f"{error}; mend the line, or give another directory") from None

    def flush(self) -> int:
        """Have the disk hold what was recorded; returns its length in bytes."""
        os.fsync(self._descriptor)
        return os.fstat(self._descriptor).st_size

    def write(self, kind: str, **values: Any) -> None:
        """Append one record; NaN and infinity become null, so that every line is plain JSON."""
        with explained(self._path, "the run goes on from its checkpoint"), self._path.open("a", encoding="utf-8") as file:
            file.write(plain_json({"kind": kind, **values}) + "\n")


def read_metrics(directory: Path, kind: str | None = None) -> list[dict[str, Any]]:
    """The records of a run directory, optionally of one kind. A last line still being written is left out.

    Raises ValueError, with the file and the line, for one that is no record.
    """
    path = directory / METRICS
    if not path.is_file():
        return []
    records = []
    for number, record in read_objects(path, growing=True):
        check_record(record, f"{path}, line {number}")
        records.append(record)
    return [record for record in records if kind is None or record["kind"] == kind]


def read_result(directory: Path) -> dict[str, Any]:
    """The result of a run directory. Raises ValueError, with the file, where it holds none, OSError where there is no file."""
    result = read_object(directory / RESULT)
    check_result(result, str(directory / RESULT))
    return result


def write_json(path: Path, value: Any) -> None:
    """Write `value` whole or not at all, NaN and infinity as null; its folder is made if need be."""
    with replacing(path) as scratch:
        scratch.write_text(json.dumps(_plain(value), indent=1, default=str, allow_nan=False) + "\n", encoding="utf-8")


def plain_json(value: Any) -> str:
    """`value` as JSON that every reader takes: NaN and infinity are null."""
    return json.dumps(_plain(value), allow_nan=False)


def _plain(value: Any) -> Any:
    """`value` with null for every NaN and infinity in it."""
    if isinstance(value, dict):
        return {name: _plain(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
