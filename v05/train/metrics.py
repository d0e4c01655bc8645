"""A run directory's records: metrics.jsonl, one JSON object a line, written as they happen and readable at any time.

Kinds: "step" (one optimiser step), "probe" (the baseline against a large-sample truth), "evaluation" (held-out accuracy).
"""

from __future__ import annotations

import json
import math
import os
from pathlib import Path
from typing import Any

METRICS, CONFIG, RESULT = "metrics.jsonl", "config.json", "result.json"


class MetricsLog:
    """Appends records to the metrics of a run directory; starts the file anew."""

    def __init__(self, directory: Path) -> None:
        self._path = directory / METRICS
        self._path.write_text("")

    def write(self, kind: str, **values: Any) -> None:
        """Append one record; NaN and infinity become null, so that every line is plain JSON."""
        record = {"kind": kind, **{name: _plain(value) for name, value in values.items()}}
        with self._path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")


def read_metrics(directory: Path, kind: str | None = None) -> list[dict[str, Any]]:
    """The records of a run directory, optionally of one kind. A last line still being written is left out."""
    path = directory / METRICS
    if not path.is_file():
        return []
    lines = path.read_text(encoding="utf-8").split("\n")[:-1]
    records = [json.loads(line) for line in lines]
    return [record for record in records if kind is None or record["kind"] == kind]


def write_json(path: Path, value: Any) -> None:
    """Write `value` whole or not at all."""
    scratch = path.with_suffix(".partial")
    scratch.write_text(json.dumps(value, indent=1, default=str) + "\n", encoding="utf-8")
    os.replace(scratch, path)


def _plain(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value
