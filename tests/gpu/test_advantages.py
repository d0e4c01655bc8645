"""The cases of tests/kernels on the device: every layout, dtype, method and kind of ids, against `v05.reference` in float64."""

import math
import os
import uuid

import numpy as np
import pytest
import torch
from kernels.test_advantage_kernel import IDS, PRIOR, REWARDS, assert_advantages, assert_stats, expect, tokens_of
from kernels.test_advantage_kernel import N as ROLLOUTS

from helpers import golden_cases
from v05.kernels.grouping import launch as grouping
from v05.methods import METHODS
from v05.ops import fused_advantage
from v05.ops.advantage.options import SCALES

pytestmark = pytest.mark.gpu
ON_GPU = os.environ.get("V05_GPU") == "1"
SIZES = (1, 0, 2, 7, 16, 40, 1000) if ON_GPU else (1, 0, 2, 7, 19)
TOKENS = (1, 13, 16, 70, 2049, 4100) if ON_GPU else (1, 40)
MASKS = (torch.bool, torch.uint8, torch.int64, torch.float32) if ON_GPU else (torch.bool, torch.int64)


def of_the_gpu(*values):
    """Parameters for the GPU alone: the interpreter is too slow for them, or has tests of them elsewhere."""
    return values if ON_GPU else ()


def uneven(seed):
    """(rewards, prior, ids, energy) of groups of SIZES in shuffled rows; one prior is missing."""
    draw = torch.Generator().manual_seed(seed)
    ids = torch.arange(len(SIZES)).repeat_interleave(torch.tensor(SIZES))
    ids = ids[torch.randperm(len(ids), generator=draw)]
    rewards = torch.tensor([0.0, 0.25, 1.0])[torch.randint(0, 3, (len(ids),), generator=draw)]
    prior = torch.rand(len(SIZES), generator=draw, dtype=torch.float64)
    prior[3] = math.nan
    return rewards, prior, ids, torch.rand(len(ids), generator=draw)


def mask_of(n, T, dtype, seed=0):
    return (torch.rand(n, T, generator=torch.Generator().manual_seed(seed)) < 0.6).to(dtype)


def misaligned(tensor, device, by=1):
    """The values on the device, contiguous, but starting `by` elements after the start of an allocation."""
    place = torch.empty(tensor.numel() + by, dtype=tensor.dtype, device=device)
    view = place[by:].view(tensor.shape)
    view.copy_(tensor)
    assert view.is_contiguous()
    assert view.data_ptr() % 16
    return view


@pytest.mark.parametrize("leave_one_out", [False, *of_the_gpu(True)], ids=lambda yes: "leave-one-out" if yes else "full")
@pytest.mark.parametrize("method", METHODS)
def test_methods_on_uneven_groups(method, leave_one_out, call):
    rewards, prior, ids, energy = uneven(1)
    spread = {"response_mask": mask_of(len(ids), 21, torch.bool)} if ON_GPU else {}
    options = {"method": method, "leave_one_out": leave_one_out, "energy": energy, "num_groups": len(SIZES)}
    out = call(rewards, prior, group_ids=ids, **options, **spread)
    wanted, stats = expect(rewards, prior, ids, **options | {"energy": energy.numpy()})
    rows = torch.from_numpy(wanted)
    assert_advantages(out.advantages, tokens_of(rows, spread["response_mask"]) if spread else rows, rtol=2e-6)
    assert_stats(out.stats, stats)


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("method", ["grpo", *of_the_gpu("v05", "calibrated", "optimal", "js")])
def test_scales(method, scale, call):
    options = {"method": method, "scale": scale, "leave_one_out": scale != "group"}
    out = call(REWARDS, PRIOR, group_ids=IDS, num_groups=4, **options)
    wanted, stats = expect(**options)
    assert_advantages(out.advantages, wanted)
    assert_stats(out.stats, stats)


@pytest.mark.parametrize("dtype", MASKS, ids=str)
@pytest.mark.parametrize("T", TOKENS)
def test_padded(T, dtype, call):
    mask = mask_of(ROLLOUTS, T, dtype, T)
    out = call(REWARDS, PRIOR, group_ids=IDS, num_groups=4, response_mask=mask)
    assert_advantages(out.advantages, tokens_of(torch.from_numpy(expect()[0]), mask))


