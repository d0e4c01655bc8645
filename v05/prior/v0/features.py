"""Computes the head's input features of each row, from the other context rows and from the prompt's own past.

The policy's surplus on a prompt is its success rate minus the level of its version. Kernel ridge regression predicts the surplus
from each view of the prompts: meaning, surface text, and both. A context row gets the leave-one-out prediction of its surplus, in
closed form (Rasmussen and Williams 2006, eq. 5.12); a query gets the prediction from the whole context. The two are comparable, so
the head can learn from context rows, where it sees the labels, how far the predictions can be trusted. Kernels and ridges are
averaged by their leave-one-out errors. One candidate predicts a surplus of 0, so uninformative prompts yield features near 0. The
features are differentiable in the prompts' features.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from v05.prior.v0.context import Context, Past

RIDGES = (0.1, 0.5, 2.0, 10.0, 50.0, 250.0)  # of kernels with a mean diagonal of 1
LEAST_VARIANCE = 0.1  # share of the mean variance added to each feature's variance, so that scaling does not amplify constants
NEIGHBOURS = 16
# A neighbour at squared distance d (2 between random rows) has weight (NEAR / (d + NEAREST))^2: 1 at d = 0.4, 25 at d = 0.
NEAR, NEAREST = 0.5, 0.1
COORDINATES = 8  # leading principal components
AGE_DISCOUNT = 0.1  # a row that is n versions old has weight 1 / (1 + AGE_DISCOUNT n)
TRIAL_NOISE = 1.0  # a row of n rollouts has weight n / (n + TRIAL_NOISE)
JITTER = 1e-6  # avoids division by zero when all rows are equal
LOWEST, HIGHEST = 0.02, 0.98  # bounds of the base prediction
COLUMNS = 3 + 3 + 2 + COORDINATES + 3 + 4


@dataclass(frozen=True)
class Task:
    """The head's input: N context rows, then Q queries. Tensors are float32.

    Attributes:
        rows: (N + Q, COLUMNS) features.
        labels: (N, 2) surplus of each context row and the row's weight.
        base: (N + Q,) log-odds of the current level plus the averaged prediction of all regressions.
    """

    rows: Tensor
    labels: Tensor
    base: Tensor


def in_context_task(views: tuple[Tensor, Tensor], context: Context, past: Past, same: NDArray[np.int64]) -> Task:
    """The head's input for predicting Q queries from a context.

    Args:
        views: meaning features (N + Q, D1) and surface features (N + Q, D2), context rows first; float64.
        context: N >= 1 rows.
        past: the past of the Q queries.
        same: (Q,) int64, the index of the context row with the query's prompt, or -1. A query with such a row gets that row's
            leave-one-out predictions, because the row's outcome is already in the query's past and must count once.
    """
    count = len(context)
    surplus = torch.from_numpy(context.rate - context.level)
    weight = torch.from_numpy(context.trials / (context.trials + TRIAL_NOISE) / (1 + AGE_DISCOUNT * context.age))
    meaning, surface = _standardised(views[0], count), views[1]
    linear, _ = _kernel(meaning, count, gaussian=False)
    gaussian, gaussian_norms = _kernel(meaning, count, gaussian=True)
    letters, letters_norms = _kernel(surface, count, gaussian=False)
    both, norms = gaussian + letters, gaussian_norms + letters_norms
    fits = [_regress(kernel, surplus, weight) for kernel in (linear, gaussian, letters, linear + letters, both)]
    predictions, gains = zip(*(_averaged(some, surplus, weight) for some in (fits[:2], fits[2:3], fits)), strict=True)
    columns = [*predictions, *[gain.expand(len(meaning)) for gain in gains], *_neighbours(both, norms, surplus, weight)]
    text = torch.cat((torch.stack(columns, -1), _coordinates(both, count)), -1)
    seen = torch.from_numpy(np.flatnonzero(same >= 0))
    if len(seen):
        text = torch.cat((text[:count], text[count:].index_put((seen,), text[torch.from_numpy(same[same >= 0])])))
    own = torch.from_numpy(
        np.stack([np.concatenate((getattr(context.past, name), getattr(past, name))) for name in ("surplus", "trials", "age")], -1)
    )
    age = torch.cat((torch.from_numpy(np.log1p(context.age)), torch.zeros(len(text) - count, dtype=torch.float64, device="cpu")))
    situation = torch.tensor([context.current, float(surplus.std(correction=0)), np.log(count) / 5], device="cpu")
    rows = torch.cat((text, own[:, :1], torch.log1p(own[:, 1:]), age[:, None], situation.expand(len(text), 3)), -1)
    labels = torch.stack((surplus, weight), -1)
    base = torch.logit((context.current + text[:, 2]).clamp(LOWEST, HIGHEST))
    return Task(rows.float(), labels.float(), base.float())


def _standardised(features: Tensor, count: int) -> Tensor:
    """(M, D) features, each centred and scaled by its standard deviation over the first `count` rows, the context.

    Without scaling, a few outlying features of a language model's hidden states would dominate all distances.
    """
    centred = features - features[:count].mean(0)
    variance = (centred[:count] ** 2).mean(0)
    return centred / (variance + LEAST_VARIANCE * variance.mean() + JITTER**2).sqrt()


def _kernel(features: Tensor, count: int, gaussian: bool) -> tuple[Tensor, Tensor]:
    """The (M, N) kernel between M rows and the first N = `count` of them, the context, and the (M,) kernel of each row with itself.

    Both are centred on the context and scaled so that the mean self-kernel of context rows is 1. The kernel is linear, or Gaussian
    with the mean squared distance between context rows as its squared width.
    """
    centred = features - features[:count].mean(0)
    kernel = centred @ centred[:count].T
    norms = (centred**2).sum(-1)
    if gaussian:
        distances = norms[:, None] + norms[None, :count] - 2 * kernel
        kernel = torch.exp(-distances / (distances[:count].mean() + JITTER))
        norms = torch.ones_like(norms)
    rows, columns = kernel.mean(-1), kernel[:count].mean(0)
    kernel = kernel - rows[:, None] - columns + columns.mean()
    norms = norms - 2 * rows + columns.mean()
    scale = norms[:count].mean() + JITTER
    return kernel / scale, norms / scale


def _regress(kernel: Tensor, surplus: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """(R, M) predicted surplus and (R,) mean squared leave-one-out errors of R ridges.

    The predictions for context rows are leave-one-out.
    """
    count = len(surplus)
    gram = kernel[:count]
    errors, predictions = [], []
    for ridge in RIDGES:
        inverse = torch.cholesky_inverse(torch.linalg.cholesky(gram + torch.diag(ridge / weight)))
        dual = inverse @ surplus
        left_out = surplus - dual / inverse.diagonal()
        errors.append((weight * (surplus - left_out) ** 2).mean() + JITTER)
        predictions.append(torch.cat((left_out, kernel[count:] @ dual)))
    return torch.stack(predictions), torch.stack(errors)


def _averaged(fits: Sequence[tuple[Tensor, Tensor]], surplus: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """(M,) predicted surplus averaged over regressions and the prediction 0, and the relative reduction of the leave-one-out error.

    The reduction, a scalar, is relative to the error of predicting 0.
    """
    predictions, errors = (torch.cat(parts) for parts in zip(*fits, strict=True))
    none = (weight * surplus**2).mean()[None] + JITTER
    errors = torch.cat((none, errors))
    share = torch.softmax(-0.5 * len(surplus) * torch.log(errors), 0)  # as Gaussian pseudo-likelihoods
    return share[1:] @ predictions, 1 - (share @ errors) / none[0]


def _neighbours(kernel: Tensor, norms: Tensor, surplus: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """(M,) distance-weighted mean surplus of the nearest context rows, shrunk to 0, and (M,) log of 1 plus their total weight.

    A row is not its own neighbour. Almost identical prompts have almost the same success rate; a regression over all rows would
    smooth this away.
    """
    count = len(surplus)
    similarity = kernel.detach().clone()
    similarity[:count].fill_diagonal_(-torch.inf)
    nearest = similarity.topk(min(NEIGHBOURS, count)).indices
    distance = (norms[:, None] + norms[nearest] - 2 * kernel.gather(-1, nearest)).clamp(min=0) / (norms[:count].mean() + JITTER)
    near = weight[nearest] * (NEAR / (distance + NEAREST)) ** 2 * (nearest != torch.arange(len(kernel), device="cpu")[:, None])
    return (near * surplus[nearest]).sum(-1) / (near.sum(-1) + 1), torch.log1p(near.sum(-1))


def _coordinates(kernel: Tensor, count: int) -> Tensor:
    """(M, COORDINATES) leading principal components, scaled so that the first has mean square 1; missing ones are zero."""
    fixed = kernel.detach()
    values, vectors = torch.linalg.eigh(fixed[:count])
    kept = min(COORDINATES, count)
    values, vectors = values[-kept:].flip(0), vectors[:, -kept:].flip(1)
    vectors = vectors * torch.where(vectors.abs().amax(0) == vectors.amax(0), 1.0, -1.0)
    coordinates = (
        fixed @ (vectors / values.clamp(min=1e-3)) * (count / values[0].clamp(min=1e-3)).sqrt() * values.clamp(min=0).sqrt()
    )
    return torch.nn.functional.pad(coordinates, (0, COORDINATES - kept))
