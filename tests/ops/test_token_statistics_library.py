"""token_statistics under torch.compile and with fake tensors, and torch's own checks of its operators."""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.library import opcheck

from helpers.token_statistics import draw, ids
from v05.ops import token_statistics
from v05.ops.token_statistics import IGNORED

# Imports and autotuning of Inductor and of the tracer give warnings that this project cannot prevent.
pytestmark = pytest.mark.filterwarnings("ignore")

VOCABULARY, WIDTH = 19, 8
SHAPES = {"packed": (6,), "padded": (2, 3)}


@pytest.fixture(autouse=True, scope="module")
def _no_graphs_of_earlier_runs(tmp_path_factory):
    """Inductor's cache on disk does not notice that an operator's fake implementation has changed."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path_factory.mktemp("inductor")))
        yield


@pytest.fixture(autouse=True)
def _fresh_compiler():
    torch._dynamo.reset()


def operands(shape, kind, dtype=torch.float32):
    """The tensors from which the statistics are computed, and the targets. One target is ignored."""
    targets = ids(1, VOCABULARY, *shape)
    targets[(0,) * len(shape)] = IGNORED
    if kind == "logits":
        return (draw(2, *shape, VOCABULARY, dtype=dtype),), targets
    layer = draw(2, *shape, WIDTH, scale=1.0, dtype=dtype), draw(3, VOCABULARY, WIDTH, scale=1.0, dtype=dtype)
    return (*layer, draw(4, VOCABULARY, dtype=dtype) if kind == "hidden, bias" else None), targets


def statistics_of(tensors, targets):
    logits, weight, bias = (*tensors, None, None)[:3]
    return token_statistics(logits, targets, weight=weight, bias=bias, temperature=0.7)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", ["logits", "hidden", "hidden, bias"])
def test_opcheck(kind, dtype):
    tensors, targets = operands((6,), kind, dtype)
    leaves = [None if tensor is None else tensor.requires_grad_() for tensor in tensors]
    if kind == "logits":
        opcheck(torch.ops.v05.token_statistics.default, (*leaves, targets, 0.7, False, None, None))
    else:
        opcheck(torch.ops.v05.linear_token_statistics.default, (*leaves, targets, 0.7, 4, None, None))


@pytest.mark.parametrize("entropy", [False, True])
@pytest.mark.parametrize("kind", ["logits", "hidden", "hidden, bias"])
def test_opcheck_of_gradients(kind, entropy):
    tensors, targets = operands((6,), kind)
    upstream = torch.rand(4, 6), torch.ones(6), torch.ones(6) if entropy else None
    if kind == "logits":
        opcheck(torch.ops.v05.token_statistics_backward.default, (*tensors, targets, *upstream, 0.7, None, None))
    else:
        needed = [True, False, tensors[2] is not None]
        given = (*tensors, targets, *upstream, 0.7, 4, None, None, needed)
        opcheck(torch.ops.v05.linear_token_statistics_backward.default, given)


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
@pytest.mark.parametrize("kind", ["logits", "hidden", "hidden, bias"])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_compiled_whole(shape, kind, backend):
    tensors, targets = operands(shape, kind)

    def loss(tensors, targets):
        out = statistics_of(tensors, targets)
        return (out.logprob * out.energy).sum() - out.entropy.sum(), out.sum_pi_squared, out.nonfinite

    made = []
    for call in (torch.compile(loss, fullgraph=True, backend=backend), loss):
        leaves = [tensor.clone().requires_grad_() for tensor in tensors if tensor is not None]
        given = (*leaves, None)[: len(tensors)]
        value, *others = call(given, targets)
        value.backward()
        made.append((value, *others, *(leaf.grad for leaf in leaves)))
    torch.testing.assert_close(made[0], made[1])


def test_in_place_is_refused():
    tensors, targets = operands((6,), "logits")
    call = torch.compile(lambda x: token_statistics(x, targets, inplace_backward=True).logprob, fullgraph=True, backend="eager")
    with pytest.raises(Exception, match=r"inplace_backward=True: torch\.compile plans the memory itself"):
        call(*tensors)


@pytest.mark.parametrize("kind", ["logits", "hidden"])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_fake_tensors_give_shapes(shape, kind):
    tensors, targets = operands(shape, kind)
    with FakeTensorMode() as mode:
        fakes = [None if tensor is None else mode.from_tensor(tensor) for tensor in (*tensors, targets)]
        seen = statistics_of(fakes[:-1], fakes[-1])
    for ours, theirs in zip(seen, statistics_of(tensors, targets), strict=True):
        assert ours.shape == theirs.shape
        assert ours.dtype == theirs.dtype
