"""The methods in float64 NumPy: the executable specification against which the fast implementations are tested.

It follows the formulas of the papers rather than speed, and loops over groups in Python. The ops never import it; `v05 doctor`
compares them with it. Statistics are in reward units. The formulas of V_0.5 (arXiv 2603.10848) are in centred units
u = (2r - lo - hi) / (hi - lo), in which a binary reward is -1 or 1.
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
