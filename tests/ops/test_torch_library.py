"""fused_advantage under torch.compile, torch.export and with fake tensors: the graph is whole, and results are the eager call's."""

import math
from dataclasses import astuple

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.library import opcheck
from torch.testing._internal.two_tensor import TwoTensor

from v05.methods import METHODS, Baseline, Calibration
from v05.ops import AdvantageOutput, fused_advantage
from v05.ops.advantage.stats import STATISTICS

# Imports and autotuning of Inductor and of the tracer give warnings that this project cannot prevent.
pytestmark = pytest.mark.filterwarnings("ignore")

IDS = torch.tensor([2, 0, 1, 2, 2, 0, 3, 1, 2, 0])
OFFSETS = torch.tensor([0, 3, 5, 9, 10])
REWARDS = torch.tensor([1.0, 0.0, 0.5, 1.0, 0.0, 1.0, 1.0, 0.25, 0.0, 1.0])
PRIOR = torch.tensor([0.2, 0.5, 0.9, math.nan])
LENGTHS = torch.tensor([3, 1, 0, 5, 2, 4, 1, 0, 5, 2])
CU_SEQLENS = torch.cat((torch.zeros(1, dtype=torch.int64), LENGTHS.cumsum(0)))
TOKENS = int(LENGTHS.sum())
N = len(IDS)

LAYOUTS = {
    "per-rollout": lambda: {},
    "padded": lambda: {"response_mask": torch.arange(5) < LENGTHS[:, None]},
    "padded, out": lambda: {"response_mask": (torch.arange(5) < LENGTHS[:, None]).long(), "out": torch.full((N, 5), math.nan)},
    "packed": lambda: {"cu_seqlens": CU_SEQLENS.int(), "out": torch.full((TOKENS,), math.nan)},
}
GROUPINGS = {"offsets": {"group_offsets": OFFSETS}, "ids": {"group_ids": IDS, "num_groups": 4}}


