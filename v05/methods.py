"""The table of advantage methods: what each subtracts, how it scales, what inputs it needs; and the numbers of a calibration.

A method is a row of data, not code. The arithmetic behind `Baseline` lives in the fusion files: `csrc/include/v05/fusion.hpp`,
`kernels/fusion.py` and, as the specification, `v05/reference.py`.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum
from typing import Literal

Scale = Literal["none", "group", "batch"]


class Baseline(IntEnum):
    """What is subtracted from a reward. The numbers are shared with `fusion.hpp` and `kernels/fusion.py`."""

    GROUP_MEAN = 0
    PRIOR = 1
    SHRINKAGE = 2
    CALIBRATED = 3


@dataclass(frozen=True)
class Calibration:
    """What past groups say of the prior: the four numbers of calibrated fusion (`v05/reference.py`, `calibrated`).

    Attributes:
        alpha, beta: a prior v, rewards scaled to [0, 1], predicts the success rate sigmoid(alpha + beta logit v); -100 to 100.
        kappa: as sure of it as after that many rollouts; 1e-6 to 1e12.
        eps: how often the prior says nothing (hallucinates); above 0, below 1.

    The defaults are for before anything is known: a prior taken at its word, worth 4.5 rollouts, wrong about one time in eight.
    `v05.prior.calibration` fits the numbers, and is drawn to these where the data are silent.

    Raises:
        ValueError: a number is out of bounds.
    """

    alpha: float = 0.0
    beta: float = 1.0
    kappa: float = 4.5
    eps: float = 0.12

    def __post_init__(self) -> None:
        # The bounds are those of Calibration::within_bounds in fusion.hpp.
        for name, value, within, bounds in (
            ("alpha", self.alpha, -100 <= self.alpha <= 100, "between -100 and 100"),
            ("beta", self.beta, -100 <= self.beta <= 100, "between -100 and 100"),
            ("kappa", self.kappa, 1e-6 <= self.kappa <= 1e12, "between 1e-6 and 1e12"),
            ("eps", self.eps, 0 < self.eps < 1, "above 0 and below 1"),
        ):
            if not within:
                raise ValueError(f"{name}={value} of a Calibration is not {bounds}; fit it on groups with a prior")


@dataclass(frozen=True)
class Method:
    """One way to turn rewards into advantages.

    Attributes:
        name: the public name, as in `fused_advantage(method=...)`.
        baseline: what is subtracted.
        scale: what the difference is divided by unless the caller says otherwise.
        leave_one_out: the baseline of a rollout never sees that rollout's own reward.
        source: the paper.
    """

    name: str
    baseline: Baseline
    scale: Scale
    leave_one_out: bool
    source: str

    @property
    def needs_prior(self) -> bool:
        """The method reads a value prior, and therefore a `reward_range` that holds prior and rewards."""
        return self.baseline is not Baseline.GROUP_MEAN


METHODS = {
    method.name: method
    for method in (
        Method("v05", Baseline.SHRINKAGE, "none", False, "V_0.5, arXiv 2603.10848"),
        Method("grpo", Baseline.GROUP_MEAN, "group", False, "DeepSeekMath, arXiv 2402.03300"),
        Method("dr_grpo", Baseline.GROUP_MEAN, "none", False, "Dr. GRPO, arXiv 2503.20783"),
        Method("rloo", Baseline.GROUP_MEAN, "none", True, "RLOO, arXiv 2402.14740"),
        Method("prior", Baseline.PRIOR, "none", False, "V_0, arXiv 2602.03584"),
        Method("dapo", Baseline.GROUP_MEAN, "group", False, "DAPO, arXiv 2503.14476"),
        Method("calibrated", Baseline.CALIBRATED, "none", False, "ours; robust mixture priors, Schmidli et al. 2014"),
    )
}


def find_method(name: str) -> Method:
    """The method called `name`; a ValueError that lists the known names if there is none."""
    try:
        return METHODS[name]
    except KeyError:
        raise ValueError(f"method={name!r} is unknown; choose one of {', '.join(METHODS)}") from None
