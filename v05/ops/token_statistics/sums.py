"""The sums over the vocabulary from which a token's statistics are computed.

Let x be a row of logits, y its target, T the temperature and m the largest logit. The sums over a vocabulary, or a shard of it, are

    m,   s = sum of e^d,   a = sum of d e^d,   q = sum of e^2d,   x_y        where d = (x_v - m) / T

The sums leave out the target, which is added at the end. Then 1 - pi(y) = s / Z, where Z is the sum with the target, and
log pi(y) = -log(1 + s) if the target is the most likely token. So no digits cancel, however near 1 the target's probability is.
"""

from __future__ import annotations

from typing import TypeAlias

import torch

from v05.ops.token_statistics.inputs import IGNORED

SUMS = 5  # m, s, a, q and x_y
Made: TypeAlias = tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]
STATE = 4  # numbers of a token that the gradient needs: m, 1 / Z, the mean of d, 1 - pi(y)


def statistics(sums: torch.Tensor, ids: torch.Tensor, temperature: float) -> Made:
    """Return (logprob, entropy, sum_pi_squared, nonfinite, state).

    The first three have the shape of `ids`, nonfinite is an int64 scalar, state is (STATE, tokens).

    Args:
        sums: (shards, SUMS, tokens) float32. Each shard has its own maximum m.
        ids: int64, the targets.
    """
    largest, others, slopes, squares, target = _merged(sums, temperature)
    t = (target - largest) / temperature
    of_target = t.exp()
    z = others + of_target
    log_z = torch.where(target == largest, others.log1p(), z.log())
    mean = (slopes + torch.where(of_target == 0, 0.0, of_target * t)) / z
    ignored = ids.flatten() == IGNORED
    logprob = torch.where(ignored, 0.0, t - log_z)
    made = (logprob, log_z - mean, (squares + of_target.square()) / z.square())
    shaped = [torch.where(ignored, 0.0, each).view(ids.shape) for each in made]
    state = torch.where(ignored, 0.0, torch.stack((largest, z.reciprocal(), mean, others / z)))
    return shaped[0], shaped[1], shaped[2], logprob.isfinite().logical_not().sum(), state


def _merged(sums: torch.Tensor, temperature: float) -> torch.Tensor:
    """(SUMS, tokens), the sums over all shards, relative to the largest maximum."""
    if sums.shape[0] == 1:
        return sums[0]
    own, others, slopes, squares, target = sums.unbind(1)
    largest = own.amax(0)
    shift = torch.where(own == -torch.inf, 0.0, (own - largest) / temperature)  # a shard with only -inf adds nothing
    scale = shift.exp()
    return torch.stack(
        (
            largest,
            (scale * others).sum(0),
            (scale * (slopes + torch.where(others == 0, 0.0, shift * others))).sum(0),
            (scale.square() * squares).sum(0),
            target.amax(0),
        )
    )
