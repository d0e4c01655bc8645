"""What makes a run the run it is: its settings, with the content of each file and folder that they name in place of its path.

A run goes on only where both are what they were, and a file that was moved is the same file. `inputs.json` in a run's directory
keeps the digests, so that a later call can tell.
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
    """The digest of each file and folder that the settings name, by the setting's dotted name; of what is there, and no pipe."""
    digests = ((name, content_digest(path)) for name, path in paths_of(config).items())
    return {name: digest for name, digest in digests if digest is not None}


def identity_of(config: BaseModel) -> dict[str, Any]:
    """The settings as JSON values, digests in the place of paths."""
    return with_contents(config.model_dump(mode="json"), inputs_of(config))


def identity_digest(config: BaseModel) -> str:
    """A hash of the identity, by which a run's checkpoints are recognised."""
    return hashlib.sha256(json.dumps(identity_of(config), sort_keys=True).encode()).hexdigest()


def with_contents(settings: Mapping[str, Any], inputs: Mapping[str, str]) -> dict[str, Any]:
    """A copy of `settings`, as JSON values, with the values at these dotted names, where they have them."""
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
    """The settings that are paths, by their dotted names."""
    paths: dict[str, Path] = {}
    for name in type(config).model_fields:
        value = getattr(config, name)
        if isinstance(value, Path):
            paths[prefix + name] = value
        elif isinstance(value, BaseModel):
            paths |= paths_of(value, f"{prefix}{name}.")
    return paths
