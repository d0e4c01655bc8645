"""Times `fused_advantage` on the CPU against other implementations and against the floor that memory traffic sets: `make bench`.

All providers of a case get the same tensors, one after another in one process and on one thread. A case's floor is the time to
write the output once with `fill_` and to read the inputs once. Tests of a peer that is not installed are skipped.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest
import torch
from peers import inline

from conftest import FLOOR, Measure
from v05 import _core, reference
from v05.ops import factorize, fused_advantage
from v05.ops.advantage.options import read_options

GROUP_SIZE = 16
SHAPES = ((512, 1024), (4096, 2048), (1024, 8192))
PACKED_ROLLOUTS, PACKED_TOKENS = 4096, 4_000_000
ROLLOUTS, ROLLOUT_GROUPS = 1_000_000, 250_000
SMALL = 64


def peer(name: str) -> ModuleType:
    return pytest.importorskip(f"peers.{name}", exc_type=Exception)


def read(tensor: torch.Tensor) -> torch.Tensor:
    """The fastest way to read a contiguous tensor in torch: sum its bytes as int64 (a sum of bool is 40 times slower)."""
    return tensor.view(torch.int64).sum()


def grpo(rewards: torch.Tensor, ids: torch.Tensor, eps: float = 1e-6) -> torch.Tensor:
    return torch.from_numpy(reference.advantages(rewards.double().numpy(), ids.numpy(), method="grpo", eps=eps)[0])


@functools.lru_cache(maxsize=1)
def padded(n: int, t: int) -> SimpleNamespace:
    """Outcome rewards with a bool mask, and the same batch as verl's tensors."""
    generator = torch.Generator().manual_seed(0)
    rewards = torch.rand(n, generator=generator)
    lengths = torch.randint(1, t + 1, (n, 1), generator=generator)
    ids = torch.arange(n) // GROUP_SIZE
    mask = torch.arange(t) < lengths
    uid = [f"{g:08x}-5f3a-4c1e-9d2b-7a6e5c4d3b2a" for g in range(n // GROUP_SIZE)]
    return SimpleNamespace(
        rewards=rewards,
        ids=ids,
        offsets=torch.arange(0, n + 1, GROUP_SIZE),
        mask=mask,
        token_rewards=torch.zeros(n, t).scatter_(1, lengths - 1, rewards[:, None]),
        mask64=mask.long(),
        uid=np.array(uid, dtype=object).repeat(GROUP_SIZE),
        buffer=torch.empty(n, t),
        expected=grpo(rewards, ids)[:, None] * mask,
        shape=(n, t, n // GROUP_SIZE),
    )


@pytest.mark.parametrize("provider", ["v05", "plain torch", FLOOR])
@pytest.mark.parametrize("fresh", [True, False], ids=["fresh", "out="])
@pytest.mark.parametrize(("n", "t"), SHAPES)
def test_padded(measure: Measure, n: int, t: int, fresh: bool, provider: str) -> None:
    b = padded(n, t)
    out = None if fresh else b.buffer
    calls = {
        "v05": lambda: fused_advantage(b.rewards, group_offsets=b.offsets, response_mask=b.mask, method="grpo", out=out).advantages,
        "plain torch": lambda: torch.mul(inline.plain_torch(b.rewards, b.ids, n // GROUP_SIZE)[:, None], b.mask, out=out),
        FLOOR: lambda: ((torch.empty(n, t) if fresh else b.buffer).fill_(0), read(b.mask)),
    }
    case = "padded, fresh output" if fresh else "padded, out="
    measure(provider, case, b.shape, calls[provider], None if provider == FLOOR else b.expected, 5 * n * t)


@pytest.mark.parametrize("provider", ["v05", "verl vectorized", "verl loop", "SkyRL", FLOOR])
@pytest.mark.parametrize("fresh", [True, False], ids=["fresh", "out="])
@pytest.mark.parametrize(("n", "t"), SHAPES)
def test_tensors_of_verl(measure: Measure, n: int, t: int, fresh: bool, provider: str) -> None:
    b = padded(n, t)
    out = None if fresh else b.buffer
    if not fresh and provider not in ("v05", FLOOR):
        pytest.skip("allocates its output itself")
    calls: dict[str, Callable[[], object]] = {
        "v05": lambda: fused_advantage(b.token_rewards, group_ids=b.uid, response_mask=b.mask64, method="grpo", out=out).advantages,
        "verl vectorized": lambda: peer("verl").vectorized(b.token_rewards, b.mask64, b.uid),
        "verl loop": lambda: peer("verl").loop(b.token_rewards, b.mask64, b.uid),
        "SkyRL": lambda: peer("skyrl").loop(b.token_rewards, b.mask64, b.uid),
        FLOOR: lambda: ((torch.empty(n, t) if fresh else b.buffer).fill_(0), read(b.mask64), read(b.token_rewards)),
    }
    case = "verl's tensors, fresh output" if fresh else "verl's tensors, out="
    measure(provider, case, b.shape, calls[provider], None if provider == FLOOR else b.expected, 16 * n * t)


@functools.lru_cache(maxsize=1)
def packed() -> SimpleNamespace:
    n = PACKED_ROLLOUTS
    generator = torch.Generator().manual_seed(0)
    cuts = torch.randint(0, PACKED_TOKENS + 1, (n - 1,), generator=generator).sort().values
    cu_seqlens = torch.cat((torch.tensor([0]), cuts, torch.tensor([PACKED_TOKENS])))
    rewards = torch.rand(n, generator=generator)
    ids = torch.arange(n) // GROUP_SIZE
    return SimpleNamespace(
        rewards=rewards,
        ids=ids,
        offsets=torch.arange(0, n + 1, GROUP_SIZE),
        cu_seqlens=cu_seqlens,
        buffer=torch.empty(PACKED_TOKENS),
        expected=grpo(rewards, ids).repeat_interleave(cu_seqlens.diff()),
        shape=(n, PACKED_TOKENS, n // GROUP_SIZE),
    )


@pytest.mark.parametrize("provider", ["v05", "plain torch", FLOOR])
@pytest.mark.parametrize("fresh", [True, False], ids=["fresh", "out="])
def test_packed(measure: Measure, fresh: bool, provider: str) -> None:
    b = packed()
    if not fresh and provider == "plain torch":
        pytest.skip("repeat_interleave allocates its output itself")
    out = None if fresh else b.buffer
    groups = b.shape[2]
    calls = {
        "v05": lambda: (
            fused_advantage(b.rewards, group_offsets=b.offsets, cu_seqlens=b.cu_seqlens, method="grpo", out=out).advantages
        ),
        "plain torch": lambda: inline.plain_torch(b.rewards, b.ids, groups).repeat_interleave(b.cu_seqlens.diff()),
        FLOOR: lambda: (torch.empty(PACKED_TOKENS) if fresh else b.buffer).fill_(0),
    }
    case = "packed, fresh output" if fresh else "packed, out="
    measure(provider, case, b.shape, calls[provider], None if provider == FLOOR else b.expected, 4 * PACKED_TOKENS)


@pytest.mark.parametrize("provider", ["v05", "TRL's arithmetic", "OpenRLHF's arithmetic", "plain torch", FLOOR])
@pytest.mark.parametrize("n", [4096, 262_144])
def test_equal_groups(measure: Measure, n: int, provider: str) -> None:
    """Per-rollout output of equal groups in contiguous rows, the only layout for which a reshape is enough."""
    groups = n // GROUP_SIZE
    rewards = torch.rand(n, generator=torch.Generator().manual_seed(0))
    ids, offsets = torch.arange(n) // GROUP_SIZE, torch.arange(0, n + 1, GROUP_SIZE)
    calls = {
        "v05": lambda: fused_advantage(rewards, group_offsets=offsets, method="grpo", stats=False).advantages,
        "TRL's arithmetic": lambda: inline.trl(rewards, GROUP_SIZE),
        "OpenRLHF's arithmetic": lambda: inline.openrlhf(rewards, GROUP_SIZE),
        "plain torch": lambda: inline.plain_torch(rewards, ids, groups),
        FLOOR: lambda: (torch.empty(n).fill_(0), read(rewards)),
    }
    eps = {"TRL's arithmetic": inline.TRL_EPS, "OpenRLHF's arithmetic": inline.OPENRLHF_EPS}.get(provider, 1e-6)
    expected = None if provider == FLOOR else exact_grpo(rewards, ids, eps)
    measure(provider, "rollouts, equal groups", (n, 1, groups), calls[provider], expected, 8 * n, calls=4)


def exact_grpo(rewards: torch.Tensor, ids: torch.Tensor, eps: float = 1e-6) -> torch.Tensor:
    """The reference's formula in float64, vectorised because the reference's loop over groups would take minutes."""
    index, values = ids.numpy(), rewards.double().numpy()
    count = np.bincount(index)
    deviation = values - (np.bincount(index, weights=values) / count)[index]
    variance = np.bincount(index, weights=deviation**2) / (count - 1)
    return torch.from_numpy(deviation / (np.sqrt(variance) + eps)[index])


@functools.lru_cache(maxsize=1)
def rollouts() -> SimpleNamespace:
    """Rollouts of groups of 4 in random order."""
    generator = torch.Generator().manual_seed(0)
    n = ROLLOUTS
    ids = torch.randperm(n, generator=generator) // (n // ROLLOUT_GROUPS)
    rewards = torch.rand(n, generator=generator)
    names = [f"prompt-{i}" for i in ids.tolist()]
    return SimpleNamespace(
        ids=ids,
        scattered=ids * 1_000_003_000_017 - 2**60,
        column=torch.zeros(ROLLOUT_GROUPS, 4, dtype=torch.float64)[:, 0],  # stride of 32 bytes per group
        gathered=torch.empty(n, dtype=torch.float64),
        names=names,
        name_array=np.array(names, dtype=object),
        rewards=rewards,
        expected=exact_grpo(rewards, ids),
        shape=(n, 1, ROLLOUT_GROUPS),
    )


@pytest.mark.parametrize("provider", ["v05", "plain torch float64", "plain torch float32", FLOOR])
@pytest.mark.parametrize("any_value", [False, True], ids=["positions", "any value"])
def test_rollouts(measure: Measure, any_value: bool, provider: str) -> None:
    """Per-rollout output with ids in random order. The op computes in float64; torch is timed in float64 and in float32.

    The floor is to write the output, read ids and rewards, and read a number of each rollout's group twice, at random addresses.
    """
    b = rollouts()
    ids = b.scattered if any_value else b.ids
    groups = None if any_value else ROLLOUT_GROUPS

    def plain(dtype: torch.dtype) -> torch.Tensor:
        positions = torch.unique(ids, return_inverse=True)[1] if any_value else ids
        return inline.plain_torch(b.rewards.to(dtype), positions, ROLLOUT_GROUPS)

    calls = {
        "v05": lambda: fused_advantage(b.rewards, group_ids=ids, num_groups=groups, method="grpo", stats=False).advantages,
        "plain torch float64": lambda: plain(torch.float64),
        "plain torch float32": lambda: plain(torch.float32),
        FLOOR: lambda: (
            torch.empty(ROLLOUTS).fill_(0),
            read(ids),
            read(b.rewards),
            *(torch.index_select(b.column, 0, b.ids, out=b.gathered) for _ in range(2)),
        ),
    }
    case = "rollouts, ids of any value" if any_value else "rollouts, ids are positions"
    measure(provider, case, b.shape, calls[provider], None if provider == FLOOR else b.expected, 16 * ROLLOUTS)


@pytest.mark.parametrize("leave_one_out", [False, True], ids=["full", "leave-one-out"])
@pytest.mark.parametrize("binary", [True, False], ids=["binary", "fractional"])
@pytest.mark.parametrize("provider", ["v05", "calibrated"])
def test_fusion(measure: Measure, leave_one_out: bool, binary: bool, provider: str) -> None:
    """The cost of fusing with a prior: per-rollout output in contiguous groups of 4, without statistics."""
    generator = torch.Generator().manual_seed(0)
    rewards = torch.rand(ROLLOUTS, generator=generator)
    rewards = (rewards < 0.4).float() if binary else rewards
    prior = torch.rand(ROLLOUT_GROUPS, generator=generator, dtype=torch.float64)
    offsets = torch.arange(0, ROLLOUTS + 1, 4)

    def call(groups: int = ROLLOUT_GROUPS) -> torch.Tensor:
        options = dict(method=provider, leave_one_out=leave_one_out, stats=False)
        return fused_advantage(rewards[: 4 * groups], prior[:groups], group_offsets=offsets[: groups + 1], **options).advantages

    some = 1000  # the reference is slow
    ids = np.arange(4 * some) // 4
    options = dict(method=provider, leave_one_out=leave_one_out)
    exact = reference.advantages(rewards[: 4 * some].double().numpy(), ids, prior[:some].numpy(), **options)[0]
    torch.testing.assert_close(call(some).double(), torch.from_numpy(exact), rtol=1e-6, atol=1e-6)
    case = "fusion with a prior, groups of 4" + ("" if binary else ", fractional") + (", leave-one-out" if leave_one_out else "")
    measure(provider, case, (ROLLOUTS, 1, ROLLOUT_GROUPS), call, None, 8 * ROLLOUTS)


@pytest.mark.parametrize("provider", ["v05", "v05, list", "pandas"])
def test_string_ids(measure: Measure, provider: str) -> None:
    b = rollouts()
    calls = {
        "v05": lambda: factorize(b.name_array)[0],
        "v05, list": lambda: factorize(b.names)[0],
        "pandas": lambda: importlib.import_module("pandas").factorize(b.name_array)[0],
    }
    if provider == "pandas":
        pytest.importorskip("pandas")
    by_appearance = torch.from_numpy(np.unique(b.ids.numpy(), return_index=True)[1]).argsort().argsort()[b.ids].double()
    measure(provider, "string ids to numbers", b.shape, calls[provider], by_appearance, 16 * ROLLOUTS)


@pytest.mark.parametrize("provider", ["v05", FLOOR])
def test_small(measure: Measure, provider: str) -> None:
    """The time that Python adds to the call of the core, with so few rollouts that nothing else matters. The floor is that call."""
    rewards, prior = torch.rand(SMALL, generator=torch.Generator().manual_seed(0)), torch.full((4,), 0.5, dtype=torch.float64)
    offsets, out = torch.arange(0, SMALL + 1, GROUP_SIZE), torch.empty(SMALL)
    table = torch.empty(len(_core.STATISTICS), 4, dtype=torch.float64)
    given = (SMALL, False, rewards.data_ptr(), 3, None, 0, None, None, None, None)
    groups, output = (4, offsets.data_ptr(), None), (out.data_ptr(), 3, SMALL)
    _, rule, _ = read_options("v05", None, False, (0.0, 1.0), 1e-6, "zero", "raise", 16, None, None, True, torch.float32)
    calls = {
        "v05": lambda: fused_advantage(rewards, prior, group_offsets=offsets).advantages,
        FLOOR: lambda: (_core.compute_advantages(given, groups, prior.data_ptr(), rule.core, output, table.data_ptr(), 1), out)[1],
    }
    ids = torch.arange(SMALL) // GROUP_SIZE
    expected = torch.from_numpy(reference.advantages(rewards.double().numpy(), ids.numpy(), prior.numpy())[0])
    measure(provider, "64 rollouts", (SMALL, 1, 4), calls[provider], expected, 8 * SMALL, calls=200)
