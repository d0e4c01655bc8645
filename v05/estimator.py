"""`Estimator` combines a method with its prior, its calibration and its budget. v05's trainer and all integrations use it.

For each batch of groups it predicts the priors of the prompts before they are sampled, turns rewards into advantages, and lets the
prior and the calibration learn from the outcomes:

    rates = estimator.open(prompts)
    ...  # sample and verify; estimator.allocator() says how many rollouts each prompt needs
    estimate = estimator.advantages(rewards, rates, group_offsets=offsets)
    estimator.close(prompts, rates, *estimator.outcomes(estimate.stats), estimate.energies)
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, get_args

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray

from v05.budget import Chunk, RolloutAllocator
from v05.methods import Calibration, Method, Scale, find_method
from v05.ops import AdvantageStats, factorize, fused_advantage
from v05.path_counting import advantages_of_outcomes
from v05.prior import ValuePrior

if TYPE_CHECKING:
    from v05.prior.calibration import Calibrator

Floats = NDArray[np.float64]
GroupWeighting = Literal["prompt", "rollout"]
GROUP_WEIGHTINGS = get_args(GroupWeighting)


@dataclass(frozen=True)
class Estimate:
    """The result of `Estimator.advantages` for a batch of N rollouts in G groups.

    Attributes:
        advantages: (N,), or (N, T) with a response mask; reward units, unless a scale divides them.
        stats: statistics of each group.
        counted: (G,) bool, whether the group's advantages come from path counting (`v05.path_counting`), so that stopping the group
            early does not bias them.
        energies: (2, G) float64, the summed energies of each group's successes and of its failures; None if the method does not
            learn from energies, or none were given.
    """

    advantages: torch.Tensor
    stats: AdvantageStats
    counted: NDArray[np.bool_]
    energies: Floats | None = None


@dataclass(frozen=True)
class Estimator:
    """A method with its settings, its prior and its calibration.

    Only `prior` and `calibrator` hold learnt state. Estimators that share them, such as copies by `dataclasses.replace`, learn
    together.

    Attributes:
        method: a name in `v05.methods.METHODS`.
        prior: predicts success rates and learns from outcomes. Only methods with a prior use it. With None all priors are NaN.
        calibrator: fits how far the prior can be trusted. Only methods that read a calibration use it. With None they use the
            default `Calibration()`.
        reward_range, scale, leave_one_out, eps: as in `v05.ops.fused_advantage`.
        rule: the budget rule, as in `v05.budget.RolloutAllocator`; None is the method's own rule, or "uniform" if it has none.
        initial, maximum, chunk, cost: settings of the budget, as in `v05.budget.RolloutAllocator`.
        unbiased: whether to use path counting for groups that the method's own rule stopped, where it is possible. Rewards must
            then be the two ends of `reward_range`.
        group_weighting: "rollout" leaves the advantages as they are. "prompt" multiplies the advantages of a group of k rollouts by
            initial / k, so that prompts have equal weight in a loss that averages over rollouts.

    Raises:
        ValueError: the method is unknown, or `unbiased` is set for a method or rule without path counting.

    Example:
        >>> estimator = Estimator("rloo")
        >>> rates = estimator.open(["1 + 1 =", "2 + 3 ="])
        >>> estimate = estimator.advantages([1.0, 0.0, 1.0, 1.0], rates, group_offsets=[0, 2, 4])
        >>> estimate.advantages.tolist()
        [1.0, -1.0, 0.0, 0.0]
        >>> estimator.outcomes(estimate.stats)  # successes and trials of each prompt
        (array([1., 2.]), array([2., 2.]))
    """

    method: str
    prior: ValuePrior | None = None
    calibrator: Calibrator | None = None
    reward_range: tuple[float, float] = (0.0, 1.0)
    scale: Scale | None = None
    leave_one_out: bool = False
    eps: float = 1e-6
    rule: str | None = None
    initial: int = 4
    maximum: int = 16
    chunk: Chunk = 1
    cost: float | None = None
    unbiased: bool = False
    group_weighting: GroupWeighting = "rollout"

    def __post_init__(self) -> None:
        of = self.of
        if self.unbiased and not (of.counts_paths and self.rule in (None, of.budget_rule)):
            raise ValueError(
                f"unbiased=True with method={self.method!r}, rule={self.rule!r}: paths are counted only for methods with a "
                "sequential test, under their own rule; leave it out"
            )

    @property
    def of(self) -> Method:
        """The row of the method in `v05.methods.METHODS`."""
        return find_method(self.method)

    @property
    def calibration(self) -> Calibration | None:
        """The current calibration; None for a method that does not read one."""
        if not self.of.reads_calibration:
            return None
        return Calibration() if self.calibrator is None else self.calibrator.calibration

    def open(self, prompts: Sequence[str]) -> Floats:
        """Predict the (G,) success rates, in [0, 1], of G prompt texts. They are NaN without a prediction or a prior."""
        if self.prior is None or not self.of.needs_prior:
            return np.full(len(prompts), np.nan)
        return self.prior.predict(prompts)

    def in_reward_units(self, rates: Floats) -> Floats:
        """Convert success rates in [0, 1] to mean rewards."""
        low, high = self.reward_range
        return low + rates * (high - low)

    def allocator(self, *, calibration: Calibration | None = None, total: int | None = None, seed: int = 0) -> RolloutAllocator:
        """Make a new `RolloutAllocator` with this estimator's budget. Pass it priors in reward units (`in_reward_units`).

        Args:
            calibration: for budget rules that read one; None is the estimator's own.
            total, seed: as in `RolloutAllocator`.
        """
        rule = self.rule or self.of.budget_rule or "uniform"
        reads_calibration = rule in ("calibrated", "variance", "total")
        return RolloutAllocator(
            rule=rule,
            initial=min(self.initial, self.maximum),
            maximum=self.maximum,
            cost=self.cost,
            total=total,
            chunk=self.chunk,
            seed=seed,
            reward_range=self.reward_range,
            calibration=(calibration or self.calibration) if reads_calibration else None,
        )

    def advantages(
        self,
        rewards: ArrayLike | torch.Tensor,
        rates: Floats,
        *,
        group_offsets: ArrayLike | None = None,
        group_ids: Sequence[str] | None = None,
        valid: ArrayLike | torch.Tensor | None = None,
        response_mask: torch.Tensor | None = None,
        energy: ArrayLike | None = None,
        whole: NDArray[np.bool_] | None = None,
        calibrations: Sequence[Calibration | None] | None = None,
        **options: Any,
    ) -> Estimate:
        """Compute the advantages of N rollouts in G groups.

        Args:
            rewards: (N,) in reward units. A rollout with a non-finite reward is excluded, as with `valid` False.
            rates: (G,) success rates from `open`, in the order of the groups.
            group_offsets, group_ids, valid, response_mask, energy: as in `v05.ops.fused_advantage`. Give exactly one of
                `group_offsets` and `group_ids`.
            whole: (G,) bool, whether the batch has all rollouts of the group that its allocator saw. Path counting needs this: a
                group that is not whole, or has an excluded rollout, gets the advantages of the op. None is True for all.
            calibrations: (G,) the calibration with which each group was opened, for path counting; None is the current one.
            options: `trajectory_ids` and `dtype`, as in the op.

        Raises:
            ValueError: an argument is invalid, see the op.
        """
        out = fused_advantage(
            rewards,
            self.in_reward_units(rates) if self.of.needs_prior else None,
            group_offsets=group_offsets,
            group_ids=group_ids,
            valid=valid,
            response_mask=response_mask,
            energy=energy,
            method=self.method,
            scale=self.scale,
            leave_one_out=self.leave_one_out,
            reward_range=self.reward_range,
            eps=self.eps,
            calibration=self.calibration,
            max_rollouts=self.maximum,
            cost=self.cost,
            nonfinite="exclude",
            **options,
        )
        assert out.stats is not None
        advantages, counted = out.advantages, np.zeros(len(rates), dtype=bool)
        energies: Floats | None = None
        learns_energies = self.of.learns_energies and energy is not None
        if self.unbiased or learns_energies or self.group_weighting == "prompt":
            group_of = _groups_of(group_offsets, group_ids)
            given = torch.as_tensor(rewards).detach().cpu().double().numpy()
            left_out = ~np.isfinite(given) if valid is None else ~np.isfinite(given) | (torch.as_tensor(valid).cpu().numpy() == 0)
        if learns_energies:
            low, high = self.reward_range
            shares = np.clip((given[~left_out] - low) / (high - low), 0.0, 1.0)  # of a success; rewards in between count in part
            spent = np.asarray(energy, dtype=np.float64)[~left_out]
            both = [np.bincount(group_of[~left_out], spent * part, len(rates)) for part in (shares, 1.0 - shares)]
            energies = np.stack(both)
        if self.unbiased:
            intact = np.bincount(group_of[left_out], minlength=len(rates)) == 0
            of_success, of_failure = self._of_outcomes(
                given[~left_out], rates, out.stats, intact if whole is None else intact & whole, calibrations
            )
            counted = ~np.isnan(of_success)
            of_row = np.where(given == self.reward_range[1], of_success[group_of], of_failure[group_of])
            takes = _beside(torch.from_numpy(counted[group_of]), advantages)
            if response_mask is not None:
                takes = takes & (response_mask != 0)
            advantages = torch.where(takes, _beside(torch.from_numpy(of_row), advantages).to(advantages.dtype), advantages)
        if self.group_weighting == "prompt":
            share = self.initial / out.stats.count.cpu().double().clamp(min=1)
            advantages = advantages * _beside(share[torch.from_numpy(group_of)], advantages).to(advantages.dtype)
        return Estimate(advantages, out.stats, counted, energies)

    def _of_outcomes(
        self,
        rewards: Floats,
        rates: Floats,
        stats: AdvantageStats,
        whole: NDArray[np.bool_],
        calibrations: Sequence[Calibration | None] | None,
    ) -> tuple[Floats, Floats]:
        """The (G,) advantages of a success and the (G,) advantages of a failure by path counting.

        They are NaN for groups whose paths cannot be counted, and for all groups if a reward is not an end of `reward_range`.
        """
        of_success, of_failure = np.full((2, len(rates)), np.nan)
        low, high = self.reward_range
        if not np.isin(rewards, self.reward_range).all():
            return of_success, of_failure
        sizes = stats.count.cpu().numpy()
        mean = np.where(sizes > 0, stats.mean.cpu().numpy(), low)
        successes = np.rint((mean - low) / (high - low) * sizes).astype(np.int64)
        priors = self.in_reward_units(rates)
        fits = [self.calibration] * len(rates) if calibrations is None else list(calibrations)
        for fit in dict.fromkeys(fits):  # usually there is only one
            of_fit = whole & (sizes > 0) & np.array([other == fit for other in fits], dtype=bool)
            if of_fit.any():
                of_success[of_fit], of_failure[of_fit] = advantages_of_outcomes(
                    priors[of_fit],
                    sizes[of_fit],
                    successes[of_fit],
                    method=self.method,
                    initial=min(self.initial, self.maximum),
                    maximum=self.maximum,
                    cost=self.cost,
                    chunk=self.chunk,
                    calibration=fit,
                    reward_range=self.reward_range,
                )
        return of_success, of_failure

    def outcomes(self, stats: AdvantageStats) -> tuple[Floats, Floats]:
        """The (successes, trials) from which a prior learns, each (G,) float64. Successes are sums of rewards scaled to [0, 1]."""
        low, high = self.reward_range
        trials = stats.count.cpu().numpy().astype(np.float64)
        mean = np.where(trials > 0, stats.mean.cpu().numpy(), low)
        return np.clip((mean - low) / (high - low), 0.0, 1.0) * trials, trials

    def state_dict(self) -> dict[str, dict[str, NDArray[Any]]]:
        """The learnt state for a checkpoint: numeric arrays by name, for each part ("prior", "calibrator") that exists."""
        return {name: part.state_dict() for name, part in self._learners().items()}

    def load_state_dict(self, state: Mapping[str, dict[str, NDArray[Any]]]) -> None:
        """Resume from the `state_dict` of an estimator with the same settings. A ValueError if the state cannot be from one."""
        for name, part in self._learners().items():
            part.load_state_dict(state[name])

    def _learners(self) -> dict[str, ValuePrior | Calibrator]:
        learners = {"prior": self.prior, "calibrator": self.calibrator}
        return {name: part for name, part in learners.items() if part is not None}

    def close(
        self,
        prompts: Sequence[str],
        rates: Floats,
        successes: Floats,
        trials: Floats,
        energies: Floats | None = None,
        fit: bool = True,
    ) -> None:
        """Let the prior and the calibration learn from the outcomes of G prompts. Does nothing for a method without a prior.

        Args:
            prompts: the G prompt texts.
            rates: (G,) success rates from `open`.
            successes, trials: (G,) from `outcomes`.
            energies: (2, G) from `Estimate.energies`, or None.
            fit: whether to fit the calibration now. False leaves the fit to another process.
        """
        if self.prior is None or not self.of.needs_prior:
            return
        self.prior.observe(prompts, successes, trials)
        if self.calibrator is not None and self.of.reads_calibration:
            self.calibrator.observe(successes, trials, rates, energies)
            if fit:
                self.calibrator.fit(by_variances=self.of.fits_variances)


def _groups_of(offsets: ArrayLike | None, ids: Sequence[str] | None) -> NDArray[np.int64]:
    """(N,) int64, the position of each rollout's group."""
    if offsets is not None:
        edges = np.asarray(offsets, dtype=np.int64)
        return np.repeat(np.arange(len(edges) - 1), edges[1:] - edges[:-1])
    assert ids is not None
    return factorize(ids)[0].numpy()


def _beside(of_rollouts: torch.Tensor, advantages: torch.Tensor) -> torch.Tensor:
    """Reshape (N,) values so that they broadcast with (N,) or (N, T) advantages, and move them to their device."""
    return of_rollouts.reshape(-1, *[1] * (advantages.ndim - 1)).to(advantages.device)
