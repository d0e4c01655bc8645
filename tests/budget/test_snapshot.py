"""Snapshots: a restored allocator continues as the original would, and bytes that are no snapshot are refused."""

from __future__ import annotations

import math

import numpy as np
import pytest

from helpers.allocator_model import bernoulli, run_to_end
from v05.budget import RolloutAllocator
from v05.methods import Calibration

NAN = math.nan
CALIBRATION = Calibration(alpha=0.31, beta=0.83, kappa=6.0, eps=0.15)
ENERGIES = Calibration(alpha=0.31, beta=0.83, kappa=6.0, eps=0.15, delta0=-0.37, delta1=1.43)
OPTIONS: dict[str, dict[str, object]] = {
    "osla": {"seed": 5, "chunk": 2},
    "calibrated": {"rule": "calibrated", "calibration": CALIBRATION, "cost": 0.01},
    "variance": {"rule": "variance", "calibration": ENERGIES, "cost": 0.01},
    "looking ahead": {"chunk": "look", "cost": 0.001},
    "total": {"rule": "total", "total": 300, "calibration": CALIBRATION},
    "uniform": {"rule": "uniform", "initial": 3, "reward_range": (-1.0, 1.0), "max_attempts": 2},
}
HEADER = 8 + 4 + 8 + 8  # magic, version, length, checksum


def in_the_middle(options: dict[str, object], names: bool = False) -> RolloutAllocator:
    """An allocator that holds everything a snapshot can: retries, failures, and drained, closed, tested and new groups."""
    allocator = RolloutAllocator(**options)
    ids = [f"π-{i}" for i in range(30)] if names else list(range(30))
    rewards, priors = bernoulli(30, invalid=0.1)
    allocator.open(ids, np.where(np.isnan(priors), NAN, priors))
    number = {name: i for i, name in enumerate(ids)}
    for n in (50, 20, 30):
        leases = allocator.lease(n)
        values = rewards[[number[name] for name in leases.group.tolist()], leases.index]
        allocator.report(leases.lease_id[5:], values[5:])
        allocator.report(leases.lease_id[10:12], values[10:12])
        allocator.fail(leases.lease_id[:4])
        if n == 20:
            allocator.drain()
    counts = allocator.counts()
    assert min(counts[name] for name in ("open_groups", "queued", "leased", "failed", "duplicate")) > 0
    return allocator


@pytest.mark.parametrize("names", [False, True], ids=["int", "str"])
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS.keys())
def test_a_restored_allocator_goes_on_alike(options: dict[str, object], names: bool) -> None:
    original = in_the_middle(options, names)
    blob = original.snapshot()
    twins = RolloutAllocator.restore(blob), RolloutAllocator.restore(blob)
    assert twins[0].snapshot() == blob
    counts = original.counts()
    assert twins[0].counts() == counts | {"leased": 0, "queued": counts["queued"] + counts["leased"]}
    histories = []
    for twin in twins:
        history = []
        while not twin.done:
            leases = twin.lease(7)
            history += list(zip(leases.lease_id.tolist(), leases.group.tolist(), leases.seed.tolist(), strict=True))
            twin.report(leases.lease_id, leases.index % 2)
        closed = twin.drain()
        histories.append((history, closed.group_ids.tolist(), closed.rewards.tolist()))
    assert str(histories[0]) == str(histories[1])


