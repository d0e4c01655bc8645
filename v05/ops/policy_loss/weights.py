"""The weights of tokens in the loss. All tokens of a rollout have the same weight, so there is one number per rollout."""

from __future__ import annotations

import torch

from v05.arguments import choice, integer
from v05.ops.policy_loss.losses import Aggregation


def loss_weights(
    lengths: torch.Tensor,
    *,
    aggregation: Aggregation = "token",
    group_offsets: torch.Tensor | None = None,
    length: int | None = None,
) -> torch.Tensor:
    """The weight of each token of a rollout. The loss of the batch is the sum over all tokens of weight times loss.

    Every rollout has a share of the batch. It is 1 / N for N rollouts. With `group_offsets` it is 1 / (G k) in a group of k
    rollouts among G non-empty groups, so that prompts have equal weight whatever their number of rollouts.

    Args:
        lengths: (N,) integers, the number of tokens of each rollout that count.
        aggregation: "token" gives every token a weight proportional to its rollout's share, so that long completions count for more
            (DAPO, arXiv 2503.14476). "sequence" divides a rollout's share by its number of tokens (GRPO, arXiv 2402.03300).
            "constant" divides it by `length`, whatever the number of tokens (Dr. GRPO, arXiv 2503.20783).
        group_offsets: (G + 1,) integers that rise from 0 to N; the rollouts of a group are contiguous.
        length: the divisor of "constant", such as the limit on new tokens.

    Returns:
        (N,) float32. The sum of weights times `lengths` is 1, except under "constant", and under "sequence" if a rollout has no
        tokens. Nothing synchronises.

    Raises:
        ValueError: `length` is missing for "constant", or given for another aggregation.

    Example:
        >>> loss_weights(torch.tensor([2, 4]), aggregation="sequence").tolist()
        [0.25, 0.125]
    """
    choice("aggregation", aggregation, ("token", "sequence", "constant"))
    if (length is None) == (aggregation == "constant"):
        raise ValueError(f"length={length} with aggregation={aggregation!r}; 'constant' needs it, no other aggregation reads it")
    tokens = lengths.double()
    if group_offsets is None:
        shares = torch.full_like(tokens, 1.0 / max(len(tokens), 1))
    else:
        sizes = group_offsets.diff()
        share = 1.0 / (sizes.double() * (sizes > 0).sum())
        shares = share.repeat_interleave(sizes, output_size=len(tokens))
    if aggregation == "constant":
        return (shares / integer("length", length, 1)).float()
    if aggregation == "sequence":
        return (shares / tokens.clamp(min=1)).float()
    return (shares / (shares * tokens).sum().clamp(min=1e-12)).float()