@pytest.mark.parametrize("dtype", MASKS, ids=str)
@pytest.mark.parametrize("rewards_dtype", [torch.float32, *of_the_gpu(torch.float64, torch.bfloat16)], ids=str)
@pytest.mark.parametrize("T", TOKENS[1:])
def test_token_rewards(T, rewards_dtype, dtype, call):
    """Rewards at two tokens inside the mask. Tokens outside it are NaN and do not count."""
    mask = mask_of(ROLLOUTS, T, dtype, T)
    mask[:, [0, T - 1]] = torch.ones((), dtype=dtype)
    tokens = torch.where(mask == 1, 0.0, math.nan).to(rewards_dtype)
    tokens[:, 0] = tokens[:, T - 1] = (REWARDS / 2).to(rewards_dtype)
    out = call(tokens, PRIOR, group_ids=IDS, num_groups=4, response_mask=mask)
    wanted, stats = expect()
    assert_advantages(out.advantages, tokens_of(torch.from_numpy(wanted), mask))
    assert_stats(out.stats, stats)


@pytest.mark.parametrize("longest", [17, *of_the_gpu(1, 5, 3000)])
def test_packed(longest, call):
    lengths = torch.randint(0, longest + 1, (ROLLOUTS,), generator=torch.Generator().manual_seed(longest))
    cu_seqlens = torch.cat((torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)))
    out = call(REWARDS, PRIOR, group_ids=IDS, num_groups=4, cu_seqlens=cu_seqlens)
    assert_advantages(out.advantages, torch.from_numpy(expect()[0]).repeat_interleave(lengths))


@pytest.mark.parametrize("layout", ["padded", "packed", "rollouts"])
@pytest.mark.parametrize(
    ("dtype", "rtol"),
    [(torch.bfloat16, 2**-7), *of_the_gpu((torch.float16, 1e-3), (torch.float64, 1e-12))],  # the interpreter truncates to bfloat16
    ids=str,
)
def test_output_dtypes(layout, dtype, rtol, call):
    rows = torch.from_numpy(expect(REWARDS.double())[0])
    lengths = torch.arange(ROLLOUTS) + 3
    mask = torch.arange(20) < lengths[:, None]
    spread, wanted = {
        "padded": ({"response_mask": mask}, tokens_of(rows, mask)),
        "packed": ({"cu_seqlens": torch.cat((lengths[:1] * 0, lengths.cumsum(0)))}, rows.repeat_interleave(lengths)),
        "rollouts": ({}, rows),
    }[layout]
    out = call(REWARDS.double(), PRIOR, group_ids=IDS, num_groups=4, dtype=dtype, **spread)
    assert out.advantages.dtype == dtype
    assert_advantages(out.advantages, wanted, rtol=2**-8 if ON_GPU and dtype == torch.bfloat16 else rtol)


@pytest.mark.parametrize("method", ["v05", *of_the_gpu("grpo", "rloo", "calibrated", "js")])
@pytest.mark.parametrize("scale", ["batch", *of_the_gpu("none", "group")])
def test_valid_rows_and_trajectories(method, scale, call):
    """Rows of one trajectory count once. Invalid rows do not count, whatever their reward."""
    trajectories, valid, rewards = torch.arange(ROLLOUTS), torch.ones(ROLLOUTS, dtype=torch.bool), REWARDS.clone()
    trajectories[[1, 4]] = 1  # both are rows of group 0
    rewards[4] = rewards[1]
    rewards[3] = math.nan
    valid[[3, 7]] = False
    options = {"method": method, "scale": scale, "valid": valid, "trajectory_ids": trajectories}
    out = call(rewards, PRIOR, group_ids=IDS, num_groups=4, **options)
    wanted, stats = expect(rewards, **options)
    assert_advantages(out.advantages, wanted)
    assert_stats(out.stats, stats)
    assert out.stats.nonfinite.sum() == 0


def test_what_is_left_out_or_clipped_is_counted(call):
    rewards, prior = REWARDS.double(), torch.tensor([0.4, 1.2, math.nan, 0.6], dtype=torch.float64)
    rewards[[0, 1, 9]] = torch.tensor([math.nan, -7.0, math.inf], dtype=torch.float64)
    usable = rewards.isfinite()
    out = call(rewards, prior, group_ids=IDS, num_groups=4, dtype=torch.float64)
    wanted, stats = expect(rewards.clamp(0, 1), prior.clamp(0, 1), valid=usable)
    assert_advantages(out.advantages, wanted, rtol=1e-12)
    assert_stats(out.stats, stats)
    assert out.stats.nonfinite.tolist() == torch.bincount(IDS[~usable], minlength=4).tolist()
    assert out.stats.clipped.tolist() == [1, 1, 0, 0]  # the reward of row 1 and the prior of group 1


