"""Energies: the squared norm of the gradient of a completion's log-probability, which energy-weighted baselines weigh by.

The energy of a completion is about the sum over its tokens of the squared norm of the logits' gradient,
1 - 2 pi(y_t) + sum_v pi(v)^2 (OTB, arXiv 2602.07078). Where only the sampled tokens' log-probabilities are known, 2 (1 - pi(y_t))^2
stands in for a token.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray


def proxy_energies(logprobs: Sequence[NDArray[np.float32]]) -> NDArray[np.float64]:
    """(N,) energies, from the log-probabilities of each completion's tokens under the policy that sampled it, nats."""
    return np.array([np.sum(2.0 * np.square(-np.expm1(row.astype(np.float64)))) for row in logprobs], dtype=np.float64)
