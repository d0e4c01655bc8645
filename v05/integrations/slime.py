"""V_0.5 in slime: two functions that its options name. slime is not on the package index; this was written against the source of
release 0.4.0 and is tested with objects that have its attributes, not with slime itself.

    --custom-reward-post-process-path v05.integrations.slime.custom_reward_post_process
    --custom-advantage-function-path v05.integrations.slime.custom_advantage
    --custom-config-path v05.yaml           with a mapping `v05`: any of `v05.integrations.settings.Settings`

The first sees whole groups, in the process that samples, and turns rewards into advantages there; slime then splits them over its
ranks. So a group may be split in any way, and sizes may differ, which slime's own normalisation takes for one group. The second
spreads them over the tokens on each rank; with `--advantage-estimator grpo` slime does the same, unless told to whiten.
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
    """slime's hook between sampling and training.

    Args:
        args: slime's arguments; `args.v05` is a mapping of settings, `args.reward_key` as in slime.
        samples: N samples. Those of one `group_index` are a group, in any order. Those that share a `rollout_id` are one
            trajectory and count once. A sample that was aborted or removed, whose `loss_mask` holds no token, or whose reward is
            None or NaN, is left out: 0.

    Returns:
        raw rewards (N,), untouched, which slime logs and its dynamic sampling filter reads, and advantages (N,), which go to
        the trainer as `rewards`.

    Raises:
        ValueError: a sample has no `group_index`, or several rewards; a reward is outside `reward_range`; a setting is unknown.
    """
    estimator = PRIORS.settle(Settings.read(getattr(args, "v05", None)))
    groups = [sample.group_index for sample in samples]
    if None in groups:
        raise ValueError(
            f"group_index: None for sample {groups.index(None)}; give the samples of a prompt one, as slime's data source"
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
    """Whether a sample is trained on: slime trains on all tokens of one without a loss mask."""
    mask = getattr(sample, "loss_mask", None)
    return not sample.remove_sample and sample.status.value != "aborted" and (mask is None or any(mask))


def _lengths(samples: list[Any]) -> NDArray[np.float64]:
    """(N,) tokens that are trained on."""
    return np.array([s.response_length if getattr(s, "loss_mask", None) is None else sum(s.loss_mask) for s in samples], np.float64)


def _energies(samples: list[Any]) -> NDArray[np.float64] | None:
    """(N,) by the log-probabilities that the engine gave of the tokens that are trained on; None unless it gave all."""
    found = []
    for sample in samples:
        logprobs, mask = getattr(sample, "rollout_log_probs", None), getattr(sample, "loss_mask", None)
        if logprobs is None or (mask is not None and len(mask) != len(logprobs)):
            return None
        found.append(completion_energy([p for i, p in enumerate(logprobs) if mask is None or mask[i]]))
    return np.array(found)


def custom_advantage(args: Any, rollout_data: dict[str, Any]) -> None:
    """Spread the advantages in `rewards`, one a sample, over the tokens that this rank holds of each sample.

    Writes `advantages` and `returns`, lists of tensors shaped like the samples' log-probabilities.
    """
    log_probs = rollout_data["rollout_log_probs" if args.use_rollout_logprobs else "log_probs"]
    rollout_data["advantages"] = [
        torch.full_like(tokens, advantage, dtype=torch.float32)
        for tokens, advantage in zip(log_probs, rollout_data["rewards"], strict=True)
    ]
    rollout_data["returns"] = rollout_data["advantages"]