def test_what_was_leased_waits_again_ahead_of_the_queue() -> None:
    allocator = RolloutAllocator(rule="uniform", initial=2, max_attempts=2)
    allocator.open([7, 8, 9], [0.5] * 3)
    leases = allocator.lease(4)
    allocator.fail(leases.lease_id[1:2])  # (7, 1) is queued again
    allocator.report(leases.lease_id[2:3], [1.0])  # (8, 0) is reported
    restored = RolloutAllocator.restore(allocator.snapshot())
    restored.report(leases.lease_id, [0.0] * 4)  # a late report from a worker of the old process
    assert [restored.counts()[name] for name in ("unknown", "late", "duplicate")] == [2, 1, 1]
    again = restored.lease(9)
    assert again.group.tolist() == [7, 8, 7, 9, 9]
    assert again.index.tolist() == [0, 1, 1, 0, 1]
    assert again.seed[:3].tolist() == leases.seed[[0, 3, 1]].tolist()
    assert again.lease_id[:2].tolist() == leases.lease_id[[0, 3]].tolist()  # the restart cost no attempt
    restored.fail(again.lease_id[2:3])  # the second failure of (7, 1), one in each process
    assert restored.counts()["invalid"] == 1


def test_restarting_again_and_again_loses_nothing() -> None:
    rewards, priors = bernoulli(40)
    steady = RolloutAllocator(max_attempts=1)
    steady.open(np.arange(40), priors)
    expected = run_to_end(steady, lambda group, index: rewards[group, index])
    rng = np.random.default_rng(0)
    allocator = RolloutAllocator(max_attempts=1)
    allocator.open(np.arange(40), priors)
    while not allocator.done:
        leases = allocator.lease(9)
        kept = rng.random(len(leases)) < 0.5  # the process dies while the other rollouts are leased
        allocator.report(leases.lease_id[kept], rewards[leases.group, leases.index][kept])
        allocator = RolloutAllocator.restore(allocator.snapshot())
    closed = allocator.drain()
    np.testing.assert_array_equal(closed.offsets, expected.offsets)
    np.testing.assert_array_equal(closed.rewards, expected.rewards)
    assert allocator.counts()["reported"] == len(closed.rewards)


def test_an_empty_allocator() -> None:
    restored = RolloutAllocator.restore(RolloutAllocator(seed=3).snapshot())
    assert restored.done
    restored.open(["strings still welcome"], [NAN])
    other = RolloutAllocator(seed=3)
    other.open(["strings still welcome"], [NAN])
    assert restored.lease(4).seed.tolist() == other.lease(4).seed.tolist()


def test_the_format_does_not_change_silently() -> None:
    allocator = RolloutAllocator(initial=1, maximum=2, seed=-1)
    allocator.open([-7, 300], [0.25, NAN])
    allocator.report(allocator.lease(1).lease_id, [1.0])
    assert allocator.snapshot().hex() == GOLDEN


def test_restore_says_why_it_refuses() -> None:
    blob = in_the_middle(OPTIONS["osla"]).snapshot()

    def refuse(bad: bytes, message: str) -> None:
        with pytest.raises(ValueError, match=f"blob is not a snapshot that can be restored: {message}"):
            RolloutAllocator.restore(bad)

    refuse(b"", "it does not start with v05alloc: it is something else, or empty")
    refuse(b"\x80\x04" + blob, "it does not start with v05alloc")
    refuse(blob[:15], "it ends too early")
    refuse(blob[:8] + b"\x01\0\0\0" + blob[12:], "it has format 1 and this v05 reads format 2; use the v05 that wrote it")
    refuse(blob[:-1], rf"it holds {len(blob) - HEADER - 1} of {len(blob) - HEADER} bytes: it was cut off")
    refuse(blob + b"\0", rf"it holds {len(blob) - HEADER + 1} of {len(blob) - HEADER} bytes")
    refuse(blob[:-1] + bytes([blob[-1] ^ 1]), "its checksum is wrong: it was damaged")
    refuse(sealed(blob[HEADER:-1]), "it ends too early")
    refuse(sealed(blob[HEADER:] + b"\0"), "its content is contradictory: there is more")
    refuse(sealed(b"\x07" + blob[HEADER + 1 :]), "its content is contradictory: the rule")
    refuse(sealed(blob[HEADER : HEADER + 1] + bytes(8) + blob[HEADER + 9 :]), "initial=0 is not positive")
    with pytest.raises(TypeError):
        RolloutAllocator.restore("v05alloc")  # type: ignore[arg-type]


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS.keys())
def test_damage_is_always_noticed(options: dict[str, object]) -> None:
    blob = in_the_middle(options).snapshot()
    rng = np.random.default_rng(0)
    for size in rng.integers(0, len(blob), 200).tolist():
        with pytest.raises(ValueError, match="blob is not"):
            RolloutAllocator.restore(blob[:size])
    for _ in range(2000):
        damaged = bytearray(blob)
        for _ in range(rng.integers(1, 4)):
            damaged[rng.integers(len(blob))] ^= 1 << int(rng.integers(8))
        if damaged != blob:
            with pytest.raises(ValueError, match="blob is not"):
                RolloutAllocator.restore(bytes(damaged))


