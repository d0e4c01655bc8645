"""The method as float64 NumPy: the executable specification that every fast path is tested against.

Read it top to bottom beside the papers. It favours the printed formula over speed and loops over groups in Python. What computes
never imports it; `v05 doctor` does, to check what computes. Statistics are in reward units; the formulas of V_0.5
(arXiv 2603.10848) are in centred units u = (2r - lo - hi) / (hi - lo), where a binary reward is +-1.
"""

from v05.reference.advantage import GroupStatistics, advantages
from v05.reference.fusion import (
    Calibrated,
    Shrinkage,
    betaln,
    calibrated,
    conjugate,
    energy_ratio,
    james_stein,
    least_variance,
    shrinkage,
)
from v05.reference.stopping import (
    calibrated_gain,
    calibrated_take_more,
    fresh_prompt_gain,
    gradient_variance,
    osla_gain,
    osla_take_more,
    variance_gain,
    variance_take_more,
)

__all__ = [
    "Calibrated",
    "GroupStatistics",
    "Shrinkage",
    "advantages",
    "betaln",
    "calibrated",
    "calibrated_gain",
    "calibrated_take_more",
    "conjugate",
    "energy_ratio",
    "fresh_prompt_gain",
    "gradient_variance",
    "james_stein",
    "least_variance",
    "osla_gain",
    "osla_take_more",
    "shrinkage",
    "variance_gain",
    "variance_take_more",
]
