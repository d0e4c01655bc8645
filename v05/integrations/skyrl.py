"""V_0.5 in SkyRL: estimators for `trainer.algorithm.advantage_estimator`. Tested with SkyRL 0.3.0.

    from v05.integrations.skyrl import PromptedGenerator, register

    register(reward_range=(0.0, 1.0))       any of `v05.integrations.settings.Settings`

SkyRL has no configuration for settings of estimators, so `register` takes the settings. Call it in the process that trains. For
`v05_ebpo` give `prior="mean"`, because the prior is made before SkyRL selects the estimator.

SkyRL passes no prompts, log-probabilities or loss masks to an estimator. Wrap the generator in `PromptedGenerator`: it predicts the
priors and keeps the number of trained tokens and the energy of every rollout. Energies need log-probabilities, which SkyRL returns
unless `generator.sampling_params.logprobs` is null. The generator does not see masks that the trainer zeroes later, as its
`zero_variance_filter` does, so the rewards of such groups still count.

Dynamic sampling of type "filter" works; the prior does not learn from the groups that it drops. Type "replace" does not work: it
repeats a group's rollouts under the same id, so the test would count them twice and the prior would learn them twice.
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
    """Properties of a rollout that are in the generator's output, but that SkyRL does not pass to estimators."""

    tokens: int  # number of trained tokens
    energy: float  # NaN without log-probabilities


PRIORS = PromptPriors()
ROLLOUTS: dict[str, list[_Rollout]] = {}  # by prompt id, in SkyRL's order, until their advantages are computed
REMEDY = "wrap the generator in v05.integrations.skyrl.PromptedGenerator"


def register(**settings: Any) -> None:
    """Register the estimators with these settings (`v05.integrations.settings.Settings`). Call it once per process."""
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
    """SkyRL's estimator: (advantages, returns), each (B, T), from rewards (B, T), a mask (B, T) and (B,) uids.

    `config` is `trainer.algorithm`. Raises ValueError as `outcome_advantages` does, and if dynamic sampling replaces groups while
    the method has a prior.
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
    """Take the rows' rollouts out of ROLLOUTS by uid, and return their (B,) numbers of trained tokens and (B,) energies.

    A prompt's n-th row is its n-th rollout, and the count starts again if dynamic sampling has repeated the rollouts. If a prompt's
    rows do not match its rollouts, all tokens of the mask count and the energies are NaN. Energies of padding rows are 0.
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
    """One `_Rollout` per trajectory. A trajectory has one row, or one row per step in step-wise training."""
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
    """A generator that wraps another one. It predicts the priors of training prompts and keeps the rollouts for the estimators.

    Args:
        generator: the generator that samples, SkyRL's own or any other.
    """

    def __init__(self, generator: GeneratorInterface) -> None:
        self.generator = generator

    async def generate(self, input_batch: GeneratorInput, *args: Any, **kwargs: Any) -> GeneratorOutput:
        phase, trajectories = input_batch["batch_metadata"], input_batch["trajectory_ids"]
        if trajectories is None or not (phase is None or phase.training_phase == "train"):
            return await self.generator.generate(input_batch, *args, **kwargs)
        # `anew`: an id is the prompt's index in the data set, so groups that a filter dropped in an earlier epoch are still open.
        ids = [trajectory.instance_id for trajectory in trajectories]
        PRIORS.open(ids, input_batch["prompts"], anew=True)
        output = await self.generator.generate(input_batch, *args, **kwargs)
        ROLLOUTS.update({group: [] for group in ids})
        for group, rollout in zip(ids, _rollouts(output), strict=True):
            ROLLOUTS[group].append(rollout)
        return output