@pytest.mark.parametrize("ids", ["CPU integers", "any integers", "list", "strings", "NumPy strings", "UUIDs"])
def test_ids_on_the_host(ids, call):
    """Integers with num_groups are the groups' numbers. All other ids are numbered by first appearance, in which order the prior is
    given.
    """
    by_appearance = torch.tensor([2, 0, 1, 3])
    place = by_appearance.argsort()[IDS]
    given = {
        "CPU integers": IDS,
        "any integers": IDS * 1_000_003 - 17,
        "list": (IDS + 5).tolist(),
        "strings": [f"prompt {i}" for i in IDS.tolist()],
        "NumPy strings": np.array([f"prompt {i}" for i in IDS.tolist()], dtype=object),
        "UUIDs": [uuid.UUID(int=i) for i in IDS.tolist()],
    }[ids]
    positions = ids == "CPU integers"
    prior, wanted_ids = (PRIOR, IDS) if positions else (PRIOR[by_appearance], place)
    out = call(REWARDS, prior, group_ids=given, num_groups=4 if positions else None, on_host=("group_ids",))
    wanted, stats = expect(REWARDS, prior, wanted_ids)
    assert_advantages(out.advantages, wanted)
    assert_stats(out.stats, stats)


def test_ids_that_name_no_group_are_left_out(call):
    ids = IDS.clone()
    ids[[2, 5]] = torch.tensor([-1, 4])
    named = (ids >= 0) & (ids < 4)
    out = call(REWARDS, PRIOR, group_ids=ids, num_groups=4)
    wanted, stats = expect(REWARDS, PRIOR, torch.where(named, ids, 0), valid=named)
    assert_advantages(out.advantages, wanted)
    assert_stats(out.stats, stats)


@pytest.mark.parametrize("offsets", ["device", "host"])
def test_contiguous_groups(offsets, call):
    bounds = [0, 3, 3, 10, ROLLOUTS]
    ids = torch.tensor([0] * 3 + [2] * 7 + [3] * 5)
    given = torch.tensor(bounds) if offsets == "device" else bounds
    out = call(REWARDS, PRIOR, group_offsets=given, on_host=() if offsets == "device" else ("group_offsets",))
    wanted, stats = expect(ids=ids)
    assert_advantages(out.advantages, wanted)
    assert_stats(out.stats, stats)


@pytest.mark.parametrize("bound", ["MOST_ROWS", "MOST_GROUPS"])
def test_more_rows_or_groups_than_the_grouping_kernel_takes(bound, call, monkeypatch):
    monkeypatch.setattr(grouping, bound, 3)
    monkeypatch.setattr(grouping, "_group_rows", None)  # a call of the kernel would fail
    out = call(REWARDS, PRIOR, group_ids=IDS, num_groups=4)
    wanted, stats = expect()
    assert_advantages(out.advantages, wanted)
    assert_stats(out.stats, stats)


@pytest.mark.parametrize("T", [21, *of_the_gpu(2048, 2061)])
@pytest.mark.parametrize("dtype", [torch.bool, *of_the_gpu(torch.int64, torch.float32)], ids=str)
def test_misaligned_views(dtype, T, call, device):
    """Rewards, mask and output start at unaligned addresses. A known launch assumes aligned ones and may not take these."""
    mask = mask_of(ROLLOUTS, T, dtype, 3)
    wanted = tokens_of(torch.from_numpy(expect()[0]), mask)
    if ON_GPU:
        call(REWARDS, PRIOR, group_ids=IDS, num_groups=4, response_mask=mask)
    for part in ("rewards", "mask", "out"):
        rewards = misaligned(REWARDS, device) if part == "rewards" else REWARDS
        given_mask = misaligned(mask, device) if part == "mask" else mask
        out = torch.full((ROLLOUTS, T), math.nan)
        out = misaligned(out, device, 3) if part == "out" else out.to(device)
        seen = call(rewards, PRIOR, group_ids=IDS, num_groups=4, response_mask=given_mask, out=out)
        assert_advantages(seen.advantages, wanted)


def test_misaligned_packed_output(call, device):
    lengths = torch.arange(ROLLOUTS) * 3 % 40
    cu_seqlens = torch.cat((lengths[:1] * 0, lengths.cumsum(0)))
    out = misaligned(torch.full((int(lengths.sum()),), math.nan), device)
    seen = call(REWARDS, PRIOR, group_ids=IDS, num_groups=4, cu_seqlens=cu_seqlens, out=out)
    assert_advantages(seen.advantages, torch.from_numpy(expect()[0]).repeat_interleave(lengths))


def test_rows_of_a_larger_tensor(call, device):
    """Slices of a trainer's tensors: rewards[1:], and a mask without its first and last tokens, which is copied."""
    rewards = torch.cat((torch.full((1,), 9.0), REWARDS)).to(device)[1:]
    mask = mask_of(ROLLOUTS + 2, 31, torch.bool).to(device)[2:, 1:30]
    out = call(rewards, PRIOR, group_ids=IDS, num_groups=4, response_mask=mask, out=None)
    assert_advantages(out.advantages, tokens_of(torch.from_numpy(expect()[0]), mask.cpu()))


