"""One life of a batch of groups, alike in v05's own trainer and in every host: priors of its prompts before they are sampled,
advantages of its rewards, and what prior and calibration learn from the outcomes.

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
    """What a batch's rewards came to.

    Attributes:
        advantages: (N,), or in the layout that was asked for; reward units, unless a scale divides them.
        stats: of each group.
        counted: (G,) the group's advantages come from counted paths (v05.path_counting), so its early stop does not bias them.
        energies: (2, G) of the group's successes and of its failures, for a method that learns from them; else None.
    """

    advantages: torch.Tensor
    stats: AdvantageStats
    counted: NDArray[np.bool_]
    energies: Floats | None = None


@dataclass(frozen=True)
class Estimator:
    """A method with its settings, its prior and its calibration. What is learnt lives in `prior` and `calibrator` alone, so
    estimators that share them (`dataclasses.replace`) learn together.

    Attributes:
        method: a name of `v05.methods.METHODS`.
        prior: predicts success rates and learns from outcomes; read by methods with a prior.
        calibrator: fits how far the prior is to be trusted; read by calibrated methods, which without one trust it by default.
        reward_range, scale, leave_one_out, eps: as in `v05.ops.fused_advantage`.
        rule: of the budget (`v05.budget.RolloutAllocator`); None is the method's own.
        initial, maximum, chunk, cost: of the budget.
        unbiased: advantages of groups that the method's own rule stopped come from counted paths, where these can be counted.
        group_weighting: "prompt" is for a loss that averages over rollouts, to have prompts weigh alike in it: the advantages of a
            group of k are multiplied by initial / k. "rollout" leaves them.

    Raises:
        ValueError: the method is unknown, or `unbiased` is asked of a method or rule whose paths cannot be counted.
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
                f"unbiased=True with method={self.method!r}, rule={self.rule!r}: paths are counted of methods with a sequential "
                "test, under their own rule; leave it out"
            )

    @property
    def of(self) -> Method:
        """The method's row."""
        return find_method(self.method)

    @property
    def calibration(self) -> Calibration | None:
        """What the prior is trusted by now; None for methods that do not ask."""
        if not self.of.reads_calibration:
            return None
        return Calibration() if self.calibrator is None else self.calibrator.calibration

    def open(self, prompts: Sequence[str]) -> Floats:
        """(G,) success rates predicted for G prompt texts; NaN where nothing is, and for a method without a prior."""
        if self.prior is None or not self.of.needs_prior:
            return np.full(len(prompts), np.nan)
        return self.prior.predict(prompts)

    def in_reward_units(self, rates: Floats) -> Floats:
        """Success rates in [0, 1] as rewards."""
        low, high = self.reward_range
        return low + rates * (high - low)

    def allocator(self, *, calibration: Calibration | None = None, total: int | None = None, seed: int = 0) -> RolloutAllocator:
        """A new one with the budget's settings. Its priors are in reward units.

        Args:
            calibration: of the rules that read one; None is the estimator's own.
            total, seed: of the allocator.
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
        """Of N rollouts in G groups.

        Args:
            rewards: (N,) reward units; NaN, or `valid` False, for a rollout that is left out.
            rates: (G,) as `open` gave them.
            group_offsets, group_ids, valid, response_mask, energy: as in `v05.ops.fused_advantage`, one of the first two.
            whole: (G,) the group is all that its allocator saw. Groups that are not, or that hold a rollout that is left out, have
                the advantages of the op. None is True for all.
            calibrations: (G,) what each group's rule trusted the prior by when it was opened; None is the last fit.
            options: `trajectory_ids` and `dtype` of the op.

        Raises ValueError as the op does.
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
            shares = np.clip((given[~left_out] - low) / (high - low), 0.0, 1.0)  # of a success
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
        """(G,) advantages of a success and (G,) of a failure by path counting; NaN where paths cannot be counted, as of all groups
        where the rewards that take part have more than two values."""
        of_success, of_failure = np.full((2, len(rates)), np.nan)
        low, high = self.reward_range
        if not np.isin(rewards, self.reward_range).all():
            return of_success, of_failure
        sizes = stats.count.cpu().numpy()
        mean = np.where(sizes > 0, stats.mean.cpu().numpy(), low)
        successes = np.rint((mean - low) / (high - low) * sizes).astype(np.int64)
        priors = self.in_reward_units(rates)
        fits = [self.calibration] * len(rates) if calibrations is None else list(calibrations)
        for fit in dict.fromkeys(fits):  # as a rule one for the whole batch
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
        """(successes, trials), each (G,), that a prior learns from; rewards scaled from their range to [0, 1]."""
        low, high = self.reward_range
        trials = stats.count.cpu().numpy().astype(np.float64)
        mean = np.where(trials > 0, stats.mean.cpu().numpy(), low)
        return np.clip((mean - low) / (high - low), 0.0, 1.0) * trials, trials

    def state_dict(self) -> dict[str, dict[str, NDArray[Any]]]:
        """All that was learnt, as numeric arrays by part ("prior", "calibrator") and name; a checkpoint keeps them."""
        return {name: part.state_dict() for name, part in self._learners().items()}

    def load_state_dict(self, state: Mapping[str, dict[str, NDArray[Any]]]) -> None:
        """Go on from what `state_dict` of an estimator with the same settings gave. ValueError for what it never gave."""
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
        """Learn what (G,) trials of each prompt, opened at these rates, came to, and what energies (2, G) they had; nothing for a
        method without a prior.

        With `fit` False the calibration is left for another process to fit.
        """
        if self.prior is None or not self.of.needs_prior:
            return
        self.prior.observe(prompts, successes, trials)
        if self.calibrator is not None and self.of.reads_calibration:
            self.calibrator.observe(successes, trials, rates, energies)
            if fit:
                self.calibrator.fit(by_variances=self.of.fits_variances)


def _groups_of(offsets: ArrayLike | None, ids: Sequence[str] | None) -> NDArray[np.int64]:
    """(N,) the place of each rollout's group."""
    if offsets is not None:
        edges = np.asarray(offsets, dtype=np.int64)
        return np.repeat(np.arange(len(edges) - 1), edges[1:] - edges[:-1])
    assert ids is not None
    return factorize(ids)[0].numpy()


def _beside(of_rollouts: torch.Tensor, advantages: torch.Tensor) -> torch.Tensor:
    """(N,) values in a shape and on the device that go with (N,) or (N, T) advantages."""
    return of_rollouts.reshape(-1, *[1] * (advantages.ndim - 1)).to(advantages.device)
