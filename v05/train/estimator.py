"""Makes the estimator of a run from its configuration, and applies it to the trainer's batches."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from v05.estimator import Estimate, Estimator
from v05.methods import find_method
from v05.prior import ConstantPrior, MeanPrior, NoisePrior, ValuePrior
from v05.prior.calibration import Calibrator
from v05.prior.history import HistoryPrior
from v05.prior.spo import SpoPrior
from v05.rollout.scheduler import RolloutBatch
from v05.train.config import RunConfig
from v05.train.distributed import World


def make_estimator(config: RunConfig, policy: Path) -> Estimator:
    """The estimator that the run's configuration asks for. `policy` is the model folder that training starts from."""
    budget, method = config.budget, find_method(config.method)
    return Estimator(
        config.method,
        make_prior(config, policy),
        Calibrator() if method.reads_calibration else None,
        scale=config.scale,
        leave_one_out=config.leave_one_out,
        rule=budget.rule,
        initial=budget.initial,
        maximum=budget.maximum,
        chunk=budget.chunk,
        cost=budget.cost,
        unbiased=budget.unbiased,
    )


def make_prior(config: RunConfig, policy: Path) -> ValuePrior:
    """The prior that the run's configuration asks for. `policy` is the model folder that training starts from."""
    if config.prior == "history":
        return HistoryPrior()
    if config.prior == "mean":
        return MeanPrior()
    if config.prior == "spo":
        return SpoPrior()
    if config.prior == "noise":
        return NoisePrior(config.seed)
    if config.prior in ("constant", "oracle"):  # for "oracle", the trainer computes the success rates itself
        return ConstantPrior()
    from v05.prior.v0 import load_v0

    return load_v0(config.v0.backbone or policy, config.v0.adapter, config.v0.context, config.v0.diverse)


def estimate_batch(estimator: Estimator, batch: RolloutBatch, rewards: NDArray[np.float64], **options: Any) -> Estimate:
    """The advantages of a step with (N,) rewards. `options` are passed on to `Estimator.advantages`."""
    return estimator.advantages(
        rewards,
        batch.priors,
        group_offsets=batch.offsets,
        energy=estimator.of.weights(
            lambda: np.array([len(c.tokens) for c in batch.completions], dtype=np.float64),
            lambda: np.array([c.energy for c in batch.completions]),
        ),
        whole=np.full(len(batch.prompts), not batch.invalid),  # the batch does not say which groups lost a rollout
        **options,
    )


def close_batch(estimator: Estimator, batch: RolloutBatch, estimate: Estimate, world: World) -> None:
    """Let prior and calibration learn from a step's outcomes. Every rank must call it, because rank 0 broadcasts its
    calibration."""
    sizes = np.diff(batch.offsets)
    successes = np.add.reduceat(batch.rewards, batch.offsets[:-1]) if len(sizes) else np.zeros(0)
    estimator.close([prompt.text for prompt in batch.prompts], batch.priors, successes, sizes, estimate.energies, fit=world.writes)
    if estimator.calibrator is not None:
        estimator.calibrator.calibration = world.broadcast(estimator.calibrator.calibration)
