"""V_0.5 in SkyRL: estimators for `trainer.algorithm.advantage_estimator`. Tested with SkyRL 0.3.0.

    from v05.integrations.skyrl import PromptedGenerator, register

    register(reward_range=(0.0, 1.0))       any of `v05.integrations.settings.Settings`

SkyRL has no configuration of its own for estimators, so the settings are given when they are registered, in the process that
trains. An estimator is shown no prompt: wrap the generator in `PromptedGenerator`, which predicts the priors on the way.

Dynamic sampling may filter: the groups that it drops teach the prior nothing. It may not replace, which repeats a group's rollouts
under its id: the test would count them twice, and the prior learn them twice.
"""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from skyrl.backends.skyrl_train.utils.ppo_utils import register_advantage_estimator
from skyrl.train.generators.base import GeneratorInput, GeneratorInterface, GeneratorOutput

from v05.integrations.groups import ESTIMATORS, PromptPriors, outcome_advantages
from v05.integrations.settings import Settings
from v05.methods import find_method

PRIORS = PromptPriors()
REMEDY = "wrap the generator in v05.integrations.skyrl.PromptedGenerator"


def register(**settings: Any) -> None:
    """Register the estimators with these settings (`v05.integrations.settings.Settings`); once a process."""
    PRIORS.settle(Settings.read(settings))
    for name, method in ESTIMATORS.items():
        register_advantage_estimator(name)(functools.partial(estimate, Settings.read(settings, method)))


def estimate(
    settings: Settings,
    token_level_rewards: torch.Tensor,
    response_mask: torch.Tensor,
    index: NDArray[np.object_],
    grpo_norm_by_std: bool = True,
    config: Any = None,
    **_: Any,
) -> tuple[torch.Tensor, torch.Tensor]:
    """(advantages, returns), each (B, T), of rewards (B, T), a mask (B, T) and (B,) uids; `config` is `trainer.algorithm`.

    Raises ValueError as `outcome_advantages` does, and where dynamic sampling replaces groups of a method with a prior.
    """
    sampling = getattr(getattr(config, "dynamic_sampling", None), "type", None)
    if sampling == "replace" and find_method(settings.method).needs_prior:
        raise ValueError(
            "trainer.algorithm.dynamic_sampling.type='replace': it repeats a group's rollouts, which V_0.5 would count twice; "
            "choose 'filter' or null"
        )
    return outcome_advantages(
        token_level_rewards,
        response_mask,
        index,
        settings=settings,
        priors=PRIORS,
        normalize=grpo_norm_by_std,
        remedy=REMEDY,
    )


class PromptedGenerator(GeneratorInterface):  # type: ignore[misc]
    """A generator that predicts the prior of every prompt it is given for training, and leaves the sampling to another.

    Args:
        generator: SkyRL's own, or any other.
    """

    def __init__(self, generator: GeneratorInterface) -> None:
        self.generator = generator

    async def generate(self, input_batch: GeneratorInput, *args: Any, **kwargs: Any) -> GeneratorOutput:
        phase, trajectories = input_batch["batch_metadata"], input_batch["trajectory_ids"]
        if trajectories is not None and (phase is None or phase.training_phase == "train"):
            # An id is the prompt's place in the data set, and groups that a filter dropped are open still.
            PRIORS.open([trajectory.instance_id for trajectory in trajectories], input_batch["prompts"], anew=True)
        return await self.generator.generate(input_batch, *args, **kwargs)
