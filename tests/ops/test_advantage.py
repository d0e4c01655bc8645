"""fused_advantage on the CPU against golden cases, the reference and broken input."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from helpers.golden_cases import golden_options, golden_parameters
from v05 import _core, reference
from v05.kernels.grouping.launch import by_sorting
from v05.methods import METHODS, Calibration
from v05.ops import factorize, fused_advantage
from v05.ops.advantage.backends import first_of_trajectory

FLOAT32 = 1e-6


def assert_statistics(stats, expected, tolerance):
    """Compare (G,) tensors with a list of per-group records (dicts or reference.GroupStatistics)."""
    for g, record in enumerate(expected):
        record = record if isinstance(record, dict) else vars(record)
        for name, value in record.items():
            seen = getattr(stats, name)
            if value is None:
                assert seen is None, name
            else:
                assert seen[g].item() == pytest.approx(value, rel=tolerance, abs=tolerance, nan_ok=True), (g, name)


@pytest.mark.parametrize("case", golden_parameters())
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
def test_golden(case, dtype):
    tolerance = FLOAT32 if dtype == torch.float32 else 1e-12
    rewards = torch.tensor(case["rewards"], dtype=dtype)
    out = fused_advantage(
        rewards,
        case["prior"],
        group_ids=case["group_ids"],
        num_groups=len(case["expect"]["stats"]),
        dtype=dtype,
        **golden_options(case),
    )
    expected, statistics = case["expect"]["advantages"], case["expect"]["stats"]
    if case["id"] == "near-equal rewards at a large offset":  # float32 rounds these rewards, so the reference gets the rounded ones
        expected, statistics = reference.advantages(
            rewards.double().numpy(), case["group_ids"], case["prior"], **golden_options(case)
        )
    np.testing.assert_allclose(out.advantages.numpy(), expected, rtol=tolerance, atol=tolerance)
    assert_statistics(out.stats, statistics, tolerance)


CALIBRATIONS = st.builds(Calibration, st.floats(-2, 2), st.floats(-1, 2), st.floats(0.05, 200), st.floats(0.001, 0.999))


@st.composite
def batches(draw):
    n = draw(st.integers(1, 40))
    groups = draw(st.integers(1, 8))
    low, high = draw(st.sampled_from([(0.0, 1.0), (-1.0, 1.0), (-3.0, 5.0)]))
    unit = st.one_of(st.sampled_from([0.0, 1.0]), st.floats(0, 1, width=32))
    rewards = low + (high - low) * draw(hnp.arrays(np.float64, n, elements=unit))
    prior = low + (high - low) * draw(hnp.arrays(np.float64, groups, elements=unit))
    prior[draw(hnp.arrays(np.bool_, groups))] = math.nan
    return {
        "rewards": np.clip(rewards, low, high),
        "group_ids": draw(hnp.arrays(np.int64, n, elements=st.integers(0, groups - 1))),
        "prior": np.clip(prior, low, high),
        "valid": draw(hnp.arrays(np.bool_, n)),
        "energy": draw(hnp.arrays(np.float64, n, elements=st.sampled_from([0.0, 1.0]) | st.floats(0.0625, 100, width=32))),
        "num_groups": groups,
        "method": draw(st.sampled_from(sorted(METHODS))),
        "scale": draw(st.sampled_from([None, "none", "group", "batch"])),
        "leave_one_out": draw(st.booleans()),
        "singleton": draw(st.sampled_from(["zero", "raw"])),
        "reward_range": (low, high),
        "calibration": draw(st.none() | CALIBRATIONS),
        "max_rollouts": draw(st.integers(1, 32)),
        "cost": draw(st.sampled_from([0.00123, 0.0101010203, 0.1234567])),  # for few rollouts no gain equals one of these
    }


@settings(max_examples=400, deadline=None)
@given(batches())
def test_equals_the_reference(batch):
    batch = dict(batch)
    rewards, ids, prior = batch.pop("rewards"), batch.pop("group_ids"), batch.pop("prior")
    expected, statistics = reference.advantages(rewards, ids, prior, **batch)
    out = fused_advantage(rewards, prior, group_ids=ids, dtype=torch.float64, **batch)
    np.testing.assert_allclose(out.advantages.numpy(), expected, rtol=1e-9, atol=1e-9)
    assert_statistics(out.stats, statistics, 1e-9)


@pytest.fixture
def ragged():
    """Rewards, numeric ids in any order, prior and response lengths of four uneven groups."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.tensor([2, 0, 1, 2, 2, 0, 3, 1, 2, 0])
    rewards = torch.randint(2, (len(ids),), generator=generator).float()
    lengths = torch.tensor([3, 1, 0, 5, 2, 4, 1, 0, 5, 2])
    return rewards, ids, torch.tensor([0.2, 0.5, 0.9, 0.4]), lengths


