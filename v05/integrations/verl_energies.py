"""The energies of a verl batch, by the log-probabilities in its TransferQueue. Tested with verl 0.9.1, its V1 trainer's queue.

verl gives an estimator rewards, a mask and uids, and log-probabilities only under the names of its own token baselines. Its V1
trainer keeps every rollout in a queue until the step ends, under the key {uid}_{session}_{output}, and has written `old_log_probs`
there before it asks for advantages. Sums of squared probabilities it does not compute, so an energy is the proxy of `v05.energy`.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from v05.energy import completion_energy
from v05.integrations.groups import PADDING

logger = logging.getLogger(__name__)
FIELDS = ["rm_scores", "response_mask", "old_log_probs"]


def batch_energies(
    token_level_rewards: torch.Tensor, response_mask: torch.Tensor, index: Sequence[Any] | NDArray[np.object_]
) -> NDArray[np.float64] | None:
    """(N,) energies of a batch's rows; 0 for rows that fill it up.

    A row does not say which rollout of its group it is. It is found by the rank of its reward, and among equal rewards by its
    number of trained tokens. Rollouts of a group that are alike in both may have swapped energies: the sums over a group's
    successes and over its failures, which `optimal` learns from and `otb` weighs by, are the same.

    Args:
        token_level_rewards, response_mask: (N, T), as verl gives them to an estimator.
        index: (N,) uids, rows in any order.

    Returns:
        None where the process has no queue, as in verl's older trainer, or where the queue does not have the batch's rollouts.
    """
    try:
        import transfer_queue as tq

        tq.get_client()
    except (ImportError, AssertionError):  # it asserts that the process has a client
        return None
    number = {uid: position for position, uid in enumerate(dict.fromkeys(index)) if not PADDING.fullmatch(str(uid))}
    rows = np.array([row for row, uid in enumerate(index) if uid in number], dtype=np.int64)
    stored = {key: key.rsplit("_", 2)[0] for key, tag in tq.kv_list("train").get("train", {}).items() if not tag.get("is_prompt")}
    keys = [key for key, uid in stored.items() if uid in number]
    if not keys:
        return None
    data = tq.kv_batch_get(keys=keys, partition_id="train", select_fields=FIELDS).to_padded_tensor()
    places = _order([number[index[row]] for row in rows], token_level_rewards[rows], response_mask[rows])
    found = _order([number[stored[key]] for key in keys], data["rm_scores"], data["response_mask"])
    if [index[rows[place]] for place in places] != [stored[keys[place]] for place in found]:
        logger.warning("old_log_probs: the queue has %d rollouts of the %d in the batch; it has no energies", len(keys), len(rows))
        return None
    energies, tokens = np.zeros(len(index)), data["response_mask"] != 0
    energies[rows[places]] = [completion_energy(data["old_log_probs"][place][tokens[place]]) for place in found]
    return energies


def _order(groups: list[int], rewards: torch.Tensor, mask: torch.Tensor) -> NDArray[np.int64]:
    """(N,) the order of N rollouts by group, reward and number of trained tokens."""
    tokens, totals = (mask != 0).sum(-1), rewards.sum(-1, dtype=torch.float64)
    return np.lexsort([tokens.cpu().numpy(), totals.cpu().numpy(), np.array(groups)])
