"""V_0.5 in verl: estimators that `algorithm.adv_estimator` finds by name. Tested with verl 0.9.1.

verl loads this module automatically, through the entry-point group `verl.plugins`, whenever it is imported.

    algorithm.adv_estimator=v05
    +actor_rollout_ref.rollout.agent.agent_loop_manager_class=v05.integrations.verl_rollout.SequentialAgentLoopManager
    +algorithm.v05.reward_range=[-1,1]      any of `v05.integrations.settings.Settings`
    +algorithm.v05.prior=v0                 for example, the generalist value model as the prior

verl does not pass prompts to an estimator. So the agent loop manager, which runs in the same process as the estimator, predicts the
priors when the prompts are drawn. Another manager can fill the table itself: call
`PRIORS.settle(Settings.read(config.algorithm.get("v05")))` once, and `PRIORS.open(uids, raw_prompts)` for every batch.

verl does not pass log-probabilities either. Methods that read energies get them from the queue of verl's V1 trainer
(`v05.integrations.verl_energies`). Estimators also cannot tell which rows belong to one session, so each output of an agent loop
with several outputs counts as a rollout.
"""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from verl.trainer.ppo.core_algos import register_adv_est

from v05.integrations.groups import ESTIMATORS, PromptPriors, outcome_advantages
from v05.integrations.settings import Settings
from v05.integrations.verl_energies import batch_energies
from v05.methods import find_method

PRIORS = PromptPriors()
REMEDY = (
    "set +actor_rollout_ref.rollout.agent.agent_loop_manager_class=v05.integrations.verl_rollout.SequentialAgentLoopManager, "
    "or, of v05.integrations.verl, call PRIORS.settle(Settings.read(config.algorithm.get('v05'))) once and "
    "PRIORS.open(uids, raw_prompts) where the prompts are drawn"
)


def estimate(
    method: str,
    token_level_rewards: torch.Tensor,
    response_mask: torch.Tensor,
    index: NDArray[np.object_],
    config: Any = None,
    **_: Any,
) -> tuple[torch.Tensor, torch.Tensor]:
    """verl's estimator: (advantages, returns), each (B, T), from rewards (B, T), a mask (B, T) and (B,) uids.

    `config` is verl's `algorithm`. Raises ValueError as `outcome_advantages` does.
    """
    config = {} if config is None else config
    return outcome_advantages(
        token_level_rewards,
        response_mask,
        index,
        settings=Settings.read(config.get("v05"), method),
        priors=PRIORS,
        normalize=config.get("norm_adv_by_std_in_grpo", True),
        remedy=REMEDY,
        energy=find_method(method).weights(
            lambda: (response_mask != 0).sum(-1, dtype=torch.float64).cpu().numpy(),
            lambda: batch_energies(token_level_rewards, response_mask, index),
        ),
    )


for _name, _method in ESTIMATORS.items():
    register_adv_est(_name)(functools.partial(estimate, _method))