MASK_DTYPES = [
    torch.bool,
    torch.uint8,
    torch.int8,
    torch.int32,
    torch.int64,
    torch.float16,
    torch.float32,
    torch.float64,
]


@pytest.mark.parametrize("mask_dtype", MASK_DTYPES, ids=str)
@pytest.mark.parametrize("contiguous", [True, False])
def test_padded(ragged, mask_dtype, contiguous):
    rewards, ids, prior, lengths = ragged
    mask = (torch.arange(5) < lengths[:, None]).to(mask_dtype)
    if not contiguous:
        mask = mask.T.contiguous().T
    flat = fused_advantage(rewards, prior, group_ids=ids, num_groups=4).advantages
    buffer = torch.full((10, 5), math.nan)
    out = fused_advantage(rewards, prior, group_ids=ids, num_groups=4, response_mask=mask, out=buffer)
    assert out.advantages.data_ptr() == buffer.data_ptr()
    torch.testing.assert_close(buffer, flat[:, None] * (mask != 0), rtol=0, atol=0)


def test_packed(ragged):
    rewards, ids, prior, lengths = ragged
    cu_seqlens = torch.cat((torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)))
    flat = fused_advantage(rewards, prior, group_ids=ids, num_groups=4).advantages
    buffer = torch.full((int(lengths.sum()),), math.nan)
    fused_advantage(rewards, prior, group_ids=ids, num_groups=4, cu_seqlens=cu_seqlens, out=buffer)
    torch.testing.assert_close(buffer, flat.repeat_interleave(lengths), rtol=0, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("start", [0, 1, 7, 15])
def test_packed_rows_of_any_length_and_place(dtype, start):
    """The first cache line of a row and the rest of the row are filled separately. Neither may write outside the row."""
    lengths = torch.tensor([0, 1, 15, 16, 17, 63, 64, 0, 65, 200, 3, 130])
    total = int(lengths.sum())
    cu_seqlens = torch.cat((torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)))
    rewards = torch.arange(12.0) / 16
    buffer = torch.full((start + total + 20,), math.nan, dtype=dtype)
    options = dict(group_offsets=[0, 4, 12], method="dr_grpo", dtype=dtype)
    fused_advantage(rewards, cu_seqlens=cu_seqlens, out=buffer[start : start + total], **options)
    flat = fused_advantage(rewards, **options).advantages
    assert torch.equal(buffer[start : start + total], flat.repeat_interleave(lengths))
    assert buffer[:start].isnan().all()
    assert buffer[start + total :].isnan().all()


@pytest.mark.parametrize("num_groups", [2**31, 2**40, 2**59, 2**70])
def test_more_groups_than_memory(num_groups):
    for stats in (True, False):
        with pytest.raises(ValueError, match=f"num_groups={num_groups}; give an integer from 0 to 2147483647"):
            fused_advantage(torch.rand(4), group_ids=[0, 1, 2, 3], num_groups=num_groups, method="dr_grpo", stats=stats)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64], ids=str)
def test_output_dtype(ragged, dtype):
    rewards, ids, prior, lengths = ragged
    mask = torch.arange(5) < lengths[:, None]
    exact = fused_advantage(rewards, prior, group_ids=ids, num_groups=4, response_mask=mask, dtype=torch.float32)
    out = fused_advantage(rewards, prior, group_ids=ids, num_groups=4, response_mask=mask, dtype=dtype)
    assert out.advantages.dtype == dtype
    torch.testing.assert_close(out.advantages, exact.advantages.to(dtype), rtol=1e-6, atol=0)


