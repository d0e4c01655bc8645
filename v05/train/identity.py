"""The identity of a run: its settings, in which a digest of the content replaces the path of each file and folder.

A run is resumed only if its identity has not changed. A file that was moved keeps its digest, and so the identity. The digests are
kept in `inputs.json` in the run directory.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from v05.files import content_digest


def inputs_of(config: BaseModel) -> dict[str, str]:
    """The digest of each file and folder that the settings name, by the setting's dotted name. Missing files and pipes are left
    out."""
    digests = ((name, content_digest(path)) for name, path in paths_of(config).items())
    return {name: digest for name, digest in digests if digest is not None}


def identity_of(config: BaseModel) -> dict[str, Any]:
    """The settings as JSON values, with digests in place of paths."""
    return with_contents(config.model_dump(mode="json"), inputs_of(config))


def identity_digest(config: BaseModel) -> str:
    """A hash of the identity, which a run's checkpoints carry."""
    return hashlib.sha256(json.dumps(identity_of(config), sort_keys=True).encode()).hexdigest()


def with_contents(settings: Mapping[str, Any], inputs: Mapping[str, str]) -> dict[str, Any]:
    """A copy of `settings`, as JSON values, in which `inputs` replace the settings of the same dotted names that are set."""
    copy: dict[str, Any] = json.loads(json.dumps(settings))
    for name, digest in inputs.items():
        *parents, last = name.split(".")
        place: Any = copy
        for parent in parents:
            place = place.get(parent) if isinstance(place, dict) else None
        if isinstance(place, dict) and place.get(last) is not None:
            place[last] = digest
    return copy


def paths_of(config: BaseModel, prefix: str = "") -> dict[str, Path]:
    """All settings that are paths, by their dotted names."""
    paths: dict[str, Path] = {}
    for name in type(config).model_fields:
        value = getattr(config, name)
        if isinstance(value, Path):
            paths[prefix + name] = value
        elif isinstance(value, BaseModel):
            paths |= paths_of(value, f"{prefix}{name}.")
    return paths
