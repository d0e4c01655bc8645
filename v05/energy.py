"""Energies of completions, by which energy-weighted baselines weigh rollouts.

The energy of a completion is the squared norm of the gradient of its log-probability. It is estimated by the sum over its tokens of
the squared norm of the gradient in the logits (OTB, arXiv 2602.07078), which for the token y_t is

    1 - 2 pi(y_t) + sum_v pi(v)^2  =  (1 - pi(y_t))^2 + sum over v other than y_t of pi(v)^2

If only the log-probabilities of the sampled tokens are known, each token gets the upper bound 2 (1 - pi(y_t))^2. It is reached if a
single other token has all of the remaining probability.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray


def completion_energy(logprobs: ArrayLike, sum_pi_squared: NDArray[np.float64] | None = None) -> float:
    """Estimate the energy of a completion of L tokens: a dimensionless number of at least 0.

    Args:
        logprobs: (L,) log-probabilities of its tokens under the policy that sampled them, nats.
        sum_pi_squared: (L,) sums of squared probabilities over the vocabulary at each token, as `v05.ops.token_statistics` returns
            them. None uses the upper bound.

    Returns:
        The energy, for `fused_advantage(energy=...)`. It is 0 for a completion without tokens.

    Example:
        >>> completion_energy([0.0, -0.6931471805599453])  # a certain token, and one of probability 1/2
        0.5

    Source: OTB, arXiv 2602.07078.
    """
    others = -np.expm1(np.asarray(logprobs, dtype=np.float64))  # 1 - pi, exact where pi is near 1
    if sum_pi_squared is None:
        return float(np.sum(2.0 * np.square(others)))
    return float(np.sum(token_energy(others, sum_pi_squared)))


def token_energy(others: Any, sum_pi_squared: Any) -> Any:
    """The energy of each token, at least 0. Takes NumPy arrays or tensors of equal shape, and returns what it takes.

    Args:
        others: 1 - pi(y_t), the total probability of the other tokens.
        sum_pi_squared: the sum of squared probabilities over the vocabulary, pi(y_t)^2 included.
    """
    # Rounding can make the difference slightly negative if the policy is certain.
    return others**2 + (sum_pi_squared - (1.0 - others) ** 2).clip(min=0.0)