@pytest.fixture(autouse=True, scope="module")
def _no_graphs_of_earlier_runs(tmp_path_factory):
    """Inductor's cache on disk does not notice that an operator's fake implementation has changed."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path_factory.mktemp("inductor")))
        yield


@pytest.fixture(autouse=True)
def _fresh_compiler():
    torch._dynamo.reset()


def assert_same(seen: AdvantageOutput, expected: AdvantageOutput) -> None:
    torch.testing.assert_close(seen.advantages, expected.advantages, rtol=0, atol=0)
    for name in (*STATISTICS, "prior"):
        ours, theirs = getattr(seen.stats, name), getattr(expected.stats, name)
        assert (ours is None) == (theirs is None)
        if ours is not None:
            torch.testing.assert_close(ours, theirs, rtol=0, atol=0, equal_nan=True)


def operands(layout, grouping="offsets", *, stats=True, baseline=2):
    """The arguments of the operator itself, in the dtypes that `fused_advantage` passes."""
    extra = LAYOUTS[layout]()
    mask, cu_seqlens = extra.get("response_mask"), extra.get("cu_seqlens")
    out = torch.zeros(N) if not extra else torch.zeros(TOKENS) if mask is None else torch.zeros(N, 5)
    tensors = (
        REWARDS,
        None if mask is None else mask.to(torch.uint8),
        None if cu_seqlens is None else cu_seqlens.long(),
        torch.ones(N, dtype=torch.bool),
        None,
        torch.arange(N).double(),
        4,
        *((OFFSETS, None) if grouping == "offsets" else (None, IDS)),
        PRIOR.nan_to_num(0.5).double(),  # opcheck counts NaN as unequal to itself
        out,
    )
    scale, leave_one_out, raw_singleton, exclude_nonfinite = 0, False, False, False
    switches = (stats, baseline, scale, leave_one_out, raw_singleton, exclude_nonfinite)
    low, high, eps, max_rollouts, cost, calibration = 0.0, 1.0, 1e-6, 16, 0.01, list(astuple(Calibration()))
    return (*tensors, *switches, low, high, eps, max_rollouts, cost, calibration)


@pytest.mark.parametrize("baseline", [int(baseline) for baseline in Baseline])
@pytest.mark.parametrize("grouping", GROUPINGS)
@pytest.mark.parametrize("layout", ["per-rollout", "padded", "packed"])
def test_opcheck(layout, grouping, baseline):
    opcheck(torch.ops.v05.fused_advantage.default, operands(layout, grouping, baseline=baseline))


def test_opcheck_without_statistics():
    opcheck(torch.ops.v05.fused_advantage.default, operands("padded", stats=False))


@pytest.mark.parametrize("backend", ["eager", "aot_eager", "inductor"])
@pytest.mark.parametrize("grouping", GROUPINGS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_compiled_whole(layout, grouping, backend):
    def call(rewards, prior, tensors):
        return fused_advantage(rewards, prior, **tensors)

    arguments = GROUPINGS[grouping] | LAYOUTS[layout]()
    seen = torch.compile(call, fullgraph=True, backend=backend)(REWARDS, PRIOR, arguments)
    if "out" in arguments:
        assert seen.advantages.data_ptr() == arguments["out"].data_ptr()
    assert_same(seen, fused_advantage(REWARDS, PRIOR, **GROUPINGS[grouping], **LAYOUTS[layout]()))


@pytest.mark.parametrize("method", METHODS)
def test_compiled_with_everything_else(method):
    options = {
        "valid": torch.arange(N) != 4,
        "trajectory_ids": torch.arange(N),
        "energy": torch.arange(N).double(),
        "method": method,
        "scale": "batch",
        "leave_one_out": True,
        "nonfinite": "exclude",
        "dtype": torch.bfloat16,
    }
    token_rewards = torch.where(torch.arange(5) == 0, REWARDS[:, None], 0.0)
    token_rewards[1, 0] = math.nan
    mask = torch.ones(N, 5, dtype=torch.int32)

    def call(token_rewards, prior, ids, mask):
        out = fused_advantage(token_rewards, prior, group_ids=ids, num_groups=4, response_mask=mask, **options)
        return out.advantages * 2, out.stats.mean, out.stats.nonfinite, out.stats.take_more

    arguments = (token_rewards, PRIOR, IDS, mask)
    seen = torch.compile(call, fullgraph=True, backend="inductor")(*arguments)
    torch.testing.assert_close(seen, call(*arguments), rtol=0, atol=0, equal_nan=True)


def test_without_statistics():
    def call(rewards):
        return fused_advantage(rewards, PRIOR, group_offsets=OFFSETS, stats=False)

    seen = torch.compile(call, fullgraph=True, backend="aot_eager")(REWARDS)
    assert seen.stats is None
    torch.testing.assert_close(seen.advantages, call(REWARDS).advantages, rtol=0, atol=0)


def test_batches_of_any_size_share_one_graph():
    graphs = 0

    def count_graphs(module, _):
        nonlocal graphs
        graphs += 1
        return module.forward

    def call(rewards, prior, offsets, mask):
        out = fused_advantage(rewards, prior, group_offsets=offsets, response_mask=mask)
        return out.advantages.sum(), out.stats.mean, out.stats.take_more

    compiled = torch.compile(call, fullgraph=True, dynamic=True, backend=count_graphs)
    for groups, size, tokens in ((4, 3, 7), (5, 2, 9), (30, 6, 50)):
        draw = torch.Generator().manual_seed(groups)
        n = groups * size
        arguments = (
            torch.rand(n, generator=draw),
            torch.rand(groups, generator=draw),
            torch.arange(0, n + 1, size),
            torch.rand(n, tokens, generator=draw) < 0.5,
        )
        torch.testing.assert_close(compiled(*arguments), call(*arguments))
    assert graphs == 1


@pytest.mark.parametrize("compiler", [None, "aot_eager", "inductor"])
def test_advantages_carry_no_gradient(compiler):
    weight = torch.tensor(3.0, requires_grad=True)
    prior = PRIOR.clone().requires_grad_()

    def loss(rewards, prior):
        out = fused_advantage(rewards, prior, group_offsets=OFFSETS)
        return (out.advantages * weight).sum(), out.advantages

    run = loss if compiler is None else torch.compile(loss, fullgraph=True, backend=compiler)
    rewards = REWARDS.clone().requires_grad_()
    value, advantages = run(rewards, prior)
    value.backward()
    assert not advantages.requires_grad
    assert rewards.grad is None
    assert prior.grad is None
    torch.testing.assert_close(weight.grad, advantages.sum())


def test_a_backward_through_overwritten_advantages_is_refused():
    weight, buffer = torch.tensor(3.0, requires_grad=True), torch.empty(N)
    loss = (fused_advantage(REWARDS, PRIOR, group_offsets=OFFSETS, out=buffer).advantages * weight).sum()
    fused_advantage(1 - REWARDS, PRIOR, group_offsets=OFFSETS, out=buffer)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


BAD_VALUES = {
    "offsets start late": ({"group_offsets": torch.tensor([1, 10])}, "group_offsets: starts at 1; the first offset is 0"),
    "offsets fall": ({"group_offsets": torch.tensor([0, 7, 2, 10])}, "group_offsets: falls after position 1; sort it"),
    "offsets end early": ({"group_offsets": torch.tensor([0, 9])}, "group_offsets: ends at 9 for 10 rollouts"),
    "ids beyond num_groups": (
        {"group_ids": IDS, "num_groups": 3},
        r"group_ids: outside \[0, num_groups=3\) in rows 6 \(3\)",
    ),
    "packed lengths fall": (
        {"group_offsets": OFFSETS, "cu_seqlens": torch.tensor([0, 2, 1, *range(3, 11)]), "out": torch.empty(10)},
        "cu_seqlens: falls after position 1",
    ),
    "packed into less": (
        {"group_offsets": OFFSETS, "cu_seqlens": CU_SEQLENS, "out": torch.empty(TOKENS - 1)},
        rf"out: shape \({TOKENS - 1},\).*give a contiguous \({TOKENS},\) tensor",
    ),
    "rewards not finite": (
        {"rewards": torch.where(torch.arange(N) == 3, math.nan, REWARDS), "group_offsets": OFFSETS},
        r"rewards: not finite in rows 3 \(nan\)",
    ),
}


@pytest.mark.parametrize("compiler", [None, "eager", "inductor"])
@pytest.mark.parametrize(("arguments", "message"), BAD_VALUES.values(), ids=BAD_VALUES.keys())
def test_values_raise_the_same_error(arguments, message, compiler):
    arguments = {"rewards": REWARDS, "method": "grpo"} | arguments

    def call(arguments):
        return fused_advantage(**arguments).advantages

    run = call if compiler is None else torch.compile(call, fullgraph=True, backend=compiler)
    with pytest.raises(ValueError, match=message):
        run(arguments)


UNTRACEABLE = {
    "strings": ({"group_ids": [str(i) for i in IDS.tolist()]}, "group_ids: torch traces only tensors"),
    "ids without num_groups": ({"group_ids": IDS}, "num_groups: needed with integer group_ids"),
    "packed without out": ({"group_offsets": OFFSETS, "cu_seqlens": CU_SEQLENS}, "out: needed with cu_seqlens"),
    "another device's backend": ({"group_offsets": OFFSETS, "backend": "triton"}, "backend='triton' is not that of cpu"),
}


@pytest.mark.parametrize(("arguments", "message"), UNTRACEABLE.values(), ids=UNTRACEABLE.keys())
def test_what_cannot_be_traced_breaks_the_graph(arguments, message):
    def call(rewards):
        return fused_advantage(rewards, method="grpo", **arguments).advantages

    with pytest.raises(torch._dynamo.exc.Unsupported, match=message):
        torch.compile(call, fullgraph=True, backend="eager")(REWARDS)
    if arguments.get("backend") != "triton":  # after the break torch would trace Triton's interpreter
        torch.testing.assert_close(torch.compile(call, backend="eager")(REWARDS), call(REWARDS))


@pytest.mark.parametrize("calibration", [None, Calibration(0.3, 0.8, 9.0, 0.2)], ids=["default", "fitted"])
@pytest.mark.parametrize("backend", ["eager", "inductor"])
def test_a_calibration_is_compiled_in(backend, calibration):
    def call(rewards, prior):
        return fused_advantage(rewards, prior, group_offsets=OFFSETS, method="calibrated", calibration=calibration)

    seen = torch.compile(call, fullgraph=True, backend=backend)(REWARDS, PRIOR)
    assert_same(seen, call(REWARDS, PRIOR))
    assert seen.stats.hallucination is not None


@pytest.mark.parametrize("method", ["v05", "calibrated"])
@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize("grouping", GROUPINGS)
def test_export_round_trip(grouping, strict, method, tmp_path):
    class Advantage(torch.nn.Module):
        def forward(self, rewards, prior, groups, mask):
            named = {"group_offsets": groups} if grouping == "offsets" else {"group_ids": groups, "num_groups": 4}
            out = fused_advantage(rewards, prior, response_mask=mask, method=method, **named)
            return out.advantages, out.stats  # a plain tuple, because torch.export cannot save a named tuple

    groups = next(iter(GROUPINGS[grouping].values()))
    arguments = (REWARDS, PRIOR, groups, torch.arange(5) < LENGTHS[:, None])
    batch, tokens = torch.export.Dim("batch", min=2), torch.export.Dim("tokens", min=2)
    shapes = ({0: batch}, None, {0: batch} if grouping == "ids" else None, {0: batch, 1: tokens})
    program = torch.export.export(Advantage(), arguments, dynamic_shapes=shapes, strict=strict)
    torch.export.save(program, tmp_path / "advantage.pt2")
    loaded = torch.export.load(tmp_path / "advantage.pt2").module()
    assert_same(AdvantageOutput(*loaded(*arguments)), AdvantageOutput(*Advantage()(*arguments)))
    with pytest.raises(ValueError, match=r"rewards: outside reward_range=\(0, 1\) in rows 0 \(7\)"):
        loaded(torch.where(torch.arange(N) == 0, 7.0, REWARDS), *arguments[1:])


def test_an_exported_program_reads_inputs_of_any_form():
    class Advantage(torch.nn.Module):
        def forward(self, rewards, prior, offsets, mask):
            return fused_advantage(rewards, prior, group_offsets=offsets, response_mask=mask).advantages

    arguments = (REWARDS, PRIOR.double(), OFFSETS, torch.arange(5) < LENGTHS[:, None])
    program = torch.export.export(Advantage(), arguments).module()
    for position, forms in {
        0: (REWARDS.double(), REWARDS.half(), REWARDS.repeat_interleave(2)[::2], REWARDS.clone().requires_grad_()),
        1: (PRIOR, PRIOR.double().repeat_interleave(3)[::3]),
        2: (OFFSETS.int(), OFFSETS.repeat_interleave(2)[::2]),
        3: (arguments[3].bfloat16(), arguments[3].long(), arguments[3].T.contiguous().T),
    }.items():
        for form in forms:
            given = (*arguments[:position], form, *arguments[position + 1 :])
            torch.testing.assert_close(program(*given), Advantage()(*given), rtol=0, atol=0)
    with pytest.raises(ValueError, match=r"prior: shape \(3,\) for 4 groups"):
        torch.ops.v05.fused_advantage(*operands("padded")[:9], PRIOR[:3], *operands("padded")[10:])
    with pytest.raises(ValueError, match=r"rewards: token rewards .* need response_mask"):
        torch.ops.v05.fused_advantage(torch.rand(N, 5), *operands("per-rollout")[1:])


@pytest.mark.parametrize("name", ["rewards", "prior", "valid", "group_offsets", "response_mask", "out"])
def test_tensors_without_memory_are_refused(name):
    """The results of collectives and of DTensor are wrappers: another tensor has the values."""
    arguments = dict(rewards=REWARDS, prior=PRIOR.double(), valid=REWARDS > -1, group_offsets=OFFSETS)
    arguments |= dict(response_mask=torch.ones(N, 5, dtype=torch.bool), out=torch.empty(N, 5))
    arguments[name] = TwoTensor(arguments[name], arguments[name].clone())
    with pytest.raises(ValueError, match=rf"{name}: a tensor without memory of its own; give a plain one"):
        fused_advantage(**arguments)


@pytest.mark.parametrize("grouping", GROUPINGS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_fake_tensors_give_shapes(layout, grouping):
    arguments = GROUPINGS[grouping] | LAYOUTS[layout]() | {"rewards": REWARDS, "prior": PRIOR}
    with FakeTensorMode() as mode:
        fakes = {name: mode.from_tensor(value) if isinstance(value, torch.Tensor) else value for name, value in arguments.items()}
        seen = fused_advantage(**fakes)
    expected = fused_advantage(**arguments)
    assert seen.advantages.shape == expected.advantages.shape
    assert seen.advantages.dtype == expected.advantages.dtype
    for name in ("count", "mean", "take_more"):
        assert getattr(seen.stats, name).shape == (4,)
        assert getattr(seen.stats, name).dtype == getattr(expected.stats, name).dtype
