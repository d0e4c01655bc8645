"""The table of advantage methods, `METHODS`, and `Calibration`, the numbers that calibrated methods fit to past groups.

A method is a row of data, not code: the baseline it subtracts, its scale, and the training settings that its paper prescribes. No
other file compares a method's name with a string. The arithmetic of each `Baseline` is in `csrc/include/v05/fusion.hpp` and
`kernels/advantage/fusion.py`; `v05/reference/` specifies it.
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
    """What a method subtracts from a reward. `fusion.hpp` and `kernels/advantage/fusion.py` have the same numbers."""

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
    """How far priors can be trusted, and how the energies of successes and failures differ.

    `v05.prior.calibration.Calibrator` fits these numbers to past groups. The defaults are the values to start from: the prior is
    right on average, is worth 4.5 rollouts and says nothing about one group in eight, and energies do not depend on success. A fit
    to few groups stays close to the defaults.

    Attributes:
        alpha, beta: a prior v, scaled to [0, 1], predicts the success rate sigmoid(alpha + beta logit v); each in [-100, 100].
        kappa: the number of rollouts that the prior is worth; in [1e-6, 1e12].
        eps: the share of groups about which the prior says nothing (it hallucinates); above 0 and below 1.
        delta0, delta1: at success rate p, the log-ratio of the mean energy of successes to that of failures is
            delta0 + delta1 log(1 - p); each in [-8, 8].

    Raises:
        ValueError: a number is out of bounds.

    Source: alpha to eps describe a robust mixture prior (Schmidli et al. 2014, `v05.reference.calibrated`). docs/optimal.md derives
    delta0 and delta1 (`v05.reference.least_variance`).
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
        # Calibration::within_bounds in fusion.hpp has the same bounds.
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
        """The default cost of a rollout under budget rule "variance", in centred units: the gain from a new prompt's first rollout.

        `v05.reference.fresh_prompt_gain` specifies it. For the vague prior Beta(1/2, 1/2) it is half of V at success rate 1/2.
        """
        ratio = math.exp(min(max(self.delta0 - self.delta1 * math.log(2), -8.0), 8.0))
        return ratio / (1.0 + ratio)


BudgetRule = Literal["osla", "calibrated", "variance"]
# The budget rule (sequential test) of each baseline that has one.
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
    """One way to turn rewards into advantages, as a row of `METHODS`.

    Attributes:
        name: the public name, as in `fused_advantage(method=...)`.
        baseline: what is subtracted from a reward.
        source: the paper.
        colour: the colour in every plot, as (on a light background, on a dark one).
        scale: the default divisor of the advantages, see `fused_advantage`.
        leave_one_out: whether the baseline of a rollout always leaves out that rollout's own reward.
        recipe: the training settings that the paper prescribes, as fields of `v05.train.config.RunConfig`. v05/train/trainer.py
            lists departures from the paper.
        weight: what the method weighs rollouts by: "energy" requires the argument `energy`; "length" uses it if given, otherwise
            the length of the response; None weighs all rollouts equally.
        rival: whether the headline experiment compares our methods with this one at its best group size.
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
        """Whether the method is V_0.5, which gave the library its name, or was first described here."""
        return self.name == "v05" or self.source.startswith("ours")

    @property
    def needs_prior(self) -> bool:
        """Whether the method needs a value prior, and so a `reward_range` that contains priors and rewards."""
        return self.baseline in (*BUDGET_RULES, Baseline.CONJUGATE)

    @property
    def prior(self) -> str:
        """The name of the prior that a training run uses by default."""
        return str(self.recipe.get("prior", "history"))

    @property
    def budget_rule(self) -> BudgetRule | None:
        """The rule that decides whether a group gets another rollout; None for a method without one."""
        return BUDGET_RULES.get(self.baseline)

    @property
    def is_calibrated(self) -> bool:
        """Whether the method fits the trust in its prior to past groups."""
        return self.baseline in (Baseline.CALIBRATED, Baseline.LEAST_VARIANCE)

    @property
    def reads_calibration(self) -> bool:
        """Whether the method reads a `Calibration`."""
        return self.is_calibrated or self.fits_variances

    @property
    def fits_variances(self) -> bool:
        """Whether the method reads only kappa of the calibration, which is then fitted to variances."""
        return self.baseline is Baseline.CONJUGATE

    @property
    def learns_energies(self) -> bool:
        """Whether the method fits the energies of successes and failures to past groups."""
        return self.baseline is Baseline.LEAST_VARIANCE

    @property
    def reads_energies(self) -> bool:
        """Whether the method uses the energies of rollouts, as weights or to learn from them."""
        return self.weight == "energy" or self.learns_energies

    def weights(self, lengths: Callable[[], Weights], energies: Callable[[], Weights | None]) -> Weights | None:
        """The argument `energy` of the op for this method, or None if the method needs none. Only the function needed is called.

        Args:
            lengths: returns the (N,) numbers of tokens that are trained on.
            energies: returns the (N,) energies (`v05.energy`), or None if they are unknown.
        """
        if self.weight == "length":
            return lengths()
        return energies() if self.reads_energies else None

    @property
    def estimator(self) -> str:
        """The method's name as an estimator in verl and SkyRL, which already use some of these names."""
        return self.name if self.name == "v05" else f"v05_{self.name}"

    @property
    def counts_paths(self) -> bool:
        """Whether path counting (`v05.path_counting`) can make the advantages unbiased under the method's own budget rule."""
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
        # In groups of equal size k, RLOO is Dr. GRPO times k / (k - 1), a factor that AdamW cancels. So RLOO is no separate rival.
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
REFERENCE = METHODS["grpo"]  # the method that others are compared with


def find_method(name: str) -> Method:
    """The method called `name`. A ValueError lists the known names if there is none."""
    return METHODS[choice("method", name, METHODS)]


def known_calibration(given: Any) -> Calibration | None:
    """Return the argument `calibration`. A ValueError if it is neither a Calibration nor None."""
    if given is None or isinstance(given, Calibration):
        return given
    raise ValueError(f"calibration={shown(given)} is no v05.ops.Calibration; give Calibration(alpha, beta, kappa, eps) or None")
