"""`fused_advantage(backend="triton")` in the interpreter, against the golden cases and `v05.reference`."""

import math
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from helpers.golden_cases import golden_options, golden_parameters
from v05 import _core, reference
from v05.kernels.advantage import kernel, launch
from v05.kernels.advantage.moments import group_moments_kernel
from v05.methods import METHODS, Calibration
from v05.ops import AdvantageOutput, fused_advantage
from v05.ops.advantage.options import SCALES
from v05.ops.advantage.stats import STATISTICS

# Four groups of 1 to 7 rollouts in shuffled rows. One prior is right, one is wrong, and one is missing.
IDS = torch.tensor([2, 0, 1, 1, 0, 2, 1, 0, 2, 1, 3, 1, 0, 1, 1])
REWARDS = torch.tensor([1, 0, 1, 1, 0.5, 1, 0, 1, 1, 0.25, 0.75, 1, 0, 1, 0.5])
PRIOR = torch.tensor([0.4, 0.05, math.nan, 0.6], dtype=torch.float64)
N = len(IDS)
ENERGY = torch.tensor([3.0, 1, 0, 2, 0.5, 4, 1, 0, 0, 7, 0, 2, 2, 1, 0.25])


def run(rewards=REWARDS, prior=PRIOR, ids=IDS, **options) -> AdvantageOutput:
    groups = options.pop("num_groups", None if prior is None else len(prior))
    return fused_advantage(rewards, prior, group_ids=ids, num_groups=groups, nonfinite="exclude", backend="triton", **options)


def expect(rewards=REWARDS, prior=PRIOR, ids=IDS, **options):
    """The reference's (advantages (N,), statistics of each group) for the same numbers."""
    return reference.advantages(rewards.double().numpy(), ids.numpy(), prior, **options)


def assert_advantages(got: torch.Tensor, wanted, rtol: float = 1e-6) -> None:
    torch.testing.assert_close(got.double(), torch.as_tensor(wanted, dtype=torch.float64), rtol=rtol, atol=1e-9)


def assert_stats(stats, wanted: list[reference.GroupStatistics]) -> None:
    for name in ("count", "mean", "var", "baseline", "weight", "statistic", "p_value", "hallucination", "mse", "take_more"):
        values, column = getattr(stats, name), [getattr(group, name) for group in wanted]
        if values is None:
            assert set(column) <= {None}, name
        else:
            np.testing.assert_allclose(values.numpy(), column, rtol=1e-9, atol=1e-12, err_msg=name)