def test_group_forms_agree(ragged):
    rewards, ids, prior, _ = ragged
    order = torch.argsort(ids, stable=True)
    offsets = torch.tensor([0, 3, 5, 9, 10])
    by_id = fused_advantage(rewards, prior, group_ids=ids, num_groups=4)
    by_offset = fused_advantage(rewards[order], prior, group_offsets=offsets)
    torch.testing.assert_close(by_offset.advantages, by_id.advantages[order])
    # Without num_groups, groups are in order of first appearance: 2, 0, 1, 3.
    appearance = torch.tensor([2, 0, 1, 3])
    names = [f"prompt-{i}" for i in ids.tolist()]
    dense, groups = factorize(names)
    by_index = fused_advantage(rewards, prior[appearance], group_ids=dense, num_groups=groups)
    assert torch.equal(by_index.advantages, by_id.advantages)
    assert factorize(ids * 1000 - 7)[0].tolist() == dense.tolist()
    for form in (
        ids * 1000 - 7,
        names,
        np.array(names, dtype=object),
        np.array(names),
        tuple(names),
        ids.to(torch.int32),
    ):
        out = fused_advantage(rewards, prior[appearance], group_ids=form)
        torch.testing.assert_close(out.advantages, by_id.advantages)
        torch.testing.assert_close(out.stats.mean, by_id.stats.mean[appearance])


