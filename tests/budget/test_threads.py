"""Many threads on one allocator: from Python, and in C++ under ThreadSanitizer."""

from __future__ import annotations

import shutil
import subprocess
import threading
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from helpers.allocator_model import bernoulli, run_to_end
from helpers.programs import ENVIRONMENT, build_with_allocator
from v05.budget import RolloutAllocator

NAN = float("nan")


def test_threads() -> None:
    groups = 500
    rewards, priors = bernoulli(groups)
    allocator = RolloutAllocator()
    allocator.open(np.arange(groups), priors)
    seen: list[tuple[int, int, int]] = []
    errors: list[BaseException] = []

    def work(seed: int) -> None:
        rng = np.random.default_rng(seed)
        try:
            while not allocator.done:
                leases = allocator.lease(int(rng.integers(1, 40)))
                broken = rng.random(len(leases)) < 0.02
                kept = leases.lease_id[~broken]
                allocator.report(kept, rewards[leases.group, leases.index][~broken])
                allocator.report(kept[:1], np.ones(len(kept[:1])))
                allocator.fail(leases.lease_id[broken])
                seen.extend(zip(leases.lease_id.tolist(), leases.group.tolist(), leases.index.tolist(), strict=True))
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors
    closed = allocator.drain()
    counts = allocator.counts()
    assert len(seen) == len({lease_id for lease_id, _, _ in seen}) == counts["reported"] + counts["failed"]
    rewards_with_gaps = rewards.copy()
    attempts = Counter((group, index) for _, group, index in seen)
    for g, (start, stop) in enumerate(zip(closed.offsets[:-1], closed.offsets[1:], strict=True)):
        row = closed.rewards[start:stop]
        rewards_with_gaps[g, : len(row)][np.isnan(row)] = NAN  # a rollout that failed three times
        np.testing.assert_array_equal(row, rewards_with_gaps[g, : len(row)])
        assert all(1 <= attempts[g, index] <= 3 for index in range(len(row)))
    settled = RolloutAllocator()
    settled.open(np.arange(groups), priors)
    expected = run_to_end(settled, lambda group, index: rewards_with_gaps[group, index])
    np.testing.assert_array_equal(closed.offsets, expected.offsets)


def test_threads_under_thread_sanitizer(tmp_path: Path) -> None:
    if shutil.which("g++") is None:
        pytest.skip("needs g++")
    program = tmp_path / "threads"
    build_with_allocator(Path(__file__).with_name("allocator_threads.cpp"), program, ["-O1", "-g", "-fsanitize=thread"])
    result = subprocess.run([program], capture_output=True, text=True, check=False, env=ENVIRONMENT)
    assert (result.returncode, result.stdout) == (0, "ok\n"), result.stdout + result.stderr
