"""A bandit whose gradient is known: a softmax policy over 64 right and 64 wrong answers, one of the right ones with probability p.

Scores of answers are high-dimensional and nearly orthogonal, as those of completions are. Mean and squared norm of the score of a
right and of a wrong answer are known, so only rewards have to be drawn: what answers add within them is integrated out.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

ANSWERS = 64  # of a kind

Array = NDArray[np.float64]


def squared_gradient(p: Array | float) -> Array | float:
    """Squared norm of the gradient of p."""
    return 2 * (p * (1 - p)) ** 2 / ANSWERS


def moments(weights: Array, rewards: Array, p: Array | float) -> tuple[Array, Array]:
    """(G,) of G groups, given their rewards: the gradient's length along that of p (1 is the gradient itself), and its expected
    squared norm.

    A group's gradient is the sum of weights times scores. Args: (G, k) weights and rewards, 0 or 1; p (G,) or one for all, inside
    (0, 1).
    """
    p = np.reshape(p, (-1, 1))
    norm = (p**2 + (1 - p) ** 2) / ANSWERS  # squared, of the policy's probabilities
    # The mean score is the gradient of p, divided by p for a right answer and by p - 1 for a wrong one.
    along = weights * np.where(rewards == 1, 1 / p, 1 / (p - 1))
    own = weights**2 * np.where(rewards == 1, 1 - 2 * p / ANSWERS + norm, 1 - 2 * (1 - p) / ANSWERS + norm)
    length = along.sum(axis=1)
    across = length**2 - (along**2).sum(axis=1)
    return length, own.sum(axis=1) + np.squeeze(squared_gradient(p), 1) * across
