"""Rollouts for tests of the policy loss, and what every backend must compute from them on every device."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from v05.ops import LOSSES, loss_weights, policy_loss
from v05.reference import losses

LENGTHS = (3, 1, 37, 0, 16, 5)
TOKENS = 40  # width of a padded row
CPU = torch.device("cpu")


class Batch:
    """Rollouts as rows, and as the tensors of both layouts. The padding is NaN, because nothing may read it."""

    def __init__(self, lengths=LENGTHS, width=TOKENS, seed=0, spread=0.5):
        generator = torch.Generator().manual_seed(seed)
        n, total = len(lengths), sum(lengths)
        self.lengths = torch.tensor(lengths)
        self.mask = torch.arange(width) < self.lengths[:, None]
        self.cu_seqlens = torch.tensor([0, *np.cumsum(lengths)])
        self.old = -3 * torch.rand(total, generator=generator)
        self.new = self.old + spread * torch.randn(total, generator=generator)
        self.sampler = self.old + spread * torch.randn(total, generator=generator)
        self.reference = self.new + spread * torch.randn(total, generator=generator)
        self.advantages = torch.randn(n, generator=generator)
        self.weights = loss_weights(self.lengths)

    def rows(self, packed):
        return [row.double().tolist() for row in packed.split(self.lengths.tolist())]

    def laid_out(self, packed, layout):
        if layout == "packed":
            return packed.clone()
        padded = torch.full(self.mask.shape, math.nan)
        padded[self.mask] = packed
        return padded

    def layout(self, layout):
        return {"cu_seqlens": self.cu_seqlens} if layout == "packed" else {"mask": self.mask}


def assert_specified(batch, layout, backend, loss="ppo", importance=None, kl_estimator=None, device=CPU, **bounds):
    """Loss, figures and gradient equal those of `v05.reference.losses`."""

    def there(values):
        return values.to(device)

    row = replace(LOSSES[loss], **bounds)
    beside, kl = {}, {} if kl_estimator is None else {"kl_coefficient": 0.3, "kl_estimator": kl_estimator}
    given = {}
    if importance is not None:
        given |= {"sampler_logprob": there(batch.laid_out(batch.sampler, layout)), "importance": importance}
        beside |= {"samplers": batch.rows(batch.sampler), "importance": importance}
    if kl:
        given["reference_logprob"] = there(batch.laid_out(batch.reference, layout))
        beside["references"] = batch.rows(batch.reference)
    wanted, gradients, figures = losses.policy_loss(
        batch.rows(batch.new), batch.rows(batch.old), batch.advantages.tolist(), batch.weights.tolist(), row, **beside, **kl
    )
    new = there(batch.laid_out(batch.new, layout)).requires_grad_()
    out = policy_loss(
        new,
        there(batch.laid_out(batch.old, layout)),
        there(batch.advantages),
        weights=there(batch.weights),
        loss=loss,
        backend=backend,
        **{name: there(values) for name, values in batch.layout(layout).items()},
        **bounds,
        **given,
        **kl,
    )
    assert out.loss.item() == pytest.approx(wanted, rel=1e-5, abs=1e-6)
    for name, figure in out.figures._asdict().items():
        assert figure.item() == pytest.approx(figures[name], rel=1e-5, abs=1e-6, nan_ok=True), name
    (3 * out.loss).backward()
    gradient = new.grad.cpu()
    got = gradient if layout == "packed" else gradient[batch.mask]
    torch.testing.assert_close(got.double(), 3 * torch.from_numpy(np.concatenate(gradients)), rtol=1e-5, atol=1e-7)
    if layout == "padded":
        assert (gradient[~batch.mask] == 0).all()
