"""Types of the compiled core. Private: use `v05.ops` and `v05.budget`."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

def number_ids(ids: NDArray[np.int64]) -> tuple[NDArray[np.int64], int]: ...
def order_rows(ids: NDArray[np.int64], num_groups: int, start: int) -> NDArray[np.int64]: ...
def are_strings(name: str, keys: Sequence[object] | NDArray[np.object_]) -> bool: ...
def factorize(keys: Sequence[object] | NDArray[np.object_]) -> tuple[NDArray[np.int64], int]: ...
def check_offsets(name: str, offsets: NDArray[np.int64], end: int | None) -> None: ...
def check_mask(mask: int, dtype: int, rows: int, size: int) -> None: ...

STATISTICS: list[str]

class Options:
    def __init__(
        self,
        *,
        baseline: int,
        scale: int,
        leave_one_out: bool,
        raw_singleton: bool,
        exclude_nonfinite: bool,
        low: float,
        high: float,
        eps: float,
        max_rollouts: int,
        cost: float,
        calibration: Sequence[float],
    ) -> None: ...

def compute_advantages(
    rollouts: tuple[int, bool, int, int, int | None, int, int | None, int | None, int | None, int | None],
    groups: tuple[int, int | None, int | None],
    prior: int | None,
    options: Options,
    out: tuple[int, int, int],
    table: int | None,
    threads: int,
    /,
) -> None: ...
def add_up_logits(
    logits: tuple[int, int, int, int], targets: tuple[int, int, int, int, float], out: int, stride: int, threads: int, /
) -> None: ...
def write_logit_gradient(
    logits: tuple[int, int, int, int],
    targets: tuple[int, int, int, int, float],
    state: int,
    stride: int,
    of_logprob: int,
    of_entropy: int | None,
    out: tuple[int, int, int, int],
    threads: int,
    /,
) -> None: ...
def build_info() -> dict[str, str | bool]: ...

class RolloutAllocator:
    def __init__(
        self,
        *,
        rule: str,
        initial: int,
        maximum: int,
        cost: float | None,
        total: int | None,
        chunk: int | None,
        seed: int,
        reward_range: tuple[float, float],
        calibration: tuple[float, float, float, float, float, float] | None,
        max_attempts: int,
    ) -> None: ...
    def open(self, group_ids: NDArray[np.int64] | list[str], priors: NDArray[np.float64], counts: NDArray[np.int64]) -> None: ...
    def lease(
        self, limit: int, now: int
    ) -> tuple[NDArray[np.int64], NDArray[np.int64] | list[str], NDArray[np.int64], NDArray[np.int64]]: ...
    def report(self, lease_ids: NDArray[np.int64], rewards: NDArray[np.float64]) -> None: ...
    def fail(self, lease_ids: NDArray[np.int64]) -> None: ...
    def expire(self, older_than: float, now: int) -> int: ...
    def would_ask(
        self, counts: NDArray[np.int64], successes: NDArray[np.int64], priors: NDArray[np.float64]
    ) -> NDArray[np.int64]: ...
    def done(self) -> bool: ...
    def counts(self) -> dict[str, int]: ...
    def drain(
        self,
    ) -> tuple[NDArray[np.int64] | list[str], NDArray[np.int64], NDArray[np.float64], NDArray[np.float64]]: ...
    def snapshot(self) -> bytes: ...
    @staticmethod
    def restore(blob: bytes) -> RolloutAllocator: ...

def predicted_counts(rates: NDArray[np.float64], total: int, lowest: int, highest: int) -> NDArray[np.int64]: ...
def calibrated(
    count: int, successes: float, prior: float, calibration: tuple[float, float, float, float, float, float]
) -> tuple[float, float, float, float, float]: ...
