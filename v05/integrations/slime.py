"""V_0.5 in slime: two functions to name in slime's options.

    --custom-reward-post-process-path v05.integrations.slime.custom_reward_post_process
    --custom-advantage-function-path v05.integrations.slime.custom_advantage
    --custom-config-path v05.yaml           with a mapping `v05`: any of `v05.integrations.settings.Settings`

slime is not on the package index. This module was written against the source of release 0.4.0 and is tested with objects that have
slime's attributes, not with slime itself.

The first function runs in the process that samples. It sees whole groups and turns their rewards into advantages, which slime then
splits over its ranks. So a group may be split in any way, and group sizes may differ; slime's own normalisation would take groups
of different sizes for one group. The second function runs on each rank and spreads the advantages over tokens. With
`--advantage-estimator grpo` slime does the same, unless it is told to whiten.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from v05.energy import completion_energy
from v05.integrations.groups import PromptPriors
from v05.integrations.settings import Settings

PRIORS = PromptPriors()


def custom_reward_post_process(args: Any, samples: list[Any]) -> tuple[list[Any], list[float]]:
    """Turn the rewards of N samples into advantages. slime calls this hook between sampling and training.

    Args:
        args: slime's arguments. `args.v05` is a mapping of settings, `args.reward_key` is slime's.
        samples: N samples in any order. Samples with the same `group_index` are a group. Samples with the same `rollout_id` are one
            trajectory and count once. A sample is excluded and gets the advantage 0 if it was aborted or removed, if its
            `loss_mask` holds no token, or if its reward is None or NaN.

    Returns:
        (N,) unchanged raw rewards, which slime logs and its dynamic sampling filter reads, and (N,) advantages, which slime passes
        to the trainer as `rewards`.

    Raises:
        ValueError: a sample has no `group_index` or has several rewards; a reward is outside `reward_range`; a setting is unknown.
    """
    estimator = PRIORS.settle(Settings.read(getattr(args, "v05", None)))
    groups = [sample.group_index for sample in samples]
    if None in groups:
        raise ValueError(
            f"group_index: None for sample {groups.index(None)}; give each prompt's samples one, as slime's data source does"
        )
    raw = [sample.get_reward_value(args) for sample in samples]
    if several := [i for i, reward in enumerate(raw) if isinstance(reward, dict)]:
        raise ValueError(
            f"reward_key: sample {several[0]} has the rewards {', '.join(raw[several[0]])}; name one with --reward-key"
        )
    rewards = np.array([np.nan if reward is None else reward for reward in raw], dtype=np.float64)
    names = list(dict.fromkeys(str(group) for group in groups))
    prompts = {str(sample.group_index): sample.prompt for sample in samples}
    rates = PRIORS.open(names, [prompts[name] for name in names])
    rollouts = [getattr(sample, "rollout_id", None) for sample in samples]
    named = {rollout: position for position, rollout in enumerate(dict.fromkeys(rollouts)) if rollout is not None}
    estimate = estimator.advantages(
        rewards,
        rates,
        group_ids=[str(group) for group in groups],
        valid=np.array([_has_a_say(sample) for sample in samples], dtype=bool),
        energy=estimator.of.weights(lambda: _lengths(samples), lambda: _energies(samples)),
        trajectory_ids=np.array([named.get(rollout, len(rollouts) + i) for i, rollout in enumerate(rollouts)], dtype=np.int64),
    )
    PRIORS.close(estimator, names, *estimator.outcomes(estimate.stats), estimate.energies)
    return raw, estimate.advantages.tolist()


def _has_a_say(sample: Any) -> bool:
    """Whether a sample is trained on. slime trains on all tokens of a sample without a loss mask."""
    mask = getattr(sample, "loss_mask", None)
    return not sample.remove_sample and sample.status.value != "aborted" and (mask is None or any(mask))


def _lengths(samples: list[Any]) -> NDArray[np.float64]:
    """(N,) numbers of trained tokens."""
    return np.array([s.response_length if getattr(s, "loss_mask", None) is None else sum(s.loss_mask) for s in samples], np.float64)


def _energies(samples: list[Any]) -> NDArray[np.float64] | None:
    """(N,) energies from the engine's log-probabilities of the trained tokens. None if any log-probabilities are missing."""
    found = []
    for sample in samples:
        logprobs, mask = getattr(sample, "rollout_log_probs", None), getattr(sample, "loss_mask", None)
        if logprobs is None or (mask is not None and len(mask) != len(logprobs)):
            return None
        found.append(completion_energy([p for i, p in enumerate(logprobs) if mask is None or mask[i]]))
    return np.array(found)


def custom_advantage(args: Any, rollout_data: dict[str, Any]) -> None:
    """Spread each sample's advantage, which slime passes as its reward, over the sample's tokens on this rank.

    Writes `advantages` and `returns` into `rollout_data`: the same list of float32 tensors, shaped like the log-probabilities.
    """
    log_probs = rollout_data["rollout_log_probs" if args.use_rollout_logprobs else "log_probs"]
    rollout_data["advantages"] = [
        torch.full_like(tokens, advantage, dtype=torch.float32)
        for tokens, advantage in zip(log_probs, rollout_data["rewards"], strict=True)
    ]
    rollout_data["returns"] = rollout_data["advantages"]
