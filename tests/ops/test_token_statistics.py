"""Statistics of tokens against the float64 specification: at the limits of floating point, and from hidden states."""

import math

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from helpers.token_statistics import SITUATIONS, STATISTICS, STRIDES, assert_specified, draw, ids
from v05.energy import completion_energy
from v05.ops import token_statistics
from v05.ops.token_statistics import IGNORED, cpu, linear
from v05.reference import tokens


@pytest.mark.parametrize("temperature", [1.0, 0.6, 3.0])
@pytest.mark.parametrize("vocabulary", [1, 2, 17, 98, 5000])
def test_specified(vocabulary, temperature):
    targets = ids(1, vocabulary, 9)
    targets[[2, 7]] = IGNORED
    assert_specified(draw(vocabulary, 9, vocabulary), targets, temperature)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_read_exactly(dtype):
    rounding = torch.finfo(dtype).eps
    assert_specified(draw(0, 6, 31, dtype=dtype), ids(0, 31, 6), rounding=rounding)


@pytest.mark.parametrize("target", [0, 3, 4, 5])
@pytest.mark.parametrize("situation", SITUATIONS)
def test_situations(situation, target):
    """One row has the situation, and the rows beside it are ordinary."""
    logits = draw(5, 3, 13)
    logits[1] = SITUATIONS[situation](logits[1])
    assert_specified(logits, torch.tensor([4, target, IGNORED]))
    assert_specified(logits[[0, 2, 1]], torch.tensor([4, 2, IGNORED]))  # an ignored row may hold any logits


@settings(max_examples=60, deadline=None)
@example(shape=(4, 5), vocabulary=10, block=1, scale=30.0, temperature=0.3, seed=399)  # exponentials that are flushed to 0
@given(
    shape=st.one_of(st.tuples(st.integers(0, 9)), st.tuples(st.integers(0, 5), st.integers(0, 5))),
    vocabulary=st.integers(1, 40),
    block=st.sampled_from([1, 30, 100, 1 << 18]),
    scale=st.sampled_from([0.0, 1.0, 30.0]),
    temperature=st.sampled_from([1.0, 0.3]),
    seed=st.integers(0, 999),
)
def test_any_shape(shape, vocabulary, block, scale, temperature, seed):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cpu, "BLOCK_ELEMENTS", block)
        targets = ids(seed, vocabulary, *shape)
        targets[ids(seed + 1, 4, *shape) == 0] = IGNORED
        assert_specified(draw(seed, *shape, vocabulary, scale=scale), targets, temperature)