def poisoned(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.full(shape, math.nan, dtype=dtype)


def tokens_of(rows: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    return torch.where(mask != 0, rows[:, None], 0.0)


@pytest.mark.parametrize("case", golden_parameters())
def test_golden(case):
    ids = torch.tensor(case["group_ids"])
    groups = len(case["expect"]["stats"])
    out = run(
        torch.tensor(case["rewards"], dtype=torch.float64),
        None if case["prior"] is None else torch.tensor(case["prior"], dtype=torch.float64),
        ids,
        num_groups=groups,
        **golden_options(case),
    )
    assert out.advantages.dtype == torch.float32
    assert_advantages(out.advantages, case["expect"]["advantages"])
    for name in {name for group in case["expect"]["stats"] for name in group}:
        wanted = [group[name] for group in case["expect"]["stats"]]
        np.testing.assert_allclose(getattr(out.stats, name), wanted, rtol=1e-6, atol=1e-12, err_msg=name)


def test_float32_rewards_at_a_large_offset_keep_their_digits():
    rewards = torch.tensor([10000.001, 10000.002, 10000.003, 10000.0])
    ids = torch.zeros(4, dtype=torch.int64)
    out = run(rewards, None, ids, num_groups=1, method="grpo")
    wanted, stats = expect(rewards, None, ids, method="grpo", num_groups=1)
    assert_advantages(out.advantages, wanted)
    assert_stats(out.stats, stats)


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("leave_one_out", [False, True], ids=["full", "leave-one-out"])
@pytest.mark.parametrize("method", METHODS)
def test_methods(method, leave_one_out, scale):
    options = {"method": method, "leave_one_out": leave_one_out, "scale": scale, "energy": ENERGY.numpy()}
    out = run(**options)
    wanted, stats = expect(**options)
    assert_advantages(out.advantages, wanted)
    assert_stats(out.stats, stats)


@pytest.mark.parametrize("dtype", [torch.bool, torch.uint8, torch.int64, torch.float32], ids=str)
@pytest.mark.parametrize("T", [1, 13, 32, 70])
def test_padded(T, dtype):
    mask = (torch.rand(N, T, generator=torch.Generator().manual_seed(T)) < 0.6).to(dtype)
    out = run(response_mask=mask, out=poisoned(N, T))
    assert_advantages(out.advantages, tokens_of(torch.from_numpy(expect()[0]), mask))


@pytest.mark.parametrize("longest", [5, 17, 80])
def test_packed(longest):
    lengths = torch.randint(0, longest + 1, (N,), generator=torch.Generator().manual_seed(longest))
    cu_seqlens = torch.cat((torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)))
    out = run(cu_seqlens=cu_seqlens, out=poisoned(int(cu_seqlens[-1])))
    assert_advantages(out.advantages, torch.from_numpy(expect()[0]).repeat_interleave(lengths))


def test_contiguous_groups():
    offsets = [0, 3, 3, 10, N]
    ids = torch.tensor([g for g, (a, b) in enumerate(pairwise(offsets)) for _ in range(a, b)])
    out = fused_advantage(REWARDS, PRIOR, group_offsets=offsets, backend="triton", out=poisoned(N))
    wanted, stats = expect(ids=ids)
    assert_advantages(out.advantages, wanted)
    assert_stats(out.stats, stats)


@pytest.mark.parametrize("layout", ["padded", "packed", "per-rollout"])
def test_more_work_than_programs_and_blocks(layout, monkeypatch):
    """Groups larger than a block of rows, rows longer than a block of tokens, and fewer programs than groups or rows need."""
    monkeypatch.setattr(launch, "MAX_BLOCK_ROWS", 16)
    monkeypatch.setattr(launch, "BLOCK_T", 32)
    monkeypatch.setattr(launch, "ENOUGH_PROGRAMS", 4)
    draw = torch.Generator().manual_seed(0)
    ids = (torch.rand(56, generator=draw) < 0.2).long()
    rewards = torch.rand(56, generator=draw)
    prior = torch.tensor([0.5, 0.9], dtype=torch.float64)
    wanted, stats = expect(rewards, prior, ids)
    lengths = torch.randint(0, 200, (56,), generator=draw)
    spread = {
        "padded": {"response_mask": torch.arange(200) < lengths[:, None], "out": poisoned(56, 200)},
        "packed": {"cu_seqlens": [0, *lengths.cumsum(0).tolist()], "out": poisoned(int(lengths.sum()))},
        "per-rollout": {"out": poisoned(56)},
    }[layout]
    out = run(rewards, prior, ids, **spread)
    rows = torch.from_numpy(wanted)
    expected = {
        "padded": tokens_of(rows, torch.arange(200) < lengths[:, None]),
        "packed": rows.repeat_interleave(lengths),
        "per-rollout": rows,
    }[layout]
    assert_advantages(out.advantages, expected)
    assert_stats(out.stats, stats)


@pytest.mark.parametrize("method", ["v05", "rloo", "grpo"])
@pytest.mark.parametrize("scale", ["none", "batch"])
def test_valid_and_trajectories(method, scale):
    """Rows of one trajectory count once. Invalid rows do not count, whatever their reward."""
    trajectories = torch.arange(N)
    trajectories[4] = trajectories[1] = 1  # both are rows of group 0
    rewards = REWARDS.clone()
    rewards[4] = rewards[1]
    rewards[3] = math.nan
    valid = torch.ones(N, dtype=torch.bool)
    valid[[3, 7]] = False
    options = {"method": method, "valid": valid, "trajectory_ids": trajectories, "scale": scale}
    out = run(rewards, out=poisoned(N), **options)
    wanted, stats = expect(rewards, **options)
    assert_advantages(out.advantages, wanted)
    assert_stats(out.stats, stats)
    assert out.stats.nonfinite.sum() == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_token_rewards(dtype):
    T = 21
    mask = torch.rand(N, T, generator=torch.Generator().manual_seed(1)) < 0.7
    mask[:, 3] = True
    token_rewards = torch.where(mask, REWARDS.to(dtype)[:, None] / mask.sum(1, keepdim=True), math.nan)
    options = {"reward_range": (-1.0, 2.0)}  # a sum of rounded thirds may exceed 1
    out = run(token_rewards, response_mask=mask, out=poisoned(N, T), **options)
    wanted, stats = expect(token_rewards.double().nansum(1), **options)
    assert_advantages(out.advantages, tokens_of(torch.from_numpy(wanted), mask))
    assert_stats(out.stats, stats)

    token_rewards[5, 3] = math.inf  # inside the mask: this row is left out
    out = run(token_rewards, response_mask=mask)
    assert out.stats.nonfinite.sum() == 1
    assert out.stats.count.tolist() == [4, 7, 2, 1]
    assert not out.advantages[5].any()


@pytest.mark.parametrize("T", [None, 20], ids=["per-rollout", "padded"])
@pytest.mark.parametrize("scale", SCALES)
def test_nonfinite_rewards_are_left_out_and_counted_once(scale, T, monkeypatch):
    monkeypatch.setattr(launch, "BLOCK_T", 16)  # several programs per row
    rewards = REWARDS.clone()
    rewards[[0, 6, 9]] = torch.tensor([math.nan, math.inf, -math.inf])
    valid = rewards.isfinite()
    mask = None if T is None else torch.ones(N, T, dtype=torch.bool)
    out = run(rewards, scale=scale, response_mask=mask)
    wanted, stats = expect(rewards, valid=valid, scale=scale)
    assert_advantages(out.advantages if T is None else out.advantages[:, 0], wanted)
    assert_stats(out.stats, stats)
    assert out.stats.nonfinite.sum() == 3


@pytest.mark.parametrize("T", [None, 20], ids=["per-rollout", "padded"])
@pytest.mark.parametrize("scale", SCALES)
def test_values_outside_the_range_are_clipped_and_counted_once(scale, T, monkeypatch):
    monkeypatch.setattr(launch, "BLOCK_T", 16)  # several programs per row
    rewards = REWARDS.double()
    rewards[[0, 6]] = torch.tensor([1.5, -7.0], dtype=torch.float64)
    prior = torch.tensor([0.4, 1.2, math.nan, 0.6], dtype=torch.float64)
    options = {"scale": scale, "reward_range": (0.1, 0.9)}  # float32 represents neither bound exactly
    mask = None if T is None else torch.ones(N, T, dtype=torch.bool)
    out = run(rewards, prior, response_mask=mask, dtype=torch.float64, **options)
    wanted, stats = expect(rewards.clamp(0.1, 0.9), prior.clamp(0.1, 0.9), **options)
    assert_advantages(out.advantages if T is None else out.advantages[:, 0], wanted, rtol=1e-12)
    assert_stats(out.stats, stats)
    assert out.stats.clipped.sum() == ((rewards < 0.1) | (rewards > 0.9)).sum() + 1


@pytest.mark.parametrize("method", [m.name for m in METHODS.values() if not m.needs_prior])
def test_methods_without_a_range_take_any_finite_reward(method):
    rewards = REWARDS * 40 - 7
    options = {"method": method, "energy": ENERGY.numpy()}
    out = run(rewards, PRIOR + 9, **options)
    wanted, stats = expect(rewards, PRIOR + 9, **options)
    assert_advantages(out.advantages, wanted)
    assert_stats(out.stats, stats)
    assert out.stats.clipped.sum() == 0


@pytest.mark.parametrize("method", METHODS)
def test_empty_groups(method):
    prior = torch.tensor([0.2, 0.4, math.nan, 0.05, 0.7, math.nan], dtype=torch.float64)
    ids = torch.tensor([1, 3, 3])
    options = {"method": method, "num_groups": 6, "energy": ENERGY[:3].numpy()}
    out = run(REWARDS[:3], prior, ids, **options)
    wanted, stats = expect(REWARDS[:3], prior, ids, **options)
    assert_advantages(out.advantages, wanted)
    assert_stats(out.stats, stats)


def test_no_rollouts():
    nothing = torch.empty(0, dtype=torch.int64)
    for scale in SCALES:
        out = run(nothing.float(), torch.tensor([0.2, 0.9]), nothing, scale=scale)
        assert out.advantages.shape == (0,)
        assert out.stats.baseline.tolist() == pytest.approx([0.2, 0.9])
    assert run(nothing.float(), None, nothing, num_groups=0, method="grpo").stats.count.shape == (0,)
    rows_of_no_group = run(torch.ones(3), None, torch.arange(3), num_groups=0, method="grpo", out=torch.full((3,), 7.0))
    assert rows_of_no_group.advantages.tolist() == [0.0] * 3


@pytest.mark.parametrize("singleton", ["zero", "raw"])
@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("method", METHODS)
def test_a_group_of_one(method, scale, singleton):
    ids, rewards = torch.tensor([0, 1, 1, 2]), torch.tensor([0.75, 0.0, 1.0, 0.5])
    prior = torch.tensor([0.3, 0.5, math.nan], dtype=torch.float64)
    options = {"method": method, "scale": scale, "singleton": singleton, "leave_one_out": True, "energy": [1.0, 2, 3, 4]}
    assert_advantages(run(rewards, prior, ids, **options).advantages, expect(rewards, prior, ids, **options)[0])


@pytest.mark.parametrize("scale", ["group", "batch"])
def test_equal_rewards_have_exactly_their_mean_and_are_not_scaled(scale):
    rewards = torch.full((7,), 0.1, dtype=torch.float64)  # the floating-point sum of seven of these is not 0.7
    ids = torch.tensor([0, 0, 0, 1, 1, 1, 1])
    out = run(rewards, torch.tensor([0.1, 0.9]), ids, method="grpo", scale=scale)
    assert out.stats.mean.tolist() == [0.1, 0.1]
    assert not out.advantages.any()


@pytest.mark.parametrize(
    ("dtype", "rtol"),
    # The interpreter truncates to bfloat16, but a GPU rounds to the nearest.
    [(torch.float64, 1e-12), (torch.float32, 1e-6), (torch.float16, 1e-3), (torch.bfloat16, 2**-7)],
    ids=str,
)
def test_output_dtypes(dtype, rtol):
    mask = torch.arange(20) < torch.arange(N)[:, None]
    rewards = REWARDS.double()
    for options, shape in (({"response_mask": mask}, (N, 20)), ({}, (N,))):
        out = run(rewards, dtype=dtype, out=poisoned(*shape, dtype=dtype), **options)
        wanted = torch.from_numpy(expect(rewards)[0])
        assert_advantages(out.advantages, tokens_of(wanted, mask) if options else wanted, rtol=rtol)


def test_without_statistics():
    out = run(stats=False)
    assert out.stats is None
    assert_advantages(out.advantages, expect()[0])


def test_budget_rule_arguments():
    for options in ({"max_rollouts": 4}, {"max_rollouts": 64, "cost": 0.001}, {"cost": 0.5}):
        assert run(**options).stats.take_more.tolist() == [group.take_more for group in expect(**options)[1]]


def test_the_rule_of_optimal_wants_what_the_reference_and_the_core_want():
    settings = {"method": "optimal", "calibration": Calibration(0.3, 0.8, 6.0, 0.2, -0.3, 1.4)}
    rewards = torch.cat([REWARDS, torch.full((1,), math.nan)])  # a fifth group, without a valid rollout
    ids, prior = torch.cat([IDS, torch.tensor([4])]), torch.cat([PRIOR, torch.full((1,), 0.5)])
    wanted = []
    for options in ({}, {"cost": 0.002}, {"cost": 0.012}, {"cost": 0.03}, {"cost": 0.002, "max_rollouts": 4}):
        more = run(rewards, prior, ids, **settings, **options).stats.take_more.tolist()
        on_cpu = fused_advantage(rewards, prior, group_ids=ids, num_groups=5, nonfinite="exclude", **settings, **options)
        valid = (~rewards.isnan()).numpy()
        of_reference = expect(rewards.nan_to_num(), prior, ids, valid=valid, **settings, **options)[1]
        assert more == on_cpu.stats.take_more.tolist() == [group.take_more for group in of_reference]
        wanted.append(more)
    assert wanted[0] == [False, False, False, False, True]
    assert len({tuple(more) for more in wanted}) >= 4


def test_cpu_tensors_need_the_interpreter(monkeypatch):
    monkeypatch.setattr(launch._advantage, "interpreted", False)  # as if TRITON_INTERPRET had not been set
    with pytest.raises(ValueError, match="TRITON_INTERPRET=1"):
        run()


UNIT = st.floats(0.01, 0.99)


@st.composite
def problems(draw):
    ids = draw(st.lists(st.integers(0, 2), min_size=1, max_size=12))
    values = st.sampled_from([0.0, 0.25, 1.0]) | st.floats(0, 1, width=32)
    each = {"min_size": len(ids), "max_size": len(ids)}
    method = draw(st.sampled_from(list(METHODS.values())))
    prior = st.lists(values | st.just(math.nan), min_size=3, max_size=3)
    return (
        torch.tensor(draw(st.lists(values, **each))),
        torch.tensor(draw(prior), dtype=torch.float64),
        torch.tensor(ids),
        {
            "method": method.name,
            "scale": draw(st.sampled_from([None, *SCALES])),
            "leave_one_out": draw(st.booleans()),
            "singleton": draw(st.sampled_from(["zero", "raw"])),
            "valid": torch.tensor(draw(st.lists(st.booleans(), **each))),
            "energy": draw(st.lists(st.sampled_from([0.0, 1.0]) | st.floats(0.0625, 9, width=32), **each)),
            "reward_range": draw(st.sampled_from([(0.0, 1.0), (-0.5, 3.0)])),
            "calibration": draw(st.none() | st.builds(Calibration, st.floats(-1, 1), st.floats(0, 2), st.floats(0.1, 50), UNIT)),
            "max_rollouts": draw(st.integers(1, 16)),
            "cost": draw(st.sampled_from([0.00123, 0.0101010203, 0.1234567])),
        },
    )


@settings(max_examples=60, deadline=None, derandomize=True)
@given(problems())
def test_against_the_reference(problem):
    rewards, prior, ids, options = problem
    out = run(rewards, prior, ids, dtype=torch.float64, **options)
    wanted, stats = expect(rewards, prior, ids, num_groups=3, **options)
    torch.testing.assert_close(out.advantages, torch.from_numpy(wanted), rtol=1e-9, atol=1e-9)
    assert_stats(out.stats, stats)


def test_numbers_of_the_scales():
    numbers = (kernel.UNSCALED, kernel.GROUP_SCALE, kernel.BATCH_SCALE, kernel.MEAN_SCALE)
    assert [SCALES[number.value] for number in numbers] == list(SCALES)


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64, torch.float16, torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("tokens", [False, True], ids=["outcomes", "token rewards"])
def test_a_mask_that_is_neither_zero_nor_one_counts_as_zero(tokens, dtype):
    """A kernel cannot reject such a value, and -100 marks a token that does not count."""
    flags = torch.arange(37) < torch.arange(N)[:, None] + 5
    mask = flags.to(dtype)
    mask[:, 30:] = torch.tensor([-100, 2, 7, -1, 100, 3, 0], dtype=dtype)
    mask[1::2, 33] = math.nan if dtype.is_floating_point else 5
    flags[:, 30:] = False
    rewards = torch.where(torch.arange(37) < 2, REWARDS[:, None] / 2, 9.0).masked_fill(flags & (torch.arange(37) >= 2), 0.0)
    plain = run(response_mask=flags)
    out = run(rewards.float() if tokens else REWARDS, response_mask=mask)
    torch.testing.assert_close(out.advantages, plain.advantages)


@pytest.mark.parametrize("scale", ["group", "batch"])
def test_a_deviation_that_rounds_to_zero_divides_nothing(scale):
    rewards = torch.tensor([0.0, 1e-200, 2e-200, 0.0], dtype=torch.float64)
    out = run(
        rewards, None, torch.zeros(4, dtype=torch.int64), num_groups=1, method="grpo", scale=scale, eps=0.0, dtype=torch.float64
    )
    assert out.advantages.abs().max() <= 2e-200


def test_what_is_known_of_the_groups_of_a_batch():
    """Groups of 4, 7, 3, 1 and 0 rollouts. The last two have no variance within the group."""
    offsets = torch.tensor([0, 4, 11, 14, 15, 15])
    moments = torch.empty(3, 5, dtype=torch.float64)
    group_moments_kernel[(5,)](REWARDS, offsets, None, None, None, moments, -math.inf, math.inf, BLOCK_ROWS=16)
    groups = [REWARDS[a:b].double() for a, b in pairwise(offsets.tolist())]
    np.testing.assert_allclose(moments[0], [len(x) for x in groups])
    np.testing.assert_allclose(moments[1], [x.mean() for x in groups])
    several = [(x.var(), len(x)) for x in groups if len(x) > 1]
    np.testing.assert_allclose(moments[2], [*(var for var, _ in several), 0, 0], atol=1e-15)

    means = [x.mean() for x in groups if len(x)]
    wanted = [len(means), np.mean(means), np.var(means, ddof=1)]
    wanted += [np.mean([var / k for var, k in several]), np.mean([var / (k - 1) for var, k in several])]
    np.testing.assert_allclose(launch._moments_of_groups(*moments), wanted)


def test_columns_of_the_table_are_those_of_python_and_the_core():
    assert list(STATISTICS) == _core.STATISTICS
    columns = {name.upper(): place for place, name in enumerate(STATISTICS)}
    columns["BASELINE_COLUMN"] = columns.pop("BASELINE")
    assert {name: getattr(kernel, name).value for name in columns} == columns
