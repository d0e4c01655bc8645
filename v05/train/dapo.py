"""DAPO's (arXiv 2503.14476) changes to a step's rollouts: a penalty for long completions, and dynamic sampling."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from v05.rollout import Completion
from v05.rollout.scheduler import RolloutBatch
from v05.train.config import OverlongConfig


def shaped_rewards(
    rewards: NDArray[np.float64], completions: Sequence[Completion], overlong: OverlongConfig | None, limit: int
) -> NDArray[np.float64]:
    """(N,) rewards minus the soft penalty for long completions (eq. 13); the rewards themselves if `overlong` is None.

    The token that ends a completion does not count, so a buffer of 1 penalises only completions that were cut off.
    """
    if overlong is None:
        return rewards
    buffer = overlong.tokens(limit)
    lengths = np.array([len(c.tokens) - c.finished for c in completions])
    return rewards - np.clip((lengths - (limit - buffer)) / buffer, 0.0, 1.0)


def has_signal(batch: RolloutBatch) -> NDArray[np.bool_]:
    """(G,) whether the rewards within each group differ. Dynamic sampling replaces groups whose rewards are all equal."""
    groups = zip(batch.offsets[:-1], batch.offsets[1:], strict=True)
    return np.array([bool(np.ptp(batch.rewards[a:b]) > 0) for a, b in groups], dtype=bool)
