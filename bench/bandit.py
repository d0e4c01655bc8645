"""A bandit with a known gradient: a softmax policy over 64 right and 64 wrong answers, with total probability p on the right ones.

The scores of answers are high-dimensional and nearly orthogonal, like those of completions. The mean and the squared norm of the
score are known for right and for wrong answers. So only rewards have to be drawn; the answers given the rewards are integrated out.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

ANSWERS = 64  # answers of each kind

Array = NDArray[np.float64]


def squared_gradient(p: Array | float) -> Array | float:
    """Squared norm of the gradient of p."""
    return 2 * (p * (1 - p)) ** 2 / ANSWERS


def moments(weights: Array, rewards: Array, p: Array | float) -> tuple[Array, Array]:
    """Two (G,) moments of the gradients of G groups, given their rewards.

    They are the mean gradient's component along the gradient of p, in units of that gradient (1 means equal), and the expected
    squared norm. A group's gradient is the sum of its weights times scores.

    Args:
        weights: (G, k) weights.
        rewards: (G, k) rewards, 0 or 1.
        p: success rates inside (0, 1), (G,) or one for all groups.
    """
    p = np.reshape(p, (-1, 1))
    norm = (p**2 + (1 - p) ** 2) / ANSWERS  # squared norm of the policy's probabilities
    # The mean score is the gradient of p, divided by p for a right answer and by p - 1 for a wrong one.
    along = weights * np.where(rewards == 1, 1 / p, 1 / (p - 1))
    own = weights**2 * np.where(rewards == 1, 1 - 2 * p / ANSWERS + norm, 1 - 2 * (1 - p) / ANSWERS + norm)
    length = along.sum(axis=1)
    across = length**2 - (along**2).sum(axis=1)
    return length, own.sum(axis=1) + np.squeeze(squared_gradient(p), 1) * across
