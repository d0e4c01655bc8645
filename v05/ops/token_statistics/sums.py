"""The sums over the vocabulary that the statistics of a token are made of, and how they become statistics.

With x a row of logits, y its target, T the temperature and m the largest logit, a (part of a) vocabulary is summed up by

    m,   s = sum of e^d,   a = sum of d e^d,   q = sum of e^2d,   x_y        where d = (x_v - m) / T

The sums leave out the target, which is added at the end. So 1 - pi(y) = s / Z, and where the target is the most likely token
log pi(y) = -log(1 + s): nothing cancels, however near 1 its probability is.
"""

from __future__ import annotations

from typing import TypeAlias

import torch

from v05.ops.token_statistics.inputs import IGNORED

SUMS = 5  # m, s, a, q and x_y
Made: TypeAlias = tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]
STATE = 4  # what the gradient needs of a token beside its logits: m, 1 / Z, the mean of d, 1 - pi(y)


def statistics(sums: torch.Tensor, ids: torch.Tensor, temperature: float) -> Made:
    """(logprob, entropy, sum_pi_squared, nonfinite, state): of the shape of the ids, an int64 number, and (STATE, tokens).

    Args:
        sums: (shards, SUMS, tokens) float32; the shards of a vocabulary each have a maximum of their own.
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
    """(SUMS, tokens): those of all shards, relative to the largest maximum."""
    if sums.shape[0] == 1:
        return sums[0]
    own, others, slopes, squares, target = sums.unbind(1)
    largest = own.amax(0)
    shift = torch.where(own == -torch.inf, 0.0, (own - largest) / temperature)  # a shard that is masked whole adds nothing
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
