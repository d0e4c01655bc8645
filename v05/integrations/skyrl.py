"""V_0.5 in SkyRL: estimators for `trainer.algorithm.advantage_estimator`. Tested with SkyRL 0.3.0.

    from v05.integrations.skyrl import PromptedGenerator, register

    register(reward_range=(0.0, 1.0))       any of `v05.integrations.settings.Settings`

SkyRL has no configuration of its own for estimators, so the settings are given when they are registered, in the process that
trains. `v05_ebpo` wants `prior="mean"` there: the prior is made before SkyRL says which estimator it asks.

An estimator is shown no prompt, no log-probability and no loss mask. Wrap the generator in `PromptedGenerator`, which predicts the
priors on the way and keeps, of every rollout, how many tokens are trained on and the energy. It has energies where
`generator.sampling_params.logprobs` is not null, as by default. Masks that the trainer zeroes later, as its `zero_variance_filter`
does, it does not see: the rewards of such groups count.

Dynamic sampling may filter: the groups that it drops teach the prior nothing. It may not replace, which repeats a group's rollouts
under its id: the test would count them twice, and the prior learn them twice.
"""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Sequence
from itertools import cycle
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from skyrl.backends.skyrl_train.utils.ppo_utils import register_advantage_estimator
from skyrl.train.generators.base import GeneratorInput, GeneratorInterface, GeneratorOutput

from v05.energy import completion_energy
from v05.integrations.groups import ESTIMATORS, PADDING, PromptPriors, outcome_advantages
from v05.integrations.settings import Settings
from v05.methods import find_method


class _Rollout(NamedTuple):
    """What the generator's output says of a rollout, and SkyRL shows no estimator."""

    tokens: int  # that are trained on
    energy: float  # NaN without log-probabilities


PRIORS = PromptPriors()
ROLLOUTS: dict[str, list[_Rollout]] = {}  # of a prompt, which wait for their advantages, in SkyRL's order
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
    tokens, energies = _taken(index, response_mask)
    return outcome_advantages(
        token_level_rewards,
        response_mask,
        index,
        settings=settings,
        priors=PRIORS,
        normalize=grpo_norm_by_std,
        remedy=REMEDY,
        trains=tokens > 0,
        energy=find_method(settings.method).weights(lambda: tokens, lambda: None if np.isnan(energies).any() else energies),
    )


def _taken(
    index: Sequence[Any] | NDArray[np.object_], response_mask: torch.Tensor
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """(B,) tokens that are trained on, and (B,) energies, of rows by their uids, taken out of ROLLOUTS.

    A prompt's n-th row is its n-th rollout, from the first again where dynamic sampling has repeated them. Where a prompt's rows
    are not the rollouts that were generated, all tokens of the mask count, and the energies are NaN; those of padding rows are 0.
    """
    ids = [str(group) for group in index]
    held = {group: (ROLLOUTS.pop(group, []), size) for group, size in Counter(ids).items()}
    known = {group: cycle(rollouts) for group, (rollouts, size) in held.items() if rollouts and size % len(rollouts) == 0}
    rows = [
        next(known[group]) if group in known else _Rollout(length, 0.0 if PADDING.fullmatch(group) else np.nan)
        for group, length in zip(ids, (response_mask != 0).sum(-1).tolist(), strict=True)
    ]
    tokens, energies = np.array(rows, dtype=np.float64).reshape(-1, 2).T
    return tokens, energies


def _rollouts(output: GeneratorOutput) -> list[_Rollout]:
    """One for each trajectory. It has one row; in step-wise training it has one for each step."""
    masks, logprobs = output["loss_masks"], output.get("rollout_logprobs")
    rollouts, tokens, energy = [], 0, 0.0
    for row, (mask, is_last) in enumerate(zip(masks, output.get("is_last_step") or [True] * len(masks), strict=True)):
        tokens += sum(trains != 0 for trains in mask)
        if logprobs:
            energy += completion_energy([p for p, trains in zip(logprobs[row], mask, strict=True) if trains])
        if is_last:
            rollouts.append(_Rollout(tokens, energy if logprobs else np.nan))
            tokens, energy = 0, 0.0
    return rollouts


class PromptedGenerator(GeneratorInterface):  # type: ignore[misc]
    """A generator that predicts the prior of every prompt it is given for training, leaves the sampling to another, and keeps what
    the estimators need to know of each rollout.

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
        ROLLOUTS.update({group: [] for group in ids})
        for group, rollout in zip(ids, _rollouts(output), strict=True):
            ROLLOUTS[group].append(rollout)
        return output
