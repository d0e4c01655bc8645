"""Logits for tests of token statistics, and what every backend must compute from them."""

import math

import numpy as np
import torch

from v05.ops import token_statistics
from v05.ops.token_statistics import IGNORED
from v05.reference import tokens

TINY = torch.finfo(torch.float32).tiny  # numbers below this have fewer digits
STATISTICS = ("logprob", "entropy", "sum_pi_squared")


def draw(seed, *shape, scale=4.0, dtype=torch.float32):
    return (scale * torch.randn(*shape, generator=torch.Generator().manual_seed(seed))).to(dtype)


def ids(seed, vocabulary, *shape):
    return torch.randint(vocabulary, shape, generator=torch.Generator().manual_seed(seed))


def assert_specified(logits, targets, temperature=1.0, *, in_place=False, rounding=0.0, backend=None, device="cpu"):
    """Statistics and gradients of `logits` (..., V) equal the specification's.

    The gradients are of sums with weights that differ from token to token. `rounding` is added to the tolerance of the gradient,
    for the dtype of the logits.
    """
    leaf = logits.detach().to(device).requires_grad_()  # keeps the strides of the logits
    out = token_statistics(
        leaf * 1 if in_place else leaf, targets.to(device), temperature=temperature, inplace_backward=in_place, backend=backend
    )
    given = logits.detach().double().reshape(-1, logits.shape[-1]).numpy().copy()
    expected = tokens.token_statistics(given, targets.flatten().numpy(), temperature)
    for name in STATISTICS:
        seen = getattr(out, name).detach().cpu()
        assert seen.shape == targets.shape
        assert seen.dtype == torch.float32
        # A logprob next to 0 is the sum of the other tokens' exponentials, each of which may be flushed to 0. An entropy is the
        # difference of two sums.
        absolute = TINY * logits.shape[-1] if name == "logprob" else 1e-6
        np.testing.assert_allclose(seen.flatten().double(), getattr(expected, name), rtol=1e-6, atol=absolute, err_msg=name)
    unusable = ~np.isfinite(expected.logprob) & (targets.flatten().numpy() != IGNORED)
    assert out.nonfinite.dtype == torch.int64
    assert out.nonfinite.item() == unusable.sum()

    count = targets.numel()
    of_logprob, of_entropy = torch.linspace(-1, 2, count).view(targets.shape), torch.linspace(0.5, -1, count).view(targets.shape)
    upstream = of_logprob.to(device), of_entropy.to(device)
    (gradient,) = torch.autograd.grad((out.logprob, out.entropy), leaf, upstream)
    assert gradient.dtype == logits.dtype
    parts = (of_logprob, expected.gradient_of_logprob), (of_entropy, expected.gradient_of_entropy)
    wanted = sum(weight.double().numpy().reshape(-1, 1) * each for weight, each in parts)
    size = np.abs(wanted).max(1, keepdims=True, initial=0)  # largest entry of each token's gradient
    seen = gradient.cpu().double().numpy().reshape(wanted.shape)
    np.testing.assert_allclose(seen / np.maximum(size, 1e-30), wanted / np.maximum(size, 1e-30), rtol=0, atol=1e-5 + rounding)


SITUATIONS = {
    "large": lambda x: x + 1e4,
    "large and negative": lambda x: x - 1e4,
    "far apart": lambda x: x * 1e4,
    "masked": lambda x: x.masked_fill(torch.arange(13) % 3 == 1, -math.inf),
    "one-hot": lambda x: torch.full_like(x, -math.inf).masked_fill(torch.arange(13) == 3, 2.5),
    "one likely": lambda x: x + 20.0 * (torch.arange(13) == 3),
    "one certain": lambda x: x + 60.0 * (torch.arange(13) == 3),
    "ties": lambda x: torch.zeros_like(x),
    "ties at the top": lambda x: x.clamp(max=0.0),
    "not a number": lambda x: x.masked_fill(torch.arange(13) == 5, math.nan),
    "infinite": lambda x: x.masked_fill(torch.arange(13) == 3, math.inf),
    "masked whole": lambda x: torch.full_like(x, -math.inf),
}


STRIDES = {
    "all but the last": lambda x: x[:, :-1],
    "all but the first": lambda x: x[:, 1:],
    "padded vocabulary": lambda x: x[..., :29],
    "transposed": lambda x: x.transpose(0, 1),
    "columns apart": lambda x: x.transpose(1, 2).contiguous().transpose(1, 2),
    "one row for all": lambda x: x[:1].expand(3, -1, -1),
}
