"""`token_statistics` and `policy_loss` on the device: results are right, no call waits for it, and a CUDA graph captures a step."""

import os

import pytest
import torch

from helpers.loss_batches import Batch
from helpers.loss_batches import assert_specified as assert_loss
from helpers.token_statistics import SITUATIONS, STRIDES, draw, ids
from helpers.token_statistics import assert_specified as assert_statistics
from v05.ops import LOSSES, Importance, policy_loss, token_statistics

# NumPy, which the interpreter uses, warns of infinities that the kernels produce on purpose.
pytestmark = [pytest.mark.gpu, pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning", "ignore:overflow:RuntimeWarning")]
ON_GPU = os.environ.get("V05_GPU") == "1"
ROUNDING = {torch.float32: 0.0, torch.bfloat16: torch.finfo(torch.bfloat16).eps, torch.float16: torch.finfo(torch.float16).eps}
VOCABULARIES = (1, 13, 4096, 49_153, 151_936) if ON_GPU else (13, 70)


@pytest.mark.parametrize("dtype", ROUNDING)
@pytest.mark.parametrize("vocabulary", VOCABULARIES)
def test_statistics_of_any_vocabulary(vocabulary, dtype, device):
    logits = draw(0, 5, vocabulary, dtype=dtype)
    assert_statistics(logits, ids(1, vocabulary, 5), rounding=ROUNDING[dtype], backend="triton", device=device)


@pytest.mark.parametrize("situation", SITUATIONS if ON_GPU else ["one likely", "masked"])
def test_statistics_of_unusual_logits(situation, device):
    assert_statistics(SITUATIONS[situation](draw(0, 4, 13)), ids(1, 13, 4), backend="triton", device=device)


@pytest.mark.parametrize("name", STRIDES if ON_GPU else ["all but the last"])
def test_statistics_of_rows_anywhere(name, device):
    logits = STRIDES[name](draw(2, 3, 5, 31))
    assert_statistics(logits, ids(3, logits.shape[-1], *logits.shape[:-1]), backend="triton", device=device)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_hidden_states_give_what_their_logits_give(dtype, cuda):
    hidden, weight = draw(0, 300, 64, scale=1.0).to(cuda, dtype), draw(1, 1000, 64, scale=0.3).to(cuda, dtype)
    targets = ids(2, 1000, 300).to(cuda)
    leaves = [tensor.requires_grad_() for tensor in (hidden, weight)]
    exact = [tensor.detach().double().requires_grad_() for tensor in leaves]
    log_p = torch.log_softmax(exact[0] @ exact[1].t(), -1)
    wanted = log_p.gather(1, targets[:, None])[:, 0], -(log_p.exp() * log_p).sum(-1)
    made = token_statistics(hidden, targets, weight=weight, chunk=128)
    rounding = 1e-5 if dtype == torch.float32 else 2**-7
    for seen, right in zip((made.logprob, made.entropy), wanted, strict=True):
        torch.testing.assert_close(seen.double(), right, rtol=rounding, atol=rounding)
    upstream = torch.randn(2, 300, device=cuda, generator=torch.Generator(cuda).manual_seed(0))
    torch.autograd.backward((made.logprob, made.entropy), list(upstream))
    torch.autograd.backward(wanted, list(upstream.double()))
    for leaf, right in zip(leaves, exact, strict=True):
        difference = (leaf.grad.double() - right.grad).norm() / right.grad.norm()
        assert difference < (1e-5 if dtype == torch.float32 else 1e-2)


def test_hidden_states_leave_no_logits_behind(cuda):
    tokens, vocabulary, width = 16_384, 50_000, 64
    hidden, weight = (torch.randn(rows, width, device=cuda, dtype=torch.bfloat16).requires_grad_() for rows in (tokens, vocabulary))
    targets = torch.randint(vocabulary, (tokens,), device=cuda)
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    token_statistics(hidden, targets, weight=weight).logprob.sum().backward()
    assert torch.cuda.max_memory_allocated() - before < tokens * vocabulary  # a quarter of the logits in float32


@pytest.mark.parametrize("layout", ["padded", "packed"])
@pytest.mark.parametrize("loss", LOSSES if ON_GPU else ["gspo"])
def test_losses(loss, layout, device):
    assert_loss(Batch((1500, 3, 0, 513, 64), 1504), layout, "triton", loss, Importance(cap=1.2), "k3", device=device)
    assert_loss(Batch(), layout, "triton", loss, device=device)


def test_sums_of_many_rollouts_have_the_same_bits_every_time(cuda):
    """The program that arrives last adds up the sums, and which one is last differs from call to call."""
    batch = Batch((5,) * 4000, 8)
    given = [values.to(cuda) for values in (batch.new, batch.old, batch.advantages)]
    layout = {"cu_seqlens": batch.cu_seqlens.to(cuda), "weights": batch.weights.to(cuda)}
    first = policy_loss(*given, **layout)
    for _ in range(50):
        again = policy_loss(*given, **layout)
        assert torch.equal(first.loss, again.loss)
        assert torch.equal(torch.stack(first.figures).nan_to_num(), torch.stack(again.figures).nan_to_num())


def step(hidden, weight, targets, old, advantages, mask, weights):
    made = token_statistics(hidden, targets, weight=weight)
    loss = policy_loss(made.logprob, old, advantages, mask=mask, weights=weights).loss
    return loss, *torch.autograd.grad(loss, (hidden, weight))


def inputs(cuda):
    generator = torch.Generator(cuda).manual_seed(0)

    def normal(*shape):
        return torch.randn(shape, device=cuda, generator=generator)

    targets = torch.randint(500, (6, 33), device=cuda, generator=generator)
    mask = torch.ones(6, 33, dtype=torch.bool, device=cuda)
    return [
        normal(6, 33, 64).requires_grad_(),
        normal(500, 64).requires_grad_(),
        targets,
        normal(6, 33),
        normal(6),
        mask,
        torch.full((6,), 0.01, device=cuda),
    ]


def test_a_step_does_not_wait_for_the_device(cuda, no_synchronisation):
    given = inputs(cuda)
    step(*given)  # the first step compiles
    with no_synchronisation():
        step(*given)


def test_a_step_in_a_cuda_graph_reads_what_is_there(cuda):
    given = inputs(cuda)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        step(*given)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step(*given)
    with torch.no_grad():
        given[0] += 1.0
    graph.replay()
    torch.cuda.synchronize()
    for seen, wanted in zip(captured, step(*given), strict=True):
        torch.testing.assert_close(seen, wanted)
