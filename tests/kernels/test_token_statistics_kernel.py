"""Triton's passes over logits, in the interpreter, against the float64 specification."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from helpers.token_statistics import SITUATIONS, STATISTICS, STRIDES, assert_specified, draw, ids
from v05.kernels.token_statistics import launch
from v05.ops import token_statistics
from v05.ops.token_statistics import IGNORED

# The interpreter computes with NumPy, which gives warnings that a GPU does not.
pytestmark = pytest.mark.filterwarnings(
    *(f"ignore:{what}:RuntimeWarning" for what in ("invalid value", "overflow", "divide by zero", "underflow"))
)


@pytest.fixture(autouse=True, scope="module")
def _small_tiles():
    """Make tiles so small that a row has several."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(launch, "TILE", 32)
        yield


@pytest.mark.parametrize("temperature", [1.0, 0.6])
@pytest.mark.parametrize("vocabulary", [1, 2, 15, 16, 33, 98, 256, 300])
def test_specified(vocabulary, temperature):
    targets = ids(1, vocabulary, 5)
    targets[2] = IGNORED
    assert_specified(draw(vocabulary, 5, vocabulary), targets, temperature, backend="triton")


@pytest.mark.parametrize("in_place", [False, True])
@pytest.mark.parametrize("vocabulary", [31, 64])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_read_exactly(dtype, vocabulary, in_place):
    rounding = torch.finfo(dtype).eps
    logits = draw(0, 4, vocabulary, dtype=dtype)
    assert_specified(logits, ids(0, vocabulary, 4), in_place=in_place, rounding=rounding, backend="triton")


@pytest.mark.parametrize("target", [0, 3, 5])
@pytest.mark.parametrize("situation", SITUATIONS)
def test_situations(situation, target):
    logits = draw(5, 3, 13)
    logits[1] = SITUATIONS[situation](logits[1])
    assert_specified(logits, torch.tensor([4, target, IGNORED]), backend="triton")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("strides", STRIDES)
def test_strides(strides, dtype):
    """The logits are views that may begin at any address. Memory outside the gradient must stay unchanged."""
    for in_place in (False, True):
        memory = draw(2, 2, 3, 47, dtype=dtype)
        logits, whole = STRIDES[strides](memory), memory.clone()
        targets = ids(2, 29, *logits.shape[:2])
        out = []
        for leaf, backend in ((logits.detach().requires_grad_(), "triton"), (logits.clone().requires_grad_(), "cpu")):
            given = leaf * 1 if in_place and backend == "cpu" else leaf
            out.append(token_statistics(given, targets, backend=backend, inplace_backward=in_place and backend == "triton"))
            out[-1] = (out[-1], *torch.autograd.grad((out[-1].logprob.sum() + out[-1].entropy.sum()), leaf))
        for name in STATISTICS:
            torch.testing.assert_close(getattr(out[0][0], name), getattr(out[1][0], name), rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(out[0][1], out[1][1])
        if in_place and out[0][1].data_ptr() == logits.data_ptr():
            STRIDES[strides](whole).copy_(out[0][1])
        torch.testing.assert_close(memory, whole, rtol=0, atol=0)


@settings(max_examples=25, deadline=None)
@given(
    shape=st.one_of(st.tuples(st.integers(0, 4)), st.tuples(st.integers(0, 3), st.integers(0, 3))),
    vocabulary=st.integers(1, 120),
    scale=st.sampled_from([0.0, 1.0, 30.0]),
    temperature=st.sampled_from([1.0, 0.3]),
    in_place=st.booleans(),
    seed=st.integers(0, 999),
)
def test_any_shape(shape, vocabulary, scale, temperature, in_place, seed):
    targets = ids(seed, vocabulary, *shape)
    targets[ids(seed + 1, 4, *shape) == 0] = IGNORED
    logits = draw(seed, *shape, vocabulary, scale=scale)
    assert_specified(logits, targets, temperature, in_place=in_place, backend="triton")


def test_from_hidden_states():
    """The results equal those of the CPU backend."""
    made = []
    for backend in ("triton", "cpu"):
        hidden, weight, bias = (
            draw(seed, *shape, scale=1.0).requires_grad_() for seed, shape in enumerate(((7, 8), (33, 8), (33,)))
        )
        out = token_statistics(hidden, ids(1, 33, 7), weight=weight, bias=bias, chunk=3, backend=backend)
        (out.logprob * torch.arange(7)).sum().backward()
        made.append((*out[:3], hidden.grad, weight.grad, bias.grad))
    torch.testing.assert_close(made[0], made[1])
