"""Energies: the squared norm of the gradient of a completion's log-probability, which energy-weighted baselines weigh by.

The energy of a completion is about the sum over its tokens of the squared norm of the logits' gradient (OTB, arXiv 2602.07078):

    1 - 2 pi(y_t) + sum_v pi(v)^2  =  (1 - pi(y_t))^2 + sum over v other than y_t of pi(v)^2

Where only the sampled tokens' log-probabilities are known, a token has the largest value that this can take, 2 (1 - pi(y_t))^2:
all that the sampled token leaves is then with one other.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray


def completion_energy(logprobs: ArrayLike, sum_pi_squared: NDArray[np.float64] | None = None) -> float:
    """The energy of a completion of L tokens, at least 0.

    Args:
        logprobs: (L,) of its tokens under the policy that sampled it, nats.
        sum_pi_squared: (L,) sums over the vocabulary of squared probabilities at its tokens; None where they are not known.
    """
    others = -np.expm1(np.asarray(logprobs, dtype=np.float64))  # 1 - pi, exact where pi is near 1
    if sum_pi_squared is None:
        return float(np.sum(2.0 * np.square(others)))
    return float(np.sum(token_energy(others, sum_pi_squared)))


def token_energy(others: Any, sum_pi_squared: Any) -> Any:
    """The energy of each token, at least 0; of arrays or of tensors.

    Args:
        others: 1 - pi(y_t), the probability of all other tokens.
        sum_pi_squared: likewise, the sums over the vocabulary of squared probabilities.
    """
    # Rounding may leave less than 0 where the policy is certain.
    return others**2 + (sum_pi_squared - (1.0 - others) ** 2).clip(min=0.0)
