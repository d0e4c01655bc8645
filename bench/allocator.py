"""Times the rollout allocator with a million open groups, against the same logic in plain Python.

    python bench/allocator.py            # one thread; prints a table and writes bench/results/allocator.csv

Both must make the same allocations before either is timed. A pass opens all groups, leases all initial rollouts in batches, and
then reports and leases in rounds until every group has closed. Only the calls are timed, in processor time of one thread. Reports
come in the order of the leases, shuffled among 16,384 rollouts in flight, or shuffled among all rollouts of a round (millions, in
random order over all memory). The plain Python allocator is tests/helpers/allocator_model.py. It gets fewer groups, because a
million would need too much memory and time.
"""

from __future__ import annotations

import csv
import gc
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
from machine import commit, processor, versions
from numpy.typing import NDArray

from v05.budget import RolloutAllocator
from v05.methods import Calibration

sys.path.append(str(Path(__file__).parents[1] / "tests"))
from helpers.allocator_model import PlainAllocator

RESULTS = Path(__file__).parent / "results" / "allocator.csv"
FIELDS = ("provider", "case", "groups", "value", "unit", "device", "commit", "versions")
GROUPS, PLAIN_GROUPS, GATE_GROUPS = 1_000_000, 50_000, 2_000
BATCH = 1024
LEASE = 256
ORDERS = {"in order": 1, "16,384 in flight": 16_384, "all in flight": 16 * GROUPS}  # rollouts among which reports are shuffled
CALIBRATION = Calibration(alpha=0.0, beta=1.0, kappa=4.5, eps=0.12)
RULES: dict[str, dict[str, object]] = {
    "osla": {"rule": "osla"},
    "calibrated": {"rule": "calibrated", "calibration": CALIBRATION},
}

Row = tuple[str, str, int, float, str]  # provider, case, groups, value, unit


