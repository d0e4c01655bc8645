"""verl's unchanged estimators, read from its wheel, for a machine on which verl cannot be installed.

Nothing of verl is imported. Only the functions' definitions are compiled, with replacements for the decorator that registers them
and for the choice of a device.
"""

from __future__ import annotations

import ast
import os
import zipfile
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Optional

import numpy as np
import torch

ESTIMATORS = {
    "verl vectorized": "compute_grpo_vectorized_outcome_advantage",
    "verl loop": "compute_grpo_outcome_advantage",
}
HELPERS = ("_resolve_device", "_to_1d_numpy_object_array", "as_torch_index", "group_mean_std")


def estimators(place: Path) -> dict[str, Callable[..., Any]]:
    """The functions of ESTIMATORS from a wheel, or from the newest wheel in a folder.

    Raises ValueError if there is no wheel or if it lacks a function.
    """
    wheel = wheel_in(place)
    given: dict[str, Any] = {
        "np": np,
        "os": os,
        "torch": torch,
        "defaultdict": defaultdict,
        "Any": Any,
        "Optional": Optional,
        "register_adv_est": lambda _: lambda function: function,
        "AdvantageEstimator": SimpleNamespace(GRPO="grpo", GRPO_VECTORIZED="grpo_vectorized"),
        "get_device_name": lambda: "cuda" if torch.cuda.is_available() else "cpu",
    }
    with zipfile.ZipFile(wheel) as archive:
        for path, names in (
            ("verl/utils/groupwise.py", HELPERS),
            ("verl/trainer/ppo/core_algos.py", tuple(ESTIMATORS.values())),
        ):
            if path not in archive.namelist():
                raise ValueError(f"{wheel} has no {path}; give a wheel of verl 0.9.1")
            define(names, archive.read(path).decode(), f"{wheel}/{path}", given)
    return {name: given[function] for name, function in ESTIMATORS.items()}


def wheel_in(place: Path) -> Path:
    if place.is_file():
        return place
    wheels = sorted(place.glob("verl-*.whl"))
    if not wheels:
        raise ValueError(f"{place}: no wheel verl-*.whl; get one with: pip download --no-deps verl==0.9.1 -d {place}")
    return wheels[-1]


def define(names: tuple[str, ...], source: str, path: str, namespace: dict[str, Any]) -> None:
    """Run only the definitions of the functions `names` of a file, in the namespace."""
    tree = ast.parse(source)
    tree.body = [node for node in tree.body if isinstance(node, ast.FunctionDef) and node.name in names]
    missing = set(names) - {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}
    if missing:
        raise ValueError(f"{path} has no function {', '.join(sorted(missing))}; give a wheel of verl 0.9.1")
    exec(compile(tree, path, "exec"), namespace)  # this file's future import keeps annotations, which name undefined types, as text
