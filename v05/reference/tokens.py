"""Token statistics in float64 NumPy: the executable specification of `v05.ops.token_statistics`.

It follows the formulas rather than speed, and loops over tokens. The op never imports it.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

IGNORED = -100


class TokenReference(NamedTuple):
    """Statistics, (tokens,) each, and the gradients of logprob and entropy in a token's own logits, (tokens, V) each."""

    logprob: NDArray[np.float64]
    entropy: NDArray[np.float64]
    sum_pi_squared: NDArray[np.float64]
    gradient_of_logprob: NDArray[np.float64]
    gradient_of_entropy: NDArray[np.float64]


def token_statistics(logits: ArrayLike, targets: ArrayLike, temperature: float = 1.0) -> TokenReference:
    """Compute the statistics of pi = softmax(logits / temperature) at each token.

    They are 0 if the target is IGNORED, and NaN if a logit is NaN or +inf or all are -inf.

    Args:
        logits: (tokens, V); -inf masks a token of the vocabulary.
        targets: (tokens,) ids of the vocabulary, or IGNORED.
    """
    x = np.asarray(logits, dtype=np.float64) / temperature
    numbers, gradients = np.zeros((3, len(x))), np.zeros((2, *x.shape))
    for row, target in enumerate(np.asarray(targets)):
        if target == IGNORED:
            continue
        if not np.all(x[row] < np.inf) or np.all(x[row] == -np.inf):
            numbers[:, row], gradients[:, row] = np.nan, np.nan
            continue
        d = x[row] - x[row].max()
        weights = np.exp(d)
        others = np.delete(weights, np.argmax(d)).sum()  # without the largest weight, which is 1
        pi = weights / (1 + others)
        finite = np.where(weights > 0, d, 0.0)
        mean = np.sum(pi * finite)
        numbers[:, row] = d[target] - np.log1p(others), np.log1p(others) - mean, np.sum(pi**2)
        one_hot = np.arange(x.shape[1]) == target
        rest = np.delete(weights, target).sum() / (1 + others)  # 1 - pi(target)
        gradients[0, row] = np.where(one_hot, rest, -pi) / temperature
        gradients[1, row] = -pi * (finite - mean) / temperature  # -pi (log pi + entropy)
    return TokenReference(*numbers, *gradients)
