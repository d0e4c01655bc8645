"""Micro-batches: divides the rollouts of a step into parts, each for one forward and backward pass."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray


def micro_batches(
    prompts: NDArray[np.int64], completions: NDArray[np.int64], tokens: int, ranks: int = 1
) -> list[NDArray[np.int64]]:
    """Divide n rollouts into parts of similar length, so that little is padding.

    A part has as many rollouts as fit when each is padded to the longest prompt and the longest completion of the part. A rollout
    that exceeds `tokens` alone has a part of its own. Of several ranks, rank r takes every `ranks`-th rollout of a part, from the
    r-th on.

    Args:
        prompts, completions: (n,) lengths in tokens.
        tokens: most tokens, padding included, of one pass of one process.

    Returns:
        Arrays of rollout numbers, which together are 0 .. n - 1; longest rollouts first.
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
