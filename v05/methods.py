"""The table of advantage methods: what each subtracts, how it scales, what its paper prescribes beside; and the numbers of a
calibration.

A method is a row of data, not code. No other file compares a method's name with a string. The arithmetic behind `Baseline` lives
in the fusion files: `csrc/include/v05/fusion.hpp`, `kernels/advantage/fusion.py` and, as the specification, `v05/reference/`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from enum import IntEnum
from typing import Any, Literal, TypeVar

from v05.arguments import choice, real, shown

Scale = Literal["none", "group", "batch", "mean"]
Weights = TypeVar("Weights")


class Baseline(IntEnum):
    """What is subtracted from a reward. The numbers are shared with `fusion.hpp` and `kernels/advantage/fusion.py`."""

    GROUP_MEAN = 0
    PRIOR = 1
    SHRINKAGE = 2
    CALIBRATED = 3
    ZERO = 4
    BATCH_MEAN = 5
    ENERGY_MEAN = 6
    JAMES_STEIN = 7
    LEAST_VARIANCE = 8
    BATCH_ENERGY_MEAN = 9
    CONJUGATE = 10


@dataclass(frozen=True)
class Calibration:
    """What past groups say of the prior: the four numbers of calibrated fusion (`v05/reference/`, `calibrated`), and the two of
    the shift by which the baseline of least variance differs from the success rate (`v05/reference/`, `least_variance`).

    Attributes:
        alpha, beta: a prior v, rewards scaled to [0, 1], predicts the success rate sigmoid(alpha + beta logit v); -100 to 100.
        kappa: as sure of it as after that many rollouts; 1e-6 to 1e12.
        eps: how often the prior says nothing (hallucinates); above 0, below 1.
        delta0, delta1: where the success rate is p, the log-ratio of the mean energies of successes and of failures is
            delta0 + delta1 log(1 - p); -8 to 8.

    The defaults are for before anything is known: a prior taken at its word, worth 4.5 rollouts, wrong about one time in eight, and
    energies that know nothing of success.
    `v05.prior.calibration` fits the numbers, and is drawn to these where the data are silent.

    Raises:
        ValueError: a number is out of bounds.
    """

    alpha: float = 0.0
    beta: float = 1.0
    kappa: float = 4.5
    eps: float = 0.12
    delta0: float = 0.0
    delta1: float = 0.0

    def __post_init__(self) -> None:
        for name in ("alpha", "beta", "kappa", "eps", "delta0", "delta1"):
            object.__setattr__(self, name, real(name, getattr(self, name)))
        # The bounds are those of Calibration::within_bounds in fusion.hpp.
        for name, value, within, bounds in (
            ("alpha", self.alpha, -100 <= self.alpha <= 100, "between -100 and 100"),
            ("beta", self.beta, -100 <= self.beta <= 100, "between -100 and 100"),
            ("kappa", self.kappa, 1e-6 <= self.kappa <= 1e12, "between 1e-6 and 1e12"),
            ("eps", self.eps, 0 < self.eps < 1, "above 0 and below 1"),
            ("delta0", self.delta0, -8 <= self.delta0 <= 8, "between -8 and 8"),
            ("delta1", self.delta1, -8 <= self.delta1 <= 8, "between -8 and 8"),
        ):
            if not within:
                raise ValueError(f"{name}={value} of a Calibration is not {bounds}; fit it on groups with a prior")

    @property
    def fresh_prompt_gain(self) -> float:
        """What rule "variance" weighs another rollout against (`v05/reference/`, `fresh_prompt_gain`): Beta(1/2, 1/2) makes its V
        that of the success rate 1/2, halved."""
        ratio = math.exp(min(max(self.delta0 - self.delta1 * math.log(2), -8.0), 8.0))
        return ratio / (1.0 + ratio)


BudgetRule = Literal["osla", "calibrated", "variance"]
# Of the baselines with a prior, the sequential test of the prior.
BUDGET_RULES: dict[Baseline, BudgetRule] = {
    Baseline.PRIOR: "osla",
    Baseline.SHRINKAGE: "osla",
    Baseline.CALIBRATED: "calibrated",
    Baseline.LEAST_VARIANCE: "variance",
}
ONE_ROLLOUT: Mapping[str, Any] = {"budget": {"initial": 1, "maximum": 1}}
FIXED_AT_4: Mapping[str, Any] = {"budget": {"initial": 4, "maximum": 4}}


@dataclass(frozen=True)
class Method:
    """One way to turn rewards into advantages: all that tells it from the others.

    Attributes:
        name: the public name, as in `fused_advantage(method=...)`.
        baseline: what is subtracted.
        source: the paper.
        colour: in every picture: on light ground, and on dark.
        scale: what the difference is divided by unless the caller says otherwise.
        leave_one_out: the baseline of a rollout never sees that rollout's own reward.
        recipe: what its paper prescribes beside the advantage: fields of `v05.train.config.RunConfig`. Departures stand in
            v05/train/trainer.py.
        weight: what the rollouts of a group are weighed by: their `energy`, or their length where no energy is given.
        rival: ours are compared with it at its best group size in the headline experiment.
    """

    name: str
    baseline: Baseline
    source: str
    colour: tuple[str, str]
    scale: Scale = "none"
    leave_one_out: bool = False
    recipe: Mapping[str, Any] = field(default_factory=lambda: FIXED_AT_4)
    weight: Literal["energy", "length"] | None = None
    rival: bool = False

    @property
    def ours(self) -> bool:
        """V_0.5, the method of this library's name, or one that is described here first; all others are rivals."""
        return self.name == "v05" or self.source.startswith("ours")

    @property
    def needs_prior(self) -> bool:
        """The method reads a value prior, and therefore a `reward_range` that holds prior and rewards."""
        return self.baseline in (*BUDGET_RULES, Baseline.CONJUGATE)

    @property
    def prior(self) -> str:
        """The kind of prior that it has unless the user says otherwise."""
        return str(self.recipe.get("prior", "history"))

    @property
    def budget_rule(self) -> BudgetRule | None:
        """The sequential test that decides on another rollout; None for a method that has none."""
        return BUDGET_RULES.get(self.baseline)

    @property
    def is_calibrated(self) -> bool:
        """How far the prior is to be trusted is fitted to past groups."""
        return self.baseline in (Baseline.CALIBRATED, Baseline.LEAST_VARIANCE)

    @property
    def reads_calibration(self) -> bool:
        """It reads numbers of a calibration, which are fitted to past groups."""
        return self.is_calibrated or self.fits_variances

    @property
    def fits_variances(self) -> bool:
        """Of the calibration it reads kappa alone, as variances have it."""
        return self.baseline is Baseline.CONJUGATE

    @property
    def learns_energies(self) -> bool:
        """What successes and failures have for energies is fitted to past groups."""
        return self.baseline is Baseline.LEAST_VARIANCE

    @property
    def reads_energies(self) -> bool:
        """It weighs rollouts by their energies, or learns from them."""
        return self.weight == "energy" or self.learns_energies

    def weights(self, lengths: Callable[[], Weights], energies: Callable[[], Weights | None]) -> Weights | None:
        """What it weighs rollouts by, or learns of them, for the argument `energy` of the op; None where it asks for neither.

        Args:
            lengths: gives the numbers of tokens that are trained on.
            energies: gives the energies (`v05.energy`), or None where they are not known.
        """
        if self.weight == "length":
            return lengths()
        return energies() if self.reads_energies else None

    @property
    def estimator(self) -> str:
        """Its name among the estimators of verl and SkyRL, which have some of these names for their own."""
        return self.name if self.name == "v05" else f"v05_{self.name}"

    @property
    def counts_paths(self) -> bool:
        """Its advantages under its own test can be made unbiased (`v05.path_counting`)."""
        return self.baseline in (Baseline.SHRINKAGE, Baseline.CALIBRATED, Baseline.LEAST_VARIANCE)


