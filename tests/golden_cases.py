"""The golden cases: results made by an independent float64 oracle. Statistics are indexed by the numeric group id."""

import json
from pathlib import Path
from typing import Any

import pytest

CASES: list[dict[str, Any]] = json.loads((Path(__file__).parent / "golden" / "fused_advantage.json").read_text())


def golden_parameters() -> list[Any]:
    """pytest parameters; `calibrated` is not a method yet, and its cases must fail until it is."""
    not_yet = pytest.mark.xfail(strict=True, raises=ValueError, reason="method 'calibrated' does not exist yet")
    return [
        pytest.param(case, id=f"{case['id']}-{case['method']}", marks=[not_yet] if case["method"] == "calibrated" else [])
        for case in CASES
    ]


def golden_options(case: dict[str, Any]) -> dict[str, Any]:
    """Keyword arguments of a case, shared by the op and the reference."""
    return {
        "method": case["method"],
        "scale": case["scale"],
        "leave_one_out": case["leave_one_out"],
        "reward_range": tuple(case["reward_range"]),
    }
