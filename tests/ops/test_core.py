"""The compiled core: the same bits on every thread count and instruction set, the numbering of unusual ids, and error bounds."""

import hashlib
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from helpers.advantage_columns import columns
from v05 import _core, reference
from v05.ops import fused_advantage

ROOT = Path(__file__).parents[2]
INT64 = np.iinfo(np.int64)


def digest() -> str:
    """A hash of everything the op writes, for uneven groups in random order, with enough work to be shared among threads."""
    rng = np.random.default_rng(0)
    n, t, groups = 3001, 75, 700
    ids, prior = torch.from_numpy(rng.integers(0, groups, n)), torch.from_numpy(rng.random(groups))
    tokens = torch.from_numpy(rng.random((n, t), dtype=np.float32)) / t
    lengths = torch.from_numpy(rng.integers(0, t + 1, n))
    mask = torch.arange(t) < lengths[:, None]
    cu_seqlens = torch.cat((torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)))
    seen = hashlib.sha256()
    for scale in ("none", "group", "batch"):
        options = dict(group_ids=ids, num_groups=groups, scale=scale, method="v05")
        for mask_dtype in (torch.bool, torch.int64, torch.float32):
            for rewards in (tokens, tokens.double(), tokens[:, 0]):
                out = fused_advantage(rewards, prior, response_mask=mask.to(mask_dtype), **options)
                for tensor in (out.advantages, *columns(out.stats)):
                    seen.update(tensor.numpy().tobytes())
        for dtype in (torch.float32, torch.float64):
            out = fused_advantage(tokens[:, 0], prior, dtype=dtype, cu_seqlens=cu_seqlens, **options)
            seen.update(out.advantages.numpy().tobytes())
        for rewards in (tokens[:, 0], (tokens[:, 0] * t > 0.5).float()):
            for leave_one_out in (False, True):
                fused = options | dict(method="calibrated", leave_one_out=leave_one_out)
                out = fused_advantage(rewards, prior, dtype=torch.float64, **fused)
                for tensor in (out.advantages, *columns(out.stats)):
                    seen.update(tensor.numpy().tobytes())
        many = torch.from_numpy(rng.random(200_000))
        out = fused_advantage(many, group_offsets=torch.arange(0, 200_001, 4), scale=scale, method="grpo")
        seen.update(out.advantages.numpy().tobytes())
    return seen.hexdigest()


@pytest.fixture
def two_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


def test_thread_count_does_not_change_a_bit(request):
    one = digest()
    request.getfixturevalue("two_threads")
    assert digest() == one