@pytest.mark.parametrize("names", [False, True], ids=["int", "str"])
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS.keys())
def test_forged_content_is_refused_or_harmless(options: dict[str, object], names: bool) -> None:
    """Wrong bytes under a right checksum: an allocator that restores from them must still work."""
    content = in_the_middle(options, names).snapshot()[HEADER:]
    rng = np.random.default_rng(0)
    insane = [bytes(8), b"\xff" * 8, b"\0" * 7 + b"\x80", b"\xff" * 7 + b"\x7f", b"\x01" + bytes(7), b"\0" * 4 + b"\x01\0\0\0"]
    refused = accepted = 0
    for _ in range(3000):
        forged = bytearray(content)
        kind, at = rng.integers(4), int(rng.integers(len(content)))
        if kind == 0:
            forged[at] ^= 1 << int(rng.integers(8))
        elif kind == 1:
            forged[at : at + 8] = insane[rng.integers(len(insane))]
        elif kind == 2:
            del forged[at : at + int(rng.integers(1, 9))]
        else:
            other = int(rng.integers(len(content)))
            forged[at : at + 8] = content[other : other + 8]
        try:
            allocator = RolloutAllocator.restore(sealed(bytes(forged)))
        except ValueError:
            refused += 1
            continue
        accepted += 1
        blob = allocator.snapshot()
        assert RolloutAllocator.restore(blob).snapshot() == blob
        try:
            for _ in range(8):
                leases = allocator.lease(100)
                allocator.report(leases.lease_id[::2], np.full(len(leases.lease_id[::2]), NAN))
                allocator.fail(leases.lease_id[1::2])
            allocator.drain()
        except UnicodeDecodeError:
            assert names  # a forged name is not valid text
    assert refused > 500
    assert accepted > 50  # any value is valid for rewards, seeds, counters and names


def sealed(content: bytes) -> bytes:
    """The content behind a valid snapshot header."""

    def mix(x: int) -> int:
        x = (x + 0x9E3779B97F4A7C15) % 2**64
        x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
        x = (x ^ (x >> 27)) * 0x94D049BB133111EB % 2**64
        return x ^ (x >> 31)

    checksum = mix(len(content))
    whole = len(content) // 8 * 8
    for word in np.frombuffer(content[:whole], dtype="<u8").tolist():
        checksum = mix(checksum ^ word)
    for byte in content[whole:]:
        checksum = mix(checksum ^ byte)
    return b"v05alloc" + (2).to_bytes(4, "little") + len(content).to_bytes(8, "little") + checksum.to_bytes(8, "little") + content


GOLDEN = (
    "763035616c6c6f630200000029010000000000006a65028f174146d000010000000000000002000000000000000000000000000000000000"
    "000000000000000100000000000000ffffffffffffffff0000000000000000000000000000f03f000000000000000000000000000000f03f"
    "000000000000f03f000000000000e03f00000000000000000000000000000000030000000000000001000000000000000000000000000000"
    "0000000000000000000000000000000000000000000000000000000000000000000000000000000002000000000000000100000000000000"
    "00000000000000000002000000000000000100f9ffffffffffffff000000000000d03f000000000000f03f01002c01000000000000000000"
    "000000f87fffffffffffffffff0000000000000000000000000000000001000000000000000000000000000000"
)
