"""The golden cases: results of an independent float64 oracle. Statistics are indexed by the numeric group id."""

import json
from pathlib import Path
from typing import Any

import pytest

from v05.methods import Calibration

GOLDEN = Path(__file__).parents[1] / "ops" / "golden"
CASES: list[dict[str, Any]] = [case for file in sorted(GOLDEN.glob("*.json")) for case in json.loads(file.read_text())]


def golden_parameters() -> list[Any]:
    """The cases as pytest parameters."""
    return [pytest.param(case, id=f"{case['id']}-{case['method']}") for case in CASES]


def golden_options(case: dict[str, Any]) -> dict[str, Any]:
    """Keyword arguments of a case, for both the op and the reference."""
    return {
        "method": case["method"],
        "scale": case["scale"],
        "leave_one_out": case["leave_one_out"],
        "energy": case.get("energy"),
        "reward_range": tuple(case["reward_range"]),
        "calibration": None if case["calibration"] is None else Calibration(**case["calibration"]),
    }
