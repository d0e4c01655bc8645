"""What a run expects of prompts and makes of their rewards: the prior, how far it can be trusted, and advantages."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from v05.budget import RolloutAllocator
from v05.energy import proxy_energies
from v05.methods import Method, Scale, find_method
from v05.ops import AdvantageOutput, fused_advantage
from v05.path_counting import path_counting_advantages
from v05.prior import ConstantPrior, NoisePrior, ValuePrior
from v05.prior.calibration import Calibrator
from v05.prior.history import HistoryPrior
from v05.rollout import Completion
from v05.rollout.scheduler import RolloutBatch
from v05.train.config import RunConfig
from v05.train.distributed import World


class Estimator:
    """The advantage method of a run, with what the run has taught it so far.

    Attributes:
        method: the row of the table.
        prior: predicts success rates and learns from outcomes.
        calibrator: fits how far the prior can be trusted; None for methods that do not ask.
    """

    def __init__(self, config: RunConfig, policy: Path) -> None:
        self.config = config
        self.method = find_method(config.method)
        self.prior = make_prior(config, policy)
        self.calibrator = Calibrator() if self.method.is_calibrated else None

    def predict(self, prompts: Sequence[str]) -> NDArray[np.float64]:
        """(G,) success rates by the prior; NaN for a method without one."""
        return self.prior.predict(prompts) if self.method.needs_prior else np.full(len(prompts), np.nan)

    def allocator(self, prompts: int) -> RolloutAllocator:
        """With the last fit, and the total that `prompts` are to share where the budget is one."""
        budget = self.config.budget
        return RolloutAllocator(
            rule=budget.rule,
            initial=budget.initial,
            maximum=budget.maximum,
            cost=budget.cost,
            total=None if budget.mean is None else max(budget.initial, round(budget.mean * prompts)),
            chunk=budget.chunk,
            seed=self.config.seed,
            calibration=self.calibrator.calibration if self.calibrator and budget.rule in ("calibrated", "total") else None,
        )

    def advantages(
        self, batch: RolloutBatch, rewards: NDArray[np.float64], scale: Scale | None, dtype: torch.dtype = torch.float32
    ) -> AdvantageOutput:
        """(N,) advantages by the run's method, from (N,) rewards; and the statistics of the groups."""
        config = self.config
        return fused_advantage(
            rewards,
            batch.priors if self.method.needs_prior else None,
            group_offsets=batch.offsets,
            method=config.method,
            scale=scale,
            leave_one_out=config.leave_one_out,
            energy=weights_of(self.method, batch.completions),
            calibration=None if self.calibrator is None else self.calibrator.calibration,
            max_rollouts=config.budget.maximum,
            cost=config.budget.cost,
            nonfinite="exclude",
            dtype=dtype,
        )

    def unbiased_advantages(self, batch: RolloutBatch) -> torch.Tensor | None:
        """(N,) advantages by path counting; None where paths cannot be counted: rollouts were lost, or rewards have more than two
        values."""
        if batch.invalid or not np.isin(batch.rewards, (0.0, 1.0)).all():
            return None
        budget = self.config.budget
        advantages = path_counting_advantages(
            batch.rewards,
            batch.priors,
            batch.offsets,
            method=self.config.method,
            initial=budget.initial,
            maximum=budget.maximum,
            cost=budget.cost,
            chunk=budget.chunk,
            calibration=None if self.calibrator is None else self.calibrator.calibration,
        )
        return advantages.float()

    def observe(self, batch: RolloutBatch, world: World) -> None:
        """Learn from the step's outcomes. Every rank must call it: all go on with one rank's fit of the calibration."""
        if not self.method.needs_prior:
            return
        sizes = np.diff(batch.offsets)
        successes = np.add.reduceat(batch.rewards, batch.offsets[:-1]) if len(sizes) else np.zeros(0)
        self.prior.observe([prompt.text for prompt in batch.prompts], successes, sizes)
        if self.calibrator is not None:
            self.calibrator.observe(successes, sizes, batch.priors)
            fitted = self.calibrator.fit() if world.writes else self.calibrator.calibration
            self.calibrator.calibration = world.broadcast(fitted)

    def figures(self) -> dict[str, float]:
        """What the coming step trusts the prior by, and how many fits have failed; nothing for methods that do not ask."""
        if self.calibrator is None:
            return {}
        numbers = {f"calibration_{name}": value for name, value in asdict(self.calibrator.calibration).items()}
        return numbers | {"failed_fits": self.calibrator.failed_fits}

    def state_dict(self) -> dict[str, dict[str, NDArray[Any]]]:
        """All that was learnt, as numeric arrays by part ("prior", "calibrator") and name; a checkpoint keeps them."""
        learnt = {"prior": self.prior.state_dict()}
        return learnt if self.calibrator is None else learnt | {"calibrator": self.calibrator.state_dict()}

    def load_state_dict(self, state: Mapping[str, dict[str, NDArray[Any]]]) -> None:
        """Go on from what `state_dict` of an estimator with the same settings gave."""
        self.prior.load_state_dict(state["prior"])
        if self.calibrator is not None:
            self.calibrator.load_state_dict(state["calibrator"])


def make_prior(config: RunConfig, policy: Path) -> ValuePrior:
    """The prior of the run's configuration; `policy` is the folder of its warm start."""
    if config.prior == "history":
        return HistoryPrior()
    if config.prior == "noise":
        return NoisePrior(config.seed)
    if config.prior in ("constant", "oracle"):  # the trainer is the oracle
        return ConstantPrior()
    from v05.prior.v0 import load_v0

    return load_v0(config.v0.backbone or policy, config.v0.adapter, config.v0.context, config.v0.diverse)


def weights_of(method: Method, completions: Sequence[Completion]) -> NDArray[np.float64] | None:
    """(N,) what the method weighs rollouts by; None where it does not."""
    if method.weight == "length":
        return np.array([len(c.tokens) for c in completions], dtype=np.float64)
    return proxy_energies([c.logprobs for c in completions]) if method.weight == "energy" else None