@pytest.mark.parametrize("scale", ["none", "group", "batch"])
def test_the_form_of_the_groups_does_not_change_a_bit(scale):
    rng = np.random.default_rng(1)
    ids = np.sort(rng.integers(0, 300, 2000))
    offsets = np.searchsorted(ids, np.arange(301))
    rewards, prior = torch.from_numpy(rng.random(2000)), rng.random(300)
    by_offset = fused_advantage(rewards, prior, group_offsets=offsets, scale=scale)
    by_id = fused_advantage(rewards, prior, group_ids=ids, num_groups=300, scale=scale)
    assert torch.equal(by_offset.advantages, by_id.advantages)
    torch.testing.assert_close(columns(by_offset.stats), columns(by_id.stats), rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("scale", ["none", "group"])
@pytest.mark.parametrize("method", ["v05", "grpo"])
@pytest.mark.parametrize("size", [1, 2, 3, 4, 8, 16, 17])
def test_groups_side_by_side_have_the_bits_of_groups_alone(size, method, scale):
    """Groups of one size are computed four at a time. A group alone never is, and must have the same bits."""
    rng = np.random.default_rng(size)
    groups = 45  # not a multiple of four
    rewards = torch.from_numpy(rng.choice([0.0, 0.25, 1.0], (groups, size)) + rng.choice([0.0, 1e-9], (groups, 1)))
    rewards[7] = 1.0
    prior = torch.from_numpy(rng.random(groups))
    prior[[3, 40]] = torch.nan
    options = dict(method=method, scale=scale, dtype=torch.float64, max_rollouts=9, cost=0.004, reward_range=(0.0, 1.1))
    for each in (rewards, rewards.float(), rewards * 9e149 if method == "grpo" else rewards - 0.0):
        for dtype in (torch.float32, torch.float64):
            options["dtype"] = dtype
            offsets = torch.arange(0, groups * size + 1, size)
            together = fused_advantage(each.reshape(-1), prior, group_offsets=offsets, **options)
            alone = [fused_advantage(each[g], prior[g : g + 1], group_offsets=[0, size], **options) for g in range(groups)]
            assert torch.equal(together.advantages, torch.cat([one.advantages for one in alone]))
            apart = [torch.cat(column) for column in zip(*(columns(one.stats) for one in alone), strict=True)]
            torch.testing.assert_close(columns(together.stats), apart, rtol=0, atol=0, equal_nan=True)
    assert 0 < together.stats.var.count_nonzero() < groups or size == 1


def test_groups_of_one_size_among_others():
    """Runs of groups of one size begin and end anywhere, also between two multiples of four."""
    rng = np.random.default_rng(0)
    sizes = np.concatenate([np.full(count, size) for size, count in [(4, 9), (3, 2), (8, 17), (0, 1), (4, 8), (16, 3), (2, 30)]])
    rewards, prior = torch.from_numpy(rng.random(sizes.sum())), torch.from_numpy(rng.random(len(sizes)))
    offsets, ids = np.concatenate([[0], np.cumsum(sizes)]), np.repeat(np.arange(len(sizes)), sizes)
    for method in ("v05", "grpo", "dr_grpo"):
        by_offset = fused_advantage(rewards, prior, group_offsets=offsets, method=method, dtype=torch.float64)
        by_id = fused_advantage(rewards, prior, group_ids=ids, num_groups=len(sizes), method=method, dtype=torch.float64)
        assert torch.equal(by_offset.advantages, by_id.advantages)
        torch.testing.assert_close(columns(by_offset.stats), columns(by_id.stats), rtol=0, atol=0, equal_nan=True)


def test_instruction_set_does_not_change_a_bit(tmp_path):
    flags = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    levels = {"x86-64": "sse2", "x86-64-v3": "avx2", "x86-64-v4": "avx512vl"}
    levels = [level for level, flag in levels.items() if flag in flags]
    if shutil.which("g++") is None or len(levels) < 2:
        pytest.skip("needs g++ and a processor with two levels of x86-64")
    options = ["-std=c++20", "-O3", "-ffp-contract=off", "-DV05_MULTIVERSION=", f"-I{ROOT / 'csrc' / 'include'}"]
    sources = [Path(__file__).with_name("instruction_sets.cpp"), *(ROOT / "csrc" / "advantage").glob("*.cpp")]

    def compile_for(level: str, source: Path) -> Path:
        compiled = tmp_path / f"{level}-{source.stem}.o"
        subprocess.run(["g++", *options, f"-march={level}", "-c", "-o", compiled, source], check=True)
        return compiled

    with ThreadPoolExecutor() as pool:
        objects = {level: [pool.submit(compile_for, level, source) for source in sources] for level in levels}
    printed = set()
    for level in levels:
        program = tmp_path / level
        subprocess.run(["g++", "-o", program, *(compiled.result() for compiled in objects[level])], check=True)
        printed.add(subprocess.run([program], capture_output=True, text=True, check=True).stdout)
    assert len(printed) == 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("mask_dtype", [torch.bool, torch.int64, torch.float32], ids=str)
@pytest.mark.parametrize("tokens", [1, 15, 17, 63, 64, 65, 128, 200])
@pytest.mark.parametrize("share", [1.0, 0.02], ids=["dense", "sparse"])  # blocks of zeros are skipped
def test_token_sums_are_exact(dtype, mask_dtype, tokens, share):
    rng = np.random.default_rng(tokens)
    rewards = torch.from_numpy(rng.integers(-64, 64, (24, tokens)) / 8).to(dtype)  # every partial sum is exact
    rewards = torch.where(torch.from_numpy(rng.random((24, tokens)) < share), rewards, 0.0)
    mask = torch.from_numpy(rng.random((24, tokens)) < 0.6)
    options = dict(group_offsets=torch.arange(0, 25, 4), method="dr_grpo", dtype=torch.float64)
    sums = torch.where(mask, rewards.double(), 0.0).sum(-1)
    unseen = torch.where(rewards == 0, 0.0, torch.nan).to(dtype)
    out = fused_advantage(torch.where(mask, rewards, unseen), response_mask=mask.to(mask_dtype), **options)
    assert torch.equal(out.advantages, fused_advantage(sums, response_mask=mask, **options).advantages)
    torch.testing.assert_close(out.stats.mean, sums.view(6, 4).mean(1), rtol=0, atol=1e-15)


def numbered(keys):
    """The number of each key by first appearance, as a dict assigns it."""
    slots = {}
    return [slots.setdefault(key, len(slots)) for key in keys]


IDS = {
    "empty": [],
    "one row": [7],
    "one group": [5] * 1000,
    "all distinct": list(range(5000, 0, -1)),
    "negative": [-3, -1, -3, -2, 0, -1],
    "all of int64": [INT64.max, INT64.min, 0, INT64.max, -1, INT64.min],
    "huge": [2**62 + i % 7 for i in range(100)],
    "multiples of the table": [i % 700 * 2**40 for i in range(3000)],
    "a table that grows": [i * 1_000_003 % 9973 * 2**32 for i in range(30_000)],
    "just dense enough": [0, 11, 0],
    "just too sparse": [0, 12, 0],
}


@pytest.mark.parametrize("ids", IDS.values(), ids=IDS.keys())
def test_awkward_ids_are_numbered_by_appearance(ids):
    numbers, found = _core.number_ids(np.array(ids, dtype=np.int64))
    assert numbers.tolist() == numbered(ids)
    assert found == len(set(ids))


@settings(max_examples=200, deadline=None)
@given(hnp.arrays(np.int64, st.integers(0, 200), elements=st.one_of(st.integers(-3, 3), st.integers(INT64.min, INT64.max))))
def test_any_ids_are_numbered_by_appearance(ids):
    numbers, found = _core.number_ids(ids)
    assert numbers.tolist() == numbered(ids.tolist())
    assert found == len(set(ids.tolist()))


class Sticky:
    """Keys that all have the same hash, and whose equality runs Python code."""

    def __init__(self, name):
        self.name = name

    def __hash__(self):
        return 1

    def __eq__(self, other):
        return self.name == other.name


KEYS = {
    "empty": [],
    "copies": ["".join(["a", str(i % 3)]) for i in range(100)],
    "every width of character": ["é", "e", "日本", "🦊", "é", "日本", "🦊x", "", ""],
    "long": ["x" * 5000, "x" * 4999 + "y", "x" * 5000],
    "a table that grows": [f"prompt-{i * 7919 % 3001}" for i in range(10_000)],
    "not strings": [(1, 2), "a", None, (1, 2), 3, 3.0, "a"],
    "colliding": [Sticky(i % 5) for i in range(50)],
    "numpy strings": list(np.array(["b", "a", "b"])),
}


@pytest.mark.parametrize("keys", KEYS.values(), ids=KEYS.keys())
def test_factorize(keys):
    array = np.empty(len(keys), dtype=object)
    array[:] = keys
    wide = np.repeat(array, 2)[::2]  # strided
    for form in (keys, tuple(keys), array, wide):
        ids, found = _core.factorize(form)
        assert ids.tolist() == numbered(keys)
        assert found == len(set(keys))


def test_factorize_refuses_what_cannot_be_hashed():
    with pytest.raises(TypeError, match="unhashable"):
        _core.factorize(["a", []])
    with pytest.raises(TypeError, match="give a sequence"):
        _core.factorize(3)


NUMERICS = {
    "1e4, spread 1e-3": (1e4, 1e-3),
    "1e6, spread 1": (1e6, 1.0),
    "denormal": (0.0, 1e-310),
    "units": (0.5, 0.5),
}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(("centre", "spread"), NUMERICS.values(), ids=NUMERICS.keys())
@pytest.mark.parametrize("scale", ["none", "group", "batch"])
def test_digits_survive(centre, spread, dtype, scale):
    """The error bounds of the op's docstring hold for rewards as rounded to their dtype."""
    rng = np.random.default_rng(0)
    ids = rng.integers(0, 20, 400)
    rewards = torch.from_numpy(centre + spread * rng.random(400)).to(dtype)
    if not rewards.isfinite().all():
        pytest.skip("beyond the range of the dtype")
    exact, _ = reference.advantages(rewards.double().numpy(), ids, method="grpo", scale=scale)
    bounds = {torch.float64: 1e-12, torch.float32: 2.0**-24, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}
    for out_dtype, bound in bounds.items():
        out = fused_advantage(rewards, group_ids=ids, num_groups=20, method="grpo", scale=scale, dtype=out_dtype)
        # A mean near `centre` is only known to 2^-53 of `centre`. With a scale, the error is divided by the divisor.
        divisor = 1.0 if scale == "none" else rewards.double().std().item() + 1e-6
        floor = 8 * 2.0**-53 * centre / divisor + 2 * torch.finfo(out_dtype).smallest_normal
        np.testing.assert_allclose(out.advantages.double().numpy(), exact, rtol=1.01 * bound + 1e-12, atol=floor)


@pytest.mark.parametrize("size", [4, 64, 1024, 16_384])
def test_the_error_bound_of_large_groups(size):
    """The bound of the op's docstring holds, even if the first reward, from which deviations are taken, is far from the others."""
    rng = np.random.default_rng(size)
    for first in (0.0, 1.0, 1e3):
        rewards = np.concatenate(([first], rng.random(size - 1)))
        mean = Fraction(sum(map(Fraction, rewards)), size)
        out = fused_advantage(rewards, group_offsets=[0, size], method="dr_grpo", dtype=torch.float64)
        bound = (size + 4) * 2.0**-52 * rewards.max()
        worst = max(abs(Fraction(a) - (Fraction(r) - mean)) for a, r in zip(out.advantages.tolist(), rewards, strict=True))
        assert worst <= bound
