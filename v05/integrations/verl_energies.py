"""The energies of a verl batch, from the log-probabilities in verl's TransferQueue. Tested with the V1 trainer of verl 0.9.1.

verl passes rewards, a mask and uids to an estimator; it passes log-probabilities only to its own token-level baselines. Its V1
trainer keeps every rollout in a queue until the step ends, under the key {uid}_{session}_{output}, and writes `old_log_probs` there
before it computes advantages. verl does not compute sums of squared probabilities, so an energy is the proxy of `v05.energy`
without them.
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
    """(N,) energies of a batch's rows. They are 0 for rows that fill up the batch.

    A row does not say which rollout of its group it is. It is matched with the group's rollouts in the queue by the rank of its
    reward and, among equal rewards, of its number of trained tokens. Two rollouts that agree in both may have their energies
    swapped. That does not change the sums over a group's successes and over its failures, which `optimal` learns from and `otb`
    weights by.

    Args:
        token_level_rewards, response_mask: (N, T), as verl passes them to an estimator.
        index: (N,) uids, rows in any order.

    Returns:
        the energies, or None if the process has no queue, as in verl's older trainer, or if the queue lacks rollouts of the batch.
    """
    try:
        import transfer_queue as tq

        tq.get_client()
    except (ImportError, AssertionError):  # get_client asserts that the process has a client
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
        logger.warning(
            "old_log_probs: the queue has %d rollouts of the %d in the batch; no energies are used", len(keys), len(rows)
        )
        return None
    energies, tokens = np.zeros(len(index)), data["response_mask"] != 0
    energies[rows[places]] = [completion_energy(data["old_log_probs"][place][tokens[place]]) for place in found]
    return energies


def _order(groups: list[int], rewards: torch.Tensor, mask: torch.Tensor) -> NDArray[np.int64]:
    """(N,) indices that sort N rollouts by group, reward and number of trained tokens."""
    tokens, totals = (mask != 0).sum(-1), rewards.sum(-1, dtype=torch.float64)
    return np.lexsort([tokens.cpu().numpy(), totals.cpu().numpy(), np.array(groups)])