def draw(groups: int) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Rewards (groups, 16), and priors (groups,) that are right, wrong or missing. osla takes about 10 rollouts per group."""
    rng = np.random.default_rng(0)
    rates = rng.beta(0.6, 0.6, groups)
    rewards = (rng.random((groups, 16)) < rates[:, None]).astype(np.float64)
    kind = rng.choice(3, groups, p=(0.3, 0.3, 0.4))
    return rewards, np.choose(kind, (rates, rng.random(groups), np.nan))


class Timed:
    """Records the seconds of each call made through it."""

    def __init__(self) -> None:
        self.seconds: list[float] = []

    def __call__(self, call: Callable[..., object], *arguments: object) -> object:
        started = time.thread_time()
        result = call(*arguments)
        self.seconds.append(time.thread_time() - started)
        return result


def rounds(
    allocator: RolloutAllocator | PlainAllocator, rewards: NDArray[np.float64], window: int, lease: Timed, report: Timed
) -> None:
    """Lease all queued rollouts and report all leased ones, in rounds, until every group has closed."""
    rng = np.random.default_rng(1)
    plain = isinstance(allocator, PlainAllocator)
    while not allocator.done:
        batches = []
        while True:
            leases = lease(allocator.lease, LEASE)
            if not len(leases):
                break
            columns = map(np.array, zip(*leases, strict=True)) if plain else (leases.lease_id, leases.group, leases.index)
            batches.append(tuple(columns))
        lease_ids, groups, indices = (np.concatenate(column) for column in zip(*batches, strict=True))
        order = np.argsort(np.arange(len(lease_ids)) // window + rng.random(len(lease_ids)))
        for start in range(0, len(order), BATCH):
            rows = order[start : start + BATCH]
            values: tuple[Sequence[int], Sequence[float]] = lease_ids[rows], rewards[groups[rows], indices[rows]]
            if plain:  # plain Python needs no conversion to arrays
                values = values[0].tolist(), values[1].tolist()
            report(allocator.report, *values)


def resident() -> int:
    """Bytes of memory this process holds."""
    gc.collect()
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096


def gate() -> None:
    """Raise AssertionError unless both allocators make the same allocations."""
    rewards, priors = draw(GATE_GROUPS)
    for options in RULES.values():
        sizes = []
        for kind in (RolloutAllocator, PlainAllocator):
            allocator = kind(**options)
            allocator.open(range(GATE_GROUPS), priors.tolist())
            rounds(allocator, rewards, BATCH, Timed(), Timed())
            closed = allocator.drain()
            sizes.append(
                [len(rewards) for _, _, rewards in closed] if isinstance(closed, list) else np.diff(closed.offsets).tolist()
            )
        if sizes[0] != sizes[1]:
            raise AssertionError(f"{options}: the allocators differ, so neither is timed")


def measure(provider: str, groups: int) -> Iterator[Row]:
    kind = {"v05": RolloutAllocator, "plain Python": PlainAllocator}[provider]
    rewards, priors = draw(groups)
    ids: Sequence[int] | NDArray[np.int64] = np.arange(groups)
    if kind is PlainAllocator:
        ids, priors = ids.tolist(), priors.tolist()
    for name, options in RULES.items():
        for order, window in ORDERS.items():
            before = resident()
            allocator = kind(**options)
            opened, lease, report = Timed(), Timed(), Timed()
            opened(allocator.open, ids, priors)
            memory = (resident() - before) / groups - 8 * 4  # without the memory of 4 rewards
            rounds(allocator, rewards, window, lease, report)
            reports = allocator.counts()["reported"]
            yield provider, f"{name}: reports, {order}", groups, reports / sum(report.seconds), "1/s"
            if (name, order) == ("osla", "in order"):
                yield provider, "reports in the pass", groups, reports, ""
                yield provider, "an open group, less its rewards", groups, memory, "bytes"
                yield provider, "open all", groups, sum(opened.seconds), "s"
                first = -(-4 * groups // LEASE)
                yield provider, f"lease({LEASE}), initial rollouts", groups, 1e6 * float(np.median(lease.seconds[:first])), "us"
                yield provider, f"lease({LEASE}), extra rollouts", groups, 1e6 * float(np.median(lease.seconds[first + 1 :])), "us"
                yield provider, f"lease({LEASE}), 99th percentile", groups, 1e6 * float(np.percentile(lease.seconds, 99)), "us"
            del allocator


def upkeep(groups: int) -> Iterator[Row]:
    """Operations without a counterpart in plain Python, with all initial rollouts leased; and rule "total"."""
    rewards, priors = draw(groups)
    allocator = RolloutAllocator()
    allocator.open(np.arange(groups), priors)
    out = allocator.lease(4 * groups)
    once = Timed()
    once(allocator.expire, 3600)
    blob = once(allocator.snapshot)
    once(RolloutAllocator.restore, blob)
    for case, seconds in zip(("expire, all leases out", "snapshot", "restore"), once.seconds, strict=True):
        yield "v05", case, groups, 1e3 * seconds, "ms"
    yield "v05", "snapshot of a group", groups, len(blob) / groups, "bytes"

    allocator = RolloutAllocator(rule="total", total=8 * groups, calibration=CALIBRATION)
    allocator.open(np.arange(groups), priors)
    out = allocator.lease(4 * groups)
    allocator.report(out.lease_id, rewards[out.group, out.index])
    lease = Timed()
    for _ in range(1000):
        out = lease(allocator.lease, LEASE)
        allocator.report(out.lease_id, rewards[out.group, out.index])
    yield "v05", f"total: lease({LEASE}) by gain", groups, 1e6 * float(np.median(lease.seconds)), "us"


def main() -> None:
    gate()
    about = (f"{processor()}, 1 thread", commit(), versions("numpy"))
    RESULTS.parent.mkdir(exist_ok=True)
    with RESULTS.open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(FIELDS)
        for rows in (measure("v05", GROUPS), upkeep(GROUPS), measure("plain Python", PLAIN_GROUPS)):
            for provider, case, groups, value, unit in rows:
                writer.writerow((provider, case, groups, f"{value:.6g}", unit, *about))
                print(f"{provider:<14} {case:<36} {groups:>9} groups {value:14.4g} {unit}", flush=True)


if __name__ == "__main__":
    main()
