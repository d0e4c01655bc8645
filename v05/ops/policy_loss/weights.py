"""How much a token says in the loss: one number a rollout, since all its tokens say equally much."""

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
    """The weight of each token of a rollout: summed against the tokens' losses it gives the batch's loss.

    Every rollout has a share: of N rollouts 1 / N, or with `group_offsets` 1 / (G k) in a group of k among G that have any, so that
    prompts weigh alike whatever their number of rollouts.

    Args:
        lengths: (N,) integers, how many tokens of a rollout count.
        aggregation: "token" lets every token of equally weighted rollouts weigh alike, so that long completions count for more
            (DAPO, arXiv 2503.14476); "sequence" spreads a rollout's share over its tokens (GRPO, arXiv 2402.03300); "constant"
            divides it by `length` whatever its tokens are (Dr. GRPO, arXiv 2503.20783).
        group_offsets: (G + 1,) integers from 0 to N; the rollouts of a group are contiguous.
        length: what "constant" divides by, such as the limit on new tokens.

    Returns:
        (N,) float32. Times `lengths` they sum to 1, except under "constant" and for rollouts without tokens. Nothing synchronises.

    Raises:
        ValueError: `length` is missing, or given where nothing reads it.
    """
    choice("aggregation", aggregation, ("token", "sequence", "constant"))
    if (length is None) == (aggregation == "constant"):
        raise ValueError(f"length={length} with aggregation={aggregation!r}; 'constant' needs it, and no other reads it")
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