METHODS = {
    method.name: method
    for method in (
        Method(
            "v05",
            Baseline.SHRINKAGE,
            "V_0.5, arXiv 2603.10848",
            colour=("#2563eb", "#60a5fa"),
            recipe={"budget": {"rule": "osla", "initial": 4, "maximum": 16}, "loss": {"clip_high": 0.28}},
        ),
        Method(
            "grpo",
            Baseline.GROUP_MEAN,
            "DeepSeekMath, arXiv 2402.03300",
            colour=("#ea580c", "#fb923c"),
            scale="group",
            recipe={"budget": {"initial": 16, "maximum": 16}, "loss": {"kind": "grpo"}},
            rival=True,
        ),
        Method("dr_grpo", Baseline.GROUP_MEAN, "Dr. GRPO, arXiv 2503.20783", colour=("#be185d", "#f472b6"), rival=True),
        # With groups of one size RLOO is Dr. GRPO times k / (k - 1), which AdamW divides out: one of them is rival enough.
        Method("rloo", Baseline.GROUP_MEAN, "RLOO, arXiv 2402.14740", colour=("#7c3aed", "#a78bfa"), leave_one_out=True),
        Method("prior", Baseline.PRIOR, "V_0, arXiv 2602.03584", colour=("#64748b", "#94a3b8")),
        Method(
            "dapo",
            Baseline.GROUP_MEAN,
            "DAPO, arXiv 2503.14476",
            colour=("#a16207", "#eab308"),
            scale="group",
            recipe={
                "budget": {"initial": 16, "maximum": 16},
                "loss": {"kind": "dapo"},
                "max_refills": 3,
                "overlong": {},
            },
            rival=True,
        ),
        Method(
            "calibrated",
            Baseline.CALIBRATED,
            "ours; robust mixture priors, Schmidli et al. 2014",
            colour=("#0d9488", "#2dd4bf"),
            recipe={
                "budget": {"rule": "calibrated", "initial": 4, "maximum": 16, "unbiased": True},
                "leave_one_out": True,
                "loss": {"clip_high": 0.28},
            },
        ),
        Method(
            "optimal",
            Baseline.LEAST_VARIANCE,
            "ours; least-variance baselines, Weaver & Tao 2001, Greensmith et al. 2004",
            colour=("#dc2626", "#f87171"),
            leave_one_out=True,
            recipe=ONE_ROLLOUT,
        ),
        Method("none", Baseline.ZERO, "REINFORCE, Williams 1992", colour=("#111827", "#e5e7eb"), recipe=ONE_ROLLOUT),
        Method(
            "batch",
            Baseline.BATCH_MEAN,
            "REINFORCE with the batch's mean, leave-one-out",
            colour=("#4d7c0f", "#a3e635"),
            leave_one_out=True,
            recipe=ONE_ROLLOUT,
        ),
        Method(
            "batch_energy",
            Baseline.BATCH_ENERGY_MEAN,
            "ours; the least-variance baseline that is one number for all prompts",
            colour=("#86198f", "#e879f9"),
            leave_one_out=True,
            recipe=ONE_ROLLOUT,
            weight="energy",
        ),
        Method("opo", Baseline.ENERGY_MEAN, "OPO, arXiv 2505.23585", colour=("#b45309", "#fcd34d"), weight="length"),
        Method("otb", Baseline.ENERGY_MEAN, "OTB, arXiv 2602.07078", colour=("#0369a1", "#38bdf8"), weight="energy"),
        Method(
            "js",
            Baseline.JAMES_STEIN,
            "James-Stein, arXiv 2511.03710",
            colour=("#57534e", "#a8a29e"),
            leave_one_out=True,
            recipe={"budget": {"initial": 2, "maximum": 2}},
        ),
        Method(
            "ebpo",
            Baseline.CONJUGATE,
            "EBPO, arXiv 2602.05165",
            colour=("#047857", "#34d399"),
            recipe={**FIXED_AT_4, "prior": "mean"},
        ),
        Method(
            "maxrl",
            Baseline.GROUP_MEAN,
            "MaxRL, arXiv 2602.02710",
            colour=("#9f1239", "#fda4af"),
            scale="mean",
            recipe={"budget": {"initial": 16, "maximum": 16}},
        ),
    )
}
REFERENCE = METHODS["grpo"]  # what the others are measured against


def find_method(name: str) -> Method:
    """The method called `name`; a ValueError that lists the known names if there is none."""
    return METHODS[choice("method", name, METHODS)]


def known_calibration(given: Any) -> Calibration | None:
    """The argument `calibration`; a ValueError if it is neither a Calibration nor None."""
    if given is None or isinstance(given, Calibration):
        return given
    raise ValueError(f"calibration={shown(given)} is no v05.ops.Calibration; give Calibration(alpha, beta, kappa, eps) or None")
