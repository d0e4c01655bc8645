"""Micro-batches: the rollouts of a step in parts that a forward and backward pass holds at once."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray


def micro_batches(
    prompts: NDArray[np.int64], completions: NDArray[np.int64], tokens: int, ranks: int = 1
) -> list[NDArray[np.int64]]:
    """Which rollouts go together. Rank r of several takes every `ranks`-th of a part, from its r-th on.

    A pass holds as many rollouts as fit when each is padded to the longest prompt and the longest completion among them; a rollout
    that is longer than that goes alone. Rollouts of like length go together, so that little is padding.

    Args:
        prompts, completions: (n,) lengths of n rollouts, tokens.
        tokens: that a pass of a process may hold, padding included.

    Returns:
        parts of 0 .. n - 1, longest rollouts first.
    """
    longest_first = np.argsort(-(prompts + completions), kind="stable")
    parts: list[NDArray[np.int64]] = []
    start = prompt = completion = 0
    for end, row in enumerate(longest_first.tolist()):
        widest = max(prompt, int(prompts[row])) + max(completion, int(completions[row]))
        of_a_rank = -(-(end + 1 - start) // ranks)
        if of_a_rank > 1 and of_a_rank * widest > tokens:
            parts.append(longest_first[start:end])
            start, prompt, completion = end, 0, 0
        prompt, completion = max(prompt, int(prompts[row])), max(completion, int(completions[row]))
    return [*parts, longest_first[start:]] if len(longest_first) else parts
