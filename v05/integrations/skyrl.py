"""V_0.5 in SkyRL: estimators for `trainer.algorithm.advantage_estimator`. Tested with SkyRL 0.3.0.

    from v05.integrations.skyrl import PromptedGenerator, register

    register(reward_range=(0.0, 1.0))       any of `v05.integrations.settings.Settings`

SkyRL has no configuration of its own for estimators, so the settings are given when they are registered, in the process that
trains. An estimator is shown no prompt and no log-probability: wrap the generator in `PromptedGenerator`, which predicts the priors
and keeps the energies on the way. It has energies where `generator.sampling_params.logprobs` is not null, as by default.

Dynamic sampling may filter: the groups that it drops teach the prior nothing. It may not replace, which repeats a group's rollouts
under its id: the test would count them twice, and the prior learn them twice.
"""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from skyrl.backends.skyrl_train.utils.ppo_utils import register_advantage_estimator
from skyrl.train.generators.base import GeneratorInput, GeneratorInterface, GeneratorOutput

from v05.energy import completion_energy
from v05.integrations.groups import ESTIMATORS, PADDING, PromptPriors, outcome_advantages
from v05.integrations.settings import Settings
from v05.methods import find_method

PRIORS = PromptPriors()
ENERGIES: dict[str, list[float]] = {}  # of the rollouts of a prompt that wait for their advantages, in SkyRL's order
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
    energies = _taken(index)
    return outcome_advantages(
        token_level_rewards,
        response_mask,
        index,
        settings=settings,
        priors=PRIORS,
        normalize=grpo_norm_by_std,
        remedy=REMEDY,
        energy=energies if find_method(settings.method).reads_energies else None,
    )


def _taken(index: Sequence[Any] | NDArray[np.object_]) -> NDArray[np.float64] | None:
    """(B,) energies of rows by their uids, taken out of ENERGIES: a prompt's n-th row is its n-th rollout. 0 for rows that fill up
    the batch; None where the rows of a prompt are not the rollouts that were generated."""
    ids = [str(group) for group in index]
    sizes = Counter(group for group in ids if not PADDING.fullmatch(group))
    held = {group: ENERGIES.pop(group, []) for group in sizes}
    if any(len(held[group]) != size for group, size in sizes.items()):
        return None
    rollouts = {group: iter(energies) for group, energies in held.items()}
    return np.array([next(rollouts[group]) if group in rollouts else 0.0 for group in ids])


def _energies(output: GeneratorOutput) -> list[float]:
    """One for each trajectory, by the log-probabilities of the tokens that are trained on. A trajectory has one row; in step-wise
    training it has one for each step."""
    logprobs, masks = output["rollout_logprobs"], output["loss_masks"]
    energies, spent = [], 0.0
    for given, mask, is_last in zip(logprobs, masks, output.get("is_last_step") or [True] * len(masks), strict=True):
        spent += completion_energy([p for p, trains in zip(given, mask, strict=True) if trains])
        if is_last:
            energies.append(spent)
            spent = 0.0
    return energies


class PromptedGenerator(GeneratorInterface):  # type: ignore[misc]
    """A generator that predicts the prior of every prompt it is given for training, leaves the sampling to another, and keeps the
    energies of what that generates.

    Args:
        generator: SkyRL's own, or any other.
    """

    def __init__(self, generator: GeneratorInterface) -> None:
        self.generator = generator

    async def generate(self, input_batch: GeneratorInput, *args: Any, **kwargs: Any) -> GeneratorOutput:
        phase, trajectories = input_batch["batch_metadata"], input_batch["trajectory_ids"]
        if trajectories is None or not (phase is None or phase.training_phase == "train"):
            return await self.generator.generate(input_batch, *args, **kwargs)
        # An id is the prompt's place in the data set, and groups that a filter dropped are open still.
        ids = [trajectory.instance_id for trajectory in trajectories]
        PRIORS.open(ids, input_batch["prompts"], anew=True)
        output = await self.generator.generate(input_batch, *args, **kwargs)
        ENERGIES.update({group: [] for group in ids})
        if output.get("rollout_logprobs"):
            for group, energy in zip(ids, _energies(output), strict=True):
                ENERGIES[group].append(energy)
        return output