def test_without_statistics(call):
    mask = mask_of(ROLLOUTS, 9, torch.bool)
    out = call(REWARDS, PRIOR, group_ids=IDS, num_groups=4, response_mask=mask, stats=False)
    assert out.stats is None
    assert_advantages(out.advantages, tokens_of(torch.from_numpy(expect()[0]), mask))


@pytest.mark.parametrize("scale", SCALES)
def test_no_rollouts(scale, call):
    """A call without rollouts may not synchronise either."""
    nothing = torch.empty(0, dtype=torch.int64)
    out = call(nothing.float(), torch.tensor([0.2, 0.9]), group_ids=nothing, num_groups=2, scale=scale)
    assert out.advantages.shape == (0,)
    assert out.stats.baseline.tolist() == pytest.approx([0.2, 0.9])
    assert out.stats.count.tolist() == [0, 0]


def test_no_groups(call):
    out = call(torch.ones(3), group_ids=torch.arange(3), num_groups=0, method="grpo")
    assert out.advantages.tolist() == [0.0] * 3


@pytest.mark.parametrize("case", golden_cases.golden_parameters()[:: 1 if ON_GPU else 16])
def test_golden(case, call):
    expected = case["expect"]
    prior = None if case["prior"] is None else torch.tensor(case["prior"], dtype=torch.float64)
    options = golden_cases.golden_options(case)
    if options["energy"] is not None:
        options["energy"] = torch.tensor(options["energy"])
    groups = {"group_ids": torch.tensor(case["group_ids"]), "num_groups": len(expected["stats"])}
    out = call(torch.tensor(case["rewards"], dtype=torch.float64), prior, **groups, **options)
    assert_advantages(out.advantages, expected["advantages"])
    for name in {name for group in expected["stats"] for name in group}:
        values = [group[name] for group in expected["stats"]]
        np.testing.assert_allclose(getattr(out.stats, name), values, rtol=1e-6, atol=1e-12, err_msg=name)


@pytest.mark.parametrize("method", ["v05", "grpo", "rloo"])
def test_the_bits_of_the_cpu(method, call):
    """Sums of rewards 0 and 1 are exact in any order, so float32 advantages have the bits of the C++ core."""
    draw = torch.Generator().manual_seed(5)
    n, groups = (4096, 256) if ON_GPU else (24, 3)
    rewards = torch.randint(0, 2, (n,), generator=draw).float()
    prior = torch.rand(groups, generator=draw, dtype=torch.float64)
    given = {"group_ids": torch.arange(n) % groups, "num_groups": groups, "method": method}
    on_cpu = fused_advantage(rewards, prior, **given)
    out = call(rewards, prior, **given)
    assert torch.equal(out.advantages, on_cpu.advantages)
    assert torch.equal(out.stats.count, on_cpu.stats.count)


@pytest.mark.parametrize("method", ["v05", "grpo", "calibrated"])
def test_many_rollouts(method, call, cuda):
    """More rollouts and groups than the grouping kernel takes, and more groups than programs, against the C++ core."""
    draw = torch.Generator().manual_seed(6)
    n, groups = 100_003, 20_011
    rewards, prior = torch.rand(n, generator=draw), torch.rand(groups, generator=draw, dtype=torch.float64)
    given = {"group_ids": torch.randint(0, groups, (n,), generator=draw), "num_groups": groups, "method": method}
    out, on_cpu = call(rewards, prior, **given), fused_advantage(rewards, prior, **given)
    torch.testing.assert_close(out.advantages, on_cpu.advantages, rtol=1e-6, atol=1e-9)
    torch.testing.assert_close(out.stats.baseline, on_cpu.stats.baseline, rtol=1e-9, atol=1e-12, equal_nan=True)
    assert torch.equal(out.stats.count, on_cpu.stats.count)


def test_more_than_two_to_the_31_tokens(device, cuda):
    """Addresses need 64 bits: 2.2e9 tokens in bfloat16. The first and the last row are unmasked and compared."""
    n, T, k = 65536, 33000, 8
    free = torch.cuda.mem_get_info()[0]
    if free < 3 * n * T + 2**30:
        pytest.skip(f"needs {3 * n * T / 2**30:.0f} GiB of memory on the device, {free / 2**30:.0f} are free")
    rewards = torch.randint(0, 2, (n,), device=device).float()
    mask = torch.zeros(n, T, dtype=torch.bool, device=device)
    mask[[0, -1]] = True
    offsets = torch.arange(0, n + 1, k, device=device)
    out = torch.full((n, T), math.nan, dtype=torch.bfloat16, device=device)
    fused_advantage(rewards, group_offsets=offsets, response_mask=mask, method="dr_grpo", dtype=torch.bfloat16, out=out)
    for row, group in ((0, slice(0, k)), (-1, slice(-k, None))):
        wanted = (rewards[row] - rewards[group].mean()).bfloat16()
        assert (out[row] == wanted).all()
    assert not out[1:-1].any()