@pytest.mark.parametrize("in_place", [False, True])
@pytest.mark.parametrize("strides", STRIDES)
def test_strides(strides, in_place):
    """The logits are views. The gradient must not write outside their memory."""
    base, twin = (draw(2, 4, 6, 31).requires_grad_() for _ in range(2))
    out = []
    for leaf, view in ((base, lambda x: x), (twin, torch.clone)):
        logits = view(STRIDES[strides](leaf * 1))
        out.append(token_statistics(logits, ids(2, 29, *logits.shape[:2]), inplace_backward=in_place and leaf is base))
        (out[-1].logprob.sum() + out[-1].entropy.sum()).backward()
    for name in STATISTICS:
        torch.testing.assert_close(getattr(out[0], name), getattr(out[1], name), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(base.grad, twin.grad, rtol=1e-5, atol=1e-6)


def test_in_place():
    """The gradient takes the memory of the logits. A backward pass that needs the old logits raises an error."""
    leaf, targets = draw(3, 5, 11).requires_grad_(), ids(3, 11, 5)
    logits = leaf * 1
    seen = []
    logits.register_hook(lambda gradient: seen.append(gradient.data_ptr()))
    out = token_statistics(logits, targets, inplace_backward=True)
    out.logprob.sum().backward(retain_graph=True)
    assert seen == [logits.data_ptr()]
    torch.testing.assert_close(
        leaf.grad, torch.autograd.functional.jacobian(lambda x: token_statistics(x, targets).logprob.sum(), leaf)
    )
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.logprob.sum().backward()


def test_gradient_of_one_statistic_alone():
    leaf, targets = draw(4, 5, 11).requires_grad_(), ids(4, 11, 5)
    expected = tokens.token_statistics(leaf.detach(), targets)
    for name, wanted in {"logprob": expected.gradient_of_logprob, "entropy": expected.gradient_of_entropy}.items():
        (gradient,) = torch.autograd.grad(getattr(token_statistics(leaf, targets), name).sum(), leaf)
        np.testing.assert_allclose(gradient, wanted, rtol=1e-5, atol=1e-6)
    out = token_statistics(leaf, targets)
    assert not out.sum_pi_squared.requires_grad
    assert not out.energy.requires_grad


def test_energy_is_that_of_completions():
    logits, targets = draw(6, 7, 20), ids(6, 20, 7)
    out = token_statistics(logits, targets)
    expected = completion_energy(out.logprob.numpy(), out.sum_pi_squared.numpy())
    assert out.energy.sum().item() == pytest.approx(expected, rel=1e-5)
    assert token_statistics(logits, torch.full((7,), IGNORED)).energy.tolist() == [0.0] * 7


def loss_of(out):
    weights = torch.linspace(-1, 1, out.logprob.numel()).view(out.logprob.shape)
    return (out.logprob * weights).sum() + (out.entropy * weights.flip(0)).sum()


@pytest.mark.parametrize("chunk", [None, 1, 4, 100])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("shape", [(11,), (2, 5), (0,)])
def test_from_hidden_states(shape, bias, chunk):
    hidden, weight = draw(7, *shape, 8, scale=1.0).requires_grad_(), draw(8, 23, 8, scale=1.0).requires_grad_()
    layer = (weight, draw(9, 23).requires_grad_()) if bias else (weight,)
    targets = ids(7, 23, *shape)
    targets[ids(8, 3, *shape) == 0] = IGNORED
    seen = token_statistics(hidden, targets, weight=weight, bias=layer[1] if bias else None, chunk=chunk, temperature=0.8)
    doubles = [tensor.detach().double().requires_grad_() for tensor in (hidden, *layer)]
    log_pi = torch.log_softmax(torch.nn.functional.linear(*doubles) / 0.8, -1)
    pi, real = log_pi.exp(), targets != IGNORED
    expected = seen._replace(
        logprob=torch.where(real, log_pi.gather(-1, targets.clamp(min=0)[..., None])[..., 0], 0.0),
        entropy=torch.where(real, -(pi * log_pi).sum(-1), 0.0),
        sum_pi_squared=torch.where(real, pi.square().sum(-1), 0.0),
    )
    for name in STATISTICS:
        torch.testing.assert_close(getattr(seen, name).double(), getattr(expected, name), rtol=1e-5, atol=1e-5)
    gradients = torch.autograd.grad(loss_of(seen), (hidden, *layer))
    wanted = torch.autograd.grad(loss_of(expected), doubles)
    for gradient, right in zip(gradients, wanted, strict=True):
        torch.testing.assert_close(gradient.double(), right, rtol=1e-4, atol=1e-5)


def test_of_hidden_states_only_what_is_needed(monkeypatch):
    """A frozen layer gets no gradient. Rows that are ignored or have no upstream gradient are left out of the products."""
    hidden, weight, targets = draw(1, 6, 4).requires_grad_(), draw(2, 9, 4), ids(3, 9, 6)
    targets[1] = IGNORED
    rows = []
    chunks = linear._chunks
    monkeypatch.setattr(linear, "_chunks", lambda layer, chunk: rows.append(layer.hidden.shape[0]) or chunks(layer, chunk))
    out = token_statistics(hidden, targets, weight=weight)
    (out.logprob * torch.tensor([1.0, 1.0, 0.0, 0.0, 1.0, 1.0])).sum().backward()
    assert rows == [5, 3]
    assert weight.grad is None
    assert hidden.grad[1:4].eq(0).all()
    assert hidden.grad[[0, 4, 5]].ne(0).all()


def test_upstream_gradients_that_are_one_number():
    """The upstream gradient of a sum is one number in memory, expanded to all tokens."""
    hidden, weight, targets = draw(1, 6, 4), draw(2, 9, 4), ids(3, 9, 6)
    weighed, summed = hidden.clone().requires_grad_(), hidden.clone().requires_grad_()
    out = token_statistics(summed, targets, weight=weight)
    (out.logprob.sum() + out.entropy.sum()).backward()
    out = token_statistics(weighed, targets, weight=weight)
    ((out.logprob + out.entropy) * torch.ones(6)).sum().backward()
    assert summed.grad.equal(weighed.grad)


def test_weights_of_another_dtype():
    """Each gradient has the dtype of its own tensor, and is rounded once."""
    hidden, weight, targets = draw(1, 50, 8, dtype=torch.bfloat16).requires_grad_(), draw(2, 9, 8).requires_grad_(), ids(3, 9, 50)
    loss_of(token_statistics(hidden, targets, weight=weight, chunk=7)).backward()
    wide, exact = hidden.detach().float().requires_grad_(), weight.detach().clone().requires_grad_()
    loss_of(token_statistics(wide @ exact.t(), targets)).backward()
    assert hidden.grad.dtype == torch.bfloat16
    torch.testing.assert_close(hidden.grad, wide.grad.bfloat16())
    torch.testing.assert_close(weight.grad, exact.grad)


def test_products_of_half_precision(monkeypatch):
    """As on a GPU, the gradient of the logits is rounded to the dtype of the products, but sums are not."""
    computed_in = linear.computed_in
    monkeypatch.setattr(linear, "computed_in", lambda *layer: linear.Layer(*(tensor.bfloat16() for tensor in computed_in(*layer))))
    monkeypatch.setattr(linear, "_WIDE_PRODUCTS", False)  # the CPU has no wide products
    monkeypatch.setattr(linear, "_WIDE_SUMS", False)
    leaves = [draw(seed, *shape, scale=1.0, dtype=torch.bfloat16) for seed, shape in enumerate(((40, 16), (9, 16), (9,)))]
    made = []
    for layer in (leaves, [tensor.float() for tensor in leaves]):
        hidden, weight, bias = (tensor.clone().requires_grad_() for tensor in layer)
        if layer is leaves:
            out = token_statistics(hidden, ids(3, 9, 40), weight=weight, bias=bias, chunk=7)
        else:
            out = token_statistics(hidden @ weight.t() + bias, ids(3, 9, 40))
        loss_of(out).backward()
        made.append((out.logprob.detach(), *(tensor.grad.float() for tensor in (hidden, weight, bias))))
    for seen, expected in zip(*made, strict=True):
        torch.testing.assert_close(seen, expected, rtol=0.03, atol=0.03)


def test_logits_of_all_tokens_never_exist():
    """No operation allocates the logits of all tokens. The profiler counts the memory that each operation allocates and frees."""
    hidden, weight, targets = draw(1, 600, 16).requires_grad_(), draw(2, 1000, 16).requires_grad_(), ids(3, 1000, 600)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        loss_of(token_statistics(hidden, targets, weight=weight, chunk=20)).backward()
    largest = max(event.self_cpu_memory_usage for event in profile.events())
    assert 4 * 20 * 1000 <= largest < 4 * 600 * 1000 / 3


X, Y = torch.zeros(4, 3), torch.zeros(4, dtype=torch.int64)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (dict(logits=X.double()), "logits: dtype torch.float64; give a tensor of float32, bfloat16 or float16"),
        (dict(logits=[[0.0]]), r"logits: \[\[0.0\]\]; give a tensor of float32"),
        (dict(logits=X[0], targets=Y[0]), r"logits: shape \(3,\); give \(tokens, V\) or \(N, T, V\)"),
        (dict(logits=X[:, :0]), r"logits: shape \(4, 0\)"),
        (dict(targets=Y.float()), "targets: dtype torch.float32; give a tensor of int64"),
        (dict(targets=Y[:3]), r"targets: shape \(3,\) for tokens of shape \(4,\); give one id a token"),
        (
            dict(targets=torch.tensor([0, IGNORED, 3, 0])),
            "targets: 3 at position 2 is no id of a vocabulary of 3; give 0 to 2, or -100",
        ),
        (dict(targets=torch.tensor([0, -1, 0, 0])), "targets: -1 at position 1 is no id"),
        (dict(temperature=0.0), "temperature=0; give a finite number above 0"),
        (dict(temperature=math.nan), "temperature=nan"),
        (dict(bias=X[0]), "bias: needs weight"),
        (dict(chunk=2), "chunk: needs weight"),
        (dict(weight=X, chunk=0), "chunk=0; give an integer from 1"),
        (dict(weight=X[:, :2]), r"hidden: shape \(4, 3\) for a weight of shape \(4, 2\); give \(tokens, 2\)"),
        (dict(weight=X[0]), r"weight: shape \(3,\); give the \(V, H\) matrix"),
        (dict(weight=X.double()), "weight: dtype torch.float64"),
        (dict(weight=X, bias=X[0]), r"bias: shape \(3,\); give \(4,\), one a row of weight"),
        (dict(weight=X, inplace_backward=True), "inplace_backward=True: with weight no logits are given"),
        (dict(weight=X, targets=torch.tensor([0, 4, 0, 0])), "targets: 4 at position 1 is no id of a vocabulary of 4"),
        (dict(inplace_backward=1), "inplace_backward=1; give True or False"),
        (dict(backend="cpp"), "backend='cpp' is unknown; choose one of cpu, triton"),
    ],
)
def test_errors(arguments, message):
    with pytest.raises(ValueError, match=message):
        token_statistics(**(dict(logits=X, targets=Y) | arguments))
