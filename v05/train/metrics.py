"""The records of a run directory. metrics.jsonl has one JSON object per line, written as things happen and readable at any time.

Kinds of records: "step" (one step of training), "probe" (error of the baseline against many fresh rollouts), "evaluation" (held-out
accuracy, and how well the prior predicted held-out prompts), "final" (greedy accuracy, mean@k and pass@k at the end) and "group"
(completions to read, from a few groups of each step that follows an evaluation). outcomes/ has one file per evaluation, with the
success rate of each held-out prompt.
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
    """How the run in a directory differs from `config`: names of settings, and files whose content has changed.

    A file that was moved counts as unchanged. A setting that an earlier version of v05 did not have counts as its default.

    Raises ValueError, naming the file, if a file of the run cannot be read.
    """
    theirs, mine = read_object(directory / CONFIG), config.model_dump(mode="json")
    paths, now = paths_of(config), inputs_of(config)
    then = {name: digest for name, digest in read_inputs(directory).items() if name in now}
    changed = [f"the content of {paths[name]}" for name in then if then[name] != now[name]]
    known = {name: now[name] for name in then}  # the contents have been compared, so paths may differ
    theirs, mine = with_contents(theirs, known), with_contents(mine, known)
    fields = type(config).model_fields
    settings = [name for name in mine | theirs if name not in mine or mine[name] != theirs.get(name, fields[name].default)]
    return settings + changed


def read_inputs(directory: Path) -> dict[str, Any]:
    """The digests of the files that a directory's run read (v05.train.identity); empty if an earlier version of v05 wrote the
    run."""
    return read_object(directory / INPUTS) if (directory / INPUTS).is_file() else {}


def refuse_to_overwrite(config: BaseModel, directory: Path) -> None:
    """Raise ValueError if the directory holds a finished run, a run with other settings or data, or files that no run wrote."""
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
    elif metrics.stat().st_size:  # an empty file is left by a start that failed
        changed = changed_settings(config, directory)
        if changed:
            raise ValueError(f"{directory} holds a run that differs in {', '.join(changed)}; give another directory")


def _known_changes(config: BaseModel, directory: Path) -> list[str] | None:
    """The changed settings; None if the directory's files cannot be read."""
    try:
        return changed_settings(config, directory)
    except (OSError, ValueError):
        return None


class MetricsLog:
    """Appends records to metrics.jsonl of a run directory, and locks it against other processes.

    Raises ValueError if another live process is writing this run.
    """

    def __init__(self, directory: Path) -> None:
        self._path = directory / METRICS
        self._descriptor = os.open(self._path, os.O_RDWR | os.O_CREAT, 0o666)
        weakref.finalize(self, os.close, self._descriptor)
        try:
            fcntl.flock(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)  # the lock ends with the process, however that ends
        except BlockingIOError:
            raise ValueError(f"{directory} is being written by another process; wait for it or stop it") from None

    def cut(self, length: int) -> None:
        """Drop the records after the first `length` bytes: the resumed run will write them again.

        Raises ValueError if the file is shorter, or naming a remaining line that is not a valid record.
        """
        found = os.fstat(self._descriptor).st_size
        if found < length:
            raise ValueError(f"{self._path} has {found} bytes, fewer than the {length} of the checkpoint; give another directory")
        os.ftruncate(self._descriptor, length)
        try:
            read_metrics(self._path.parent)
        except ValueError as error:
            raise ValueError(f"{error}; repair the line, or give another directory") from None

    def flush(self) -> int:
        """Flush the records to the disk. Returns the length of the file in bytes."""
        os.fsync(self._descriptor)
        return os.fstat(self._descriptor).st_size

    def write(self, kind: str, **values: Any) -> None:
        """Append one record. NaN and infinity become null, so that every line is standard JSON."""
        with explained(self._path, "the run resumes from its checkpoint"), self._path.open("a", encoding="utf-8") as file:
            file.write(plain_json({"kind": kind, **values}) + "\n")


def read_metrics(directory: Path, kind: str | None = None) -> list[dict[str, Any]]:
    """The records of a run directory, optionally of one kind. An unfinished last line is left out.

    Raises ValueError, naming the file and the line, for a line that is not a valid record.
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
    """The content of result.json of a run directory. Raises ValueError if it is not a valid result, OSError if there is no file."""
    result = read_object(directory / RESULT)
    check_result(result, str(directory / RESULT))
    return result


def write_json(path: Path, value: Any) -> None:
    """Write `value` as JSON, completely or not at all, with NaN and infinity as null. The folder is made if necessary."""
    with replacing(path) as scratch:
        scratch.write_text(json.dumps(_plain(value), indent=1, default=str, allow_nan=False) + "\n", encoding="utf-8")


def plain_json(value: Any) -> str:
    """`value` as standard JSON: NaN and infinity become null."""
    return json.dumps(_plain(value), allow_nan=False)


def _plain(value: Any) -> Any:
    """A copy of `value` with None for every NaN and infinity."""
    if isinstance(value, dict):
        return {name: _plain(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