@pytest.mark.parametrize("dtype", [torch.bool, torch.int64, torch.uint8, torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_reward_dtypes(ragged, dtype):
    rewards, ids, prior, _ = ragged
    expected = fused_advantage(rewards, prior, group_ids=ids, num_groups=4).advantages
    torch.testing.assert_close(fused_advantage(rewards.to(dtype), prior, group_ids=ids, num_groups=4).advantages, expected)


def test_rewards_that_require_grad_are_detached(ragged):
    rewards, ids, prior, _ = ragged
    assert not fused_advantage(rewards.requires_grad_(), prior, group_ids=ids, num_groups=4).advantages.requires_grad


def test_strided_rewards():
    wide = torch.tensor([[1.0, 9.0], [0.0, 9.0], [0.0, 9.0]])
    out = fused_advantage(wide[:, 0], group_offsets=[0, 3], method="dr_grpo")
    torch.testing.assert_close(out.advantages, torch.tensor([2 / 3, -1 / 3, -1 / 3]))


@pytest.mark.parametrize("mask_dtype", [torch.bool, torch.int64, torch.float32], ids=str)
def test_token_rewards_are_summed_over_the_mask(mask_dtype):
    tokens = torch.tensor([[0.0, 1.0, math.nan], [0.25, 0.25, 9.0], [math.inf, math.inf, math.inf]])
    mask = torch.tensor([[1, 1, 0], [1, 1, 0], [0, 0, 0]]).to(mask_dtype)
    out = fused_advantage(tokens, group_offsets=[0, 3], response_mask=mask, method="dr_grpo")
    expected = torch.tensor([0.5, 0.0, -0.5])[:, None] * (mask != 0)
    torch.testing.assert_close(out.advantages, expected)


def test_ids_are_told_apart_to_the_last_character():
    out = fused_advantage([1.0, 0.0, 1.0], group_ids=["a", "a\0", "a"], method="dr_grpo")
    assert out.stats.count.tolist() == [2, 1]


def test_arrays_that_torch_cannot_wrap():
    rewards = np.array([1.0, 0.0, 0.0, 1.0])
    expected = fused_advantage(rewards, group_offsets=[0, 4], method="dr_grpo").advantages
    frozen = rewards.copy()
    frozen.flags.writeable = False
    for form in (frozen, rewards[::-1], rewards.astype(">f8")):
        assert torch.equal(fused_advantage(form, group_offsets=[0, 4], method="dr_grpo").advantages, expected)


def test_a_mask_that_requires_grad_is_detached(ragged):
    rewards, ids, prior, lengths = ragged
    mask = (torch.arange(5) < lengths[:, None]).float().requires_grad_()
    assert not fused_advantage(rewards, prior, group_ids=ids, num_groups=4, response_mask=mask).advantages.requires_grad


def test_valid_rows_only():
    out = fused_advantage([1.0, 0.0, math.nan, 1.0], group_ids=[0, 0, 0, 0], valid=[True, True, False, False], method="dr_grpo")
    assert out.advantages.tolist() == [0.5, -0.5, 0.0, 0.0]
    assert out.stats.count.tolist() == [2]
    assert out.stats.nonfinite.sum() == 0


def test_group_without_a_valid_rollout():
    out = fused_advantage([1.0, 0.0], [0.3, 0.8], group_ids=[0, 0], num_groups=2, valid=[False, False])
    assert out.stats.count.tolist() == [0, 0]
    assert out.stats.mean.isnan().all()
    assert out.stats.baseline.tolist() == pytest.approx([0.3, 0.8])
    assert out.advantages.tolist() == [0.0, 0.0]
    assert out.stats.take_more.tolist() == [False, False]


def test_nonfinite_rewards():
    rewards = [1.0, math.nan, 0.0, math.inf]
    with pytest.raises(ValueError, match=r"rewards: not finite in rows 1 \(nan\), 3 \(inf\).*nonfinite='exclude'"):
        fused_advantage(rewards, group_offsets=[0, 4], method="grpo")
    out = fused_advantage(rewards, group_offsets=[0, 4], method="dr_grpo", nonfinite="exclude")
    assert out.advantages.tolist() == [0.5, 0.0, -0.5, 0.0]
    assert out.stats.nonfinite.tolist() == [2]


@pytest.mark.parametrize("valid", [None, [True, True, True, True, False]])
def test_nonfinite_rewards_are_counted_by_group(valid):
    rewards = [math.nan, 1.0, math.inf, 0.0, math.nan]
    options = dict(method="dr_grpo", nonfinite="exclude", valid=valid)
    last = 1 if valid is None else 0
    by_id = fused_advantage(rewards, group_ids=[2, 0, 2, 1, 0], num_groups=4, **options).stats
    assert by_id.nonfinite.tolist() == [last, 0, 2, 0]
    by_offset = fused_advantage(rewards, group_offsets=[0, 2, 2, 5], **options).stats
    assert by_offset.nonfinite.tolist() == [1, 0, 1 + last]
    assert by_offset.count.tolist() == [1, 0, 1]


def test_a_trajectory_counts_once():
    rewards, trajectories = [1.0, 1.0, 1.0, 0.0], [7, 7, 7, 9]
    out = fused_advantage(rewards, group_offsets=[0, 4], trajectory_ids=trajectories, method="rloo")
    assert out.stats.count.tolist() == [2]
    assert out.stats.mean.tolist() == [0.5]
    assert out.advantages.tolist() == [1.0, 1.0, 1.0, -1.0]
    with pytest.raises(ValueError, match="trajectory_ids: rows 0 and 3 are one trajectory"):
        fused_advantage(rewards, group_offsets=[0, 4], trajectory_ids=[7, 7, 7, 7], method="rloo")


@settings(max_examples=100, deadline=None)
@given(st.data())
def test_device_grouping_equals_the_core(data):
    n, groups = data.draw(st.integers(0, 30)), data.draw(st.integers(1, 6))
    ids = torch.from_numpy(data.draw(hnp.arrays(np.int64, n, elements=st.integers(0, groups - 1))))
    trajectories = torch.from_numpy(data.draw(hnp.arrays(np.int64, n, elements=st.integers(0, 4))))
    valid = torch.from_numpy(data.draw(hnp.arrays(np.bool_, n)))
    offsets, order, _ = by_sorting(ids, None, groups)
    assert offsets.tolist() == [0, *np.cumsum(np.bincount(ids.numpy(), minlength=groups))]
    assert order.tolist() == sorted(range(n), key=lambda i: ids[i])
    host = _core.order_rows(ids.numpy(), groups, groups + 3)
    assert host[: groups + 1].tolist() == offsets.tolist()
    assert host[groups + 3 :].tolist() == order.tolist()
    first = {}
    for i in range(n):
        if valid[i]:
            first.setdefault((ids[i].item(), trajectories[i].item()), i)
    seen = first_of_trajectory(trajectories, offsets, order, valid)
    assert set(torch.nonzero(seen).flatten().tolist()) == set(first.values())


def test_bounds_forgive_float32_rounding():
    rewards = torch.tensor([0.3, 0.0])
    assert rewards[0].double() > 0.3
    out = fused_advantage(rewards, [0.1], group_offsets=[0, 2], reward_range=(0.0, 0.3))
    assert out.stats.mean.item() == pytest.approx(0.15)


@pytest.mark.parametrize("scale", ["group", "batch"])
def test_large_rewards_do_not_explode(scale):
    rewards = torch.tensor([1e150, -1e150, 1e150, 0.0], dtype=torch.float64)
    for size in (1.0, 1e4, 1e10):  # for size 1 a sum of many more squares would overflow
        out = fused_advantage(rewards.repeat(3) / size, group_offsets=[0, 12], method="grpo", scale=scale, dtype=torch.float64)
        assert out.advantages.abs().max() < 2
        assert (out.advantages[:4] * rewards >= 0).all()


def test_a_parameter_is_a_tensor_like_any_other():
    rewards = torch.nn.Parameter(torch.tensor([1.0, 0.0]))
    assert fused_advantage(rewards, group_ids=["a", "a"], method="grpo", scale="none").advantages.tolist() == [0.5, -0.5]


def test_singletons():
    for method in ("grpo", "rloo", "dr_grpo"):
        assert fused_advantage([0.7], group_offsets=[0, 1], method=method).advantages.item() == 0.0
        raw = fused_advantage([0.7], group_offsets=[0, 1], method=method, singleton="raw")
        assert raw.advantages.item() == pytest.approx(0.7)
    alone = fused_advantage([1.0], [0.25], group_offsets=[0, 1], method="v05", leave_one_out=True)
    assert alone.advantages.item() == 0.75  # without other rollouts, the baseline is the prior


def test_calibrated_has_a_baseline_for_every_rollout():
    fused = dict(group_offsets=[0, 1, 2, 2], leave_one_out=True, method="calibrated", dtype=torch.float64)
    calibration = Calibration(0.0, 1.0, 4.0, 0.2)
    out = fused_advantage([1.0, 1.0], [0.25, math.nan, 0.25], calibration=calibration, **fused)
    calibrated_prior = 0.8 * 0.25 + 0.2 * 0.5  # the baseline of a lone rollout, and the statistic of an empty group
    assert out.advantages.tolist() == pytest.approx([1 - calibrated_prior, 0.5])  # without a prior: the vague prior, with mean 1/2
    assert out.stats.baseline[2].item() == pytest.approx(calibrated_prior)
    assert out.stats.hallucination.tolist() == pytest.approx([0.2 * 0.5 / (0.2 * 0.5 + 0.8 * 0.25), 1.0, 0.2])
    assert out.stats.take_more.all()
    assert out.stats.weight is out.stats.p_value is None
    by_default = fused_advantage([1.0, 1.0], [0.25, math.nan, 0.25], **fused)
    explicit = fused_advantage([1.0, 1.0], [0.25, math.nan, 0.25], calibration=Calibration(), **fused)
    assert torch.equal(by_default.advantages, explicit.advantages)


@pytest.mark.parametrize(("low", "high"), [(0.0, 1.0), (-3.0, 5.0), (0.1, 0.7), (1000.0, 1001.0), (-0.3, 0.0)])
def test_calibrated_sums_are_whole_where_rewards_are_binary(low, high):
    """The prior is certain, so that a rounding error of 1e-16 of a success would count as evidence."""
    rng = np.random.default_rng(0)
    sizes = np.repeat([3, 7, 49, 1024], 4)
    wins = [rng.permutation(size) < count for size, count in zip(sizes, [0, 1, 2, 3] * 4, strict=True)]
    rewards = np.where(np.concatenate(wins), high, low)
    fused = dict(group_offsets=[0, *np.cumsum(sizes)], method="calibrated", dtype=torch.float64)
    fused |= dict(calibration=Calibration(-100.0, 1.0, 1e-3, 1e-9))
    for leave_one_out in (False, True):
        out = fused_advantage(
            rewards, np.full(16, (low + high) / 2), reward_range=(low, high), leave_one_out=leave_one_out, **fused
        )
        unit = fused_advantage(np.concatenate(wins), np.full(16, 0.5), leave_one_out=leave_one_out, **fused)
        scale = high - low
        torch.testing.assert_close(out.advantages, scale * unit.advantages, rtol=1e-9, atol=1e-15 * max(abs(low), abs(high)))
        torch.testing.assert_close(out.stats.hallucination, unit.stats.hallucination, rtol=1e-9, atol=0)


@pytest.mark.parametrize(("low", "high"), [(0.0, 1.0), (-3.0, 5.0)])
def test_calibrated_leaves_out_rewards_of_any_kind(low, high):
    """Groups with binary rewards, fractional rewards, and both, with whole and with fractional sums, small and large."""
    rng = np.random.default_rng(0)
    half, third = np.tile([0.0, 0.5, 0.5, 1.0], 5), rng.random(20)
    groups = [source[:size] for size in (1, 2, 3, 4, 16, 17, 18, 20) for source in (half, third, np.round(third), third**9)]
    rewards = low + (high - low) * np.concatenate(groups)
    sizes = [len(group) for group in groups]
    prior = low + (high - low) * rng.random(len(groups))
    prior[::7] = math.nan
    options = dict(method="calibrated", leave_one_out=True, reward_range=(low, high), calibration=Calibration(0.3, 0.8, 6.0, 0.2))
    out = fused_advantage(rewards, prior, group_offsets=[0, *np.cumsum(sizes)], dtype=torch.float64, **options)
    expected = reference.advantages(rewards, np.repeat(np.arange(len(groups)), sizes), prior, **options)[0]
    np.testing.assert_allclose(out.advantages.numpy(), expected, rtol=0, atol=(2 + 20 / 7) * 1e-12 * (high - low))


@pytest.mark.parametrize("scale", ["group", "batch"])
def test_equal_rewards_do_not_explode(scale):
    out = fused_advantage([1.0] * 4, [0.75], group_offsets=[0, 4], method="v05", scale=scale)
    assert out.advantages.tolist() == [0.25] * 4
    success = fused_advantage([1.0, 0.0, 0.0, 0.0], group_offsets=[0, 4], method="rloo", scale=scale)
    assert success.advantages.abs().max() < 3


def test_large_offset_keeps_its_digits():
    rewards = torch.tensor([10000.0, 10000.001, 10000.002, 10000.003], dtype=torch.float64)
    out = fused_advantage(rewards, group_offsets=[0, 4], method="grpo", eps=0.0, dtype=torch.float64)
    assert out.stats.var.item() == pytest.approx(1e-6 * 5 / 3, rel=1e-8)


def test_empty_batch():
    for mask in (None, torch.zeros(0, 5, dtype=torch.bool)):
        out = fused_advantage(torch.zeros(0), torch.zeros(0), group_offsets=[0], response_mask=mask)
        assert out.advantages.shape == ((0,) if mask is None else (0, 5))
        assert out.stats.count.shape == (0,)
    assert fused_advantage(torch.zeros(0), torch.zeros(0), group_ids=[]).advantages.shape == (0,)


def test_statistics_are_optional():
    assert fused_advantage([1.0, 0.0], group_offsets=[0, 2], method="grpo", stats=False).stats is None


R4 = [1.0, 0.0, 0.0, 1.0]
SHARED = torch.tensor(R4)
SHARED_ARRAY = np.zeros(4)
BAD_INPUT = {
    "neither group form": ({}, "group_ids and group_offsets: neither given"),
    "both group forms": (dict(group_ids=[0] * 4, group_offsets=[0, 4]), "group_ids and group_offsets: both given"),
    "unknown method": (dict(group_offsets=[0, 4], method="ppo"), "method='ppo' is unknown; choose one of v05, grpo"),
    "unknown scale": (dict(group_offsets=[0, 4], scale="std"), "scale='std' is unknown; choose one of none, group, batch"),
    "unknown singleton": (dict(group_offsets=[0, 4], singleton="x"), "singleton='x' is unknown"),
    "unknown nonfinite": (dict(group_offsets=[0, 4], nonfinite="x"), "nonfinite='x' is unknown"),
    "unknown backend": (dict(group_offsets=[0, 4], backend="x"), "backend='x' is unknown; choose one of cpp, triton"),
    "no prior": (dict(group_offsets=[0, 4], method="v05"), "prior: needed by method='v05'"),
    "wrong prior shape": (dict(group_offsets=[0, 4], prior=[0.1, 0.2]), r"prior: shape \(2,\) for 1 groups"),
    "prior outside": (
        dict(group_offsets=[0, 4], prior=[1.5], method="v05"),
        r"prior: outside reward_range=\(0, 1\) in groups 0 \(1.5\)",
    ),
    "infinite prior": (dict(group_offsets=[0, 4], prior=[math.inf], method="prior"), "prior: outside reward_range"),
    "rewards outside": (
        dict(group_offsets=[0, 4], prior=[0.5], method="v05", reward_range=(0.0, 0.5)),
        r"rewards: outside reward_range=\(0, 0.5\) in rows 0 \(1\), 3 \(1\)",
    ),
    "empty range": (dict(group_offsets=[0, 4], reward_range=(1.0, 0.0)), "reward_range=.* is not a finite range"),
    "infinite range": (dict(group_offsets=[0, 4], reward_range=(-math.inf, math.inf)), "reward_range=.* is not a finite range"),
    "three bounds": (dict(group_offsets=[0, 4], reward_range=(0, 1, 2)), r"reward_range=\(0, 1, 2\); give \(lo, hi\)"),
    "one string": (dict(group_ids="abcd"), "group_ids='abcd' is one string"),
    "mixed ids": (dict(group_ids=["1", 1, "1", 1]), "group_ids: mix strings and other types"),
    "negative num_groups": (dict(group_ids=[0] * 4, num_groups=-5), "num_groups=-5; give an integer"),
    "float num_groups": (dict(group_ids=[0] * 4, num_groups=3.0), "num_groups=3.0; give an integer"),
    "float trajectories": (dict(group_ids=[0] * 4, trajectory_ids=[0.2, 0.7, 1.5, 2.0]), "trajectory_ids: dtype .* give integers"),
    "float valid": (dict(group_ids=[0] * 4, valid=[1.0, math.nan, 0.0, 1.0]), "valid: dtype .* give bool"),
    "rewards of strings": (dict(group_ids=[0] * 4, rewards=["a", "b", "c", "d"]), "rewards: dtype <U1; give numbers"),
    "ragged rewards": (dict(group_ids=[0] * 4, rewards=[[1.0], [1.0, 2.0]]), "rewards: .* give a tensor or a rectangular"),
    "prior of None": (dict(group_ids=[0] * 4, prior=[None]), "prior: dtype object; give numbers"),
    "dtype by name": (dict(group_ids=[0] * 4, dtype="float32"), "dtype=float32 cannot hold advantages"),
    "offsets end early": (dict(group_offsets=[0, 3]), "group_offsets: ends at 3 for 4 rollouts"),
    "offsets start late": (dict(group_offsets=[1, 4]), "group_offsets: starts at 1"),
    "offsets fall": (dict(group_offsets=[0, 3, 2, 4]), "group_offsets: falls after position 1"),
    "float offsets": (dict(group_offsets=[0.0, 4.0]), "group_offsets: .* give integers"),
    "too few ids": (dict(group_ids=[0, 0, 0]), r"group_ids: shape \(3,\) for 4 rollouts"),
    "float ids": (dict(group_ids=[0.0] * 4), "group_ids: dtype .* give integers or strings"),
    "ids beyond num_groups": (
        dict(group_ids=[0, 0, 5, -1], num_groups=2),
        r"group_ids: outside \[0, num_groups=2\) in rows 2 \(5\), 3 \(-1\)",
    ),
    "num_groups against offsets": (dict(group_offsets=[0, 4], num_groups=2), "num_groups=2 contradicts group_offsets"),
    "num_groups against strings": (dict(group_ids=list("aabb"), num_groups=3), "num_groups=3, but group_ids holds 2"),
    "mask and packing": (
        dict(group_offsets=[0, 4], response_mask=torch.ones(4, 2), cu_seqlens=[0, 1, 2, 3, 4]),
        "response_mask and cu_seqlens: both given",
    ),
    "mask rows": (dict(group_offsets=[0, 4], response_mask=torch.ones(3, 2)), r"response_mask: shape \(3, 2\) for 4 rollouts"),
    "cu_seqlens length": (dict(group_offsets=[0, 4], cu_seqlens=[0, 1, 2]), "cu_seqlens: 3 offsets for 4 rollouts"),
    "cu_seqlens fall": (dict(group_offsets=[0, 4], cu_seqlens=[0, 2, 1, 3, 4]), "cu_seqlens: falls after position 1"),
    "cu_seqlens below zero": (dict(group_offsets=[0, 4], cu_seqlens=[0, 1, 2, 3, -1]), "cu_seqlens: falls after position 3"),
    "valid length": (dict(group_offsets=[0, 4], valid=[True]), r"valid: shape \(1,\) for 4 rollouts"),
    "out shape": (dict(group_offsets=[0, 4], out=torch.empty(3)), r"out: shape \(3,\).*give a contiguous \(4,\) tensor"),
    "out dtype": (dict(group_offsets=[0, 4], out=torch.empty(4, dtype=torch.float64)), "out: .*torch.float32"),
    "out with a gradient": (dict(group_offsets=[0, 4], out=torch.empty(4, requires_grad=True)), "out: requires a gradient"),
    "out is a negative": (dict(group_offsets=[0, 4], out=torch._neg_view(torch.empty(4))), "out: .* the negative of its memory"),
    "num_groups is no number": (dict(group_ids=[0, 0, 0, 0], num_groups=True), "num_groups=True; give an integer"),
    "out is rewards": (dict(group_offsets=[0, 4], rewards=SHARED, out=SHARED), "out: shares memory with rewards"),
    "out is prior": (
        dict(prior=SHARED_ARRAY, group_offsets=[0, 1, 2, 3, 4], dtype=torch.float64, out=torch.from_numpy(SHARED_ARRAY)),
        "out: shares memory with prior",
    ),
    "out is a part of prior": (
        dict(
            rewards=[0.0, 1.0],
            prior=SHARED_ARRAY[:2],
            group_offsets=[0, 1, 2],
            out=torch.from_numpy(SHARED_ARRAY[1:2]).view(torch.float32),
        ),
        "out: shares memory with prior",
    ),
    "out is mask": (
        dict(group_offsets=[0, 4], response_mask=SHARED[:, None], out=SHARED[:, None]),
        "out: shares memory with response_mask",
    ),
    "integer dtype": (dict(group_offsets=[0, 4], dtype=torch.int64), "dtype=torch.int64 cannot hold advantages"),
    "calibration": (
        dict(group_offsets=[0, 4], calibration=(0, 1, 4, 0.1)),
        r"calibration=\(0, 1, 4, 0.1\) is no v05.ops.Calibration",
    ),
    "max_rollouts": (dict(group_offsets=[0, 4], max_rollouts=0), "max_rollouts=0"),
    "cost": (dict(group_offsets=[0, 4], cost=math.nan), "cost=nan; give 0 or more"),
    "an option is a tensor": (dict(group_offsets=[0, 4], eps=torch.tensor(1e-6)), "eps: a tensor, .* give a Python number"),
    "eps": (dict(group_offsets=[0, 4], eps=math.inf), "eps=inf; give 0 or more"),
    "too large": (dict(group_offsets=[0, 4], rewards=[0.0, 0.0, 0.0, -2e150]), r"rewards: beyond 1e150 in rows 3 \(-2e\+150\)"),
    "a hair outside": (
        dict(group_offsets=[0, 4], rewards=[0.0, 0.0, 0.0, 1.000001], method="v05", prior=[0.5]),
        r"rewards: outside reward_range=\(0, 1\) in rows 3 \(1.000001\)",
    ),
    "two rewards": (
        dict(group_offsets=[0, 4], rewards=[0.0, 0.0, 1.0, 1.0000001], trajectory_ids=[0, 1, 2, 2]),
        r"are one trajectory \(2\) with two rewards \(1, 1.0000001\)",
    ),
}


@pytest.mark.parametrize(("arguments", "message"), BAD_INPUT.values(), ids=BAD_INPUT.keys())
def test_errors_name_the_argument_and_the_remedy(arguments, message):
    arguments = {"method": "grpo", **arguments}
    with pytest.raises(ValueError, match=message):
        fused_advantage(arguments.pop("rewards", R4), arguments.pop("prior", None), **arguments)


def test_out_may_lie_beside_what_is_read():
    memory = torch.tensor([1.0, 0.0, 1.0, 0.0, 9.0, 9.0, 9.0, 9.0])
    out = fused_advantage(memory[:4], group_offsets=[0, 4], method="dr_grpo", out=memory[4:])
    assert memory.tolist() == [1.0, 0.0, 1.0, 0.0, 0.5, -0.5, 0.5, -0.5]
    assert out.advantages.data_ptr() == memory[4:].data_ptr()


def test_views_that_stand_for_the_negative_of_their_memory():
    rewards = torch._neg_view(torch.tensor([0.0, -1.0, 0.0, -1.0]))
    out = fused_advantage(rewards, torch._neg_view(-torch.tensor([0.75])), group_offsets=[0, 4], method="prior")
    assert out.advantages.tolist() == [-0.75, 0.25, -0.75, 0.25]


@pytest.mark.parametrize("tokens", [False, True], ids=["outcomes", "token rewards"])
def test_a_refused_call_writes_nothing(tokens):
    rewards, mask, out = torch.tensor([1.0, 0.0, math.nan]), torch.ones(3, 4, dtype=torch.bool), torch.full((3, 4), 7.0)
    rewards = rewards[:, None].expand(3, 4) / 4 if tokens else rewards
    with pytest.raises(ValueError, match="rewards: not finite in rows 2"):
        fused_advantage(rewards, group_offsets=[0, 3], response_mask=mask, method="grpo", out=out)
    assert (out == 7.0).all()


def test_token_rewards_need_their_mask():
    with pytest.raises(ValueError, match=r"rewards: token rewards of shape \(2, 3\) need response_mask"):
        fused_advantage(torch.zeros(2, 3), group_offsets=[0, 2], method="grpo")
    with pytest.raises(ValueError, match=r"rewards: shape \(1, 1, 1\)"):
        fused_advantage(torch.zeros(1, 1, 1), group_offsets=[0, 1], method="grpo")
