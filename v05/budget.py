"""`RolloutAllocator` decides how many rollouts each group gets, while their rewards come in.

V_0.5 (arXiv 2603.10848) starts every group with a few rollouts, and its one-step look-ahead test asks for more if the prior and the
rewards disagree. The bookkeeping is in `csrc/allocator/`; this module checks and names the arrays.

    allocator = RolloutAllocator()
    allocator.open(prompt_ids, priors)
    while not allocator.done:
        leases = allocator.lease(256)
        allocator.report(leases.lease_id, generate_and_verify(leases))
    groups = allocator.drain()
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import astuple, dataclass
from typing import Literal, TypeVar, cast

import numpy as np
from numpy.typing import ArrayLike, NDArray

from v05 import _core
from v05.arguments import any_array, array, choice, finite_range, integer, real, shown
from v05.methods import Calibration, known_calibration

RULES = ("osla", "uniform", "calibrated", "variance", "total")
Chunk = int | Literal["look"]
GroupIds = NDArray[np.int64] | NDArray[np.object_]
Scalar = TypeVar("Scalar", np.int64, np.float64)


@dataclass(frozen=True, eq=False)
class Leases:
    """Rollouts to run, all arrays of shape (n,).

    Attributes:
        lease_id: int64, to pass to `report` or `fail`. A retry of a rollout has a new lease id.
        group: the caller's group id, int64 or str (object array).
        index: int64, the rollout's place in its group.
        seed: int64, non-negative; a function of the allocator's seed, the group id and the index only. A group id that is used
            again gets the same seeds again.
    """

    lease_id: NDArray[np.int64]
    group: GroupIds
    index: NDArray[np.int64]
    seed: NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.lease_id)


@dataclass(frozen=True, eq=False)
class ClosedGroups:
    """G closed groups, with all their rollouts, in the order in which they were opened.

    Attributes:
        group_ids: (G,) int64 or str (object array).
        offsets: (G + 1,) int64; the rewards of group g are rewards[offsets[g] : offsets[g + 1]].
        rewards: (offsets[G],) float64, reward units, in index order; NaN for an invalid rollout.
        priors: (G,) float64, reward units, as given to `open`.
    """

    group_ids: GroupIds
    offsets: NDArray[np.int64]
    rewards: NDArray[np.float64]
    priors: NDArray[np.float64]

    def __len__(self) -> int:
        return len(self.group_ids)


class RolloutAllocator:
    """Leases rollouts to the caller and decides, for each group, when it has enough (arXiv 2603.10848, one-step look-ahead).

    A group starts with `initial` rollouts. When all requested rollouts have settled, the rule tests the valid rewards in index
    order, and either closes the group or asks for more rollouts, in chunks. The allocation therefore does not depend on the order
    in which rewards arrive. All methods may be called from several threads.

    Rule "total" compares groups, so here the order matters. When a lease finds neither retries nor initial rollouts, it gives
    `chunk` rollouts to the group with the largest gain (the one opened first, if equal), then to the next, until the lease is full.
    It compares only groups whose rollouts have all settled at that moment; a caller that waits for all reports compares all groups.
    When the total is spent, each group closes as soon as it has settled.

    Args:
        rule: when to ask for more rollouts. "osla": while the estimated squared error of the baseline falls by more than `cost` per
            rollout. "calibrated": while the expected variance of the success rate does, with the prior as calibrated on past
            groups.
            "variance": while the variance of the group's gradient does, under the baseline of method "optimal". "uniform": never.
            "total": until a fixed number for all groups together is spent.
        initial: rollouts of a group before its first test.
        maximum: most rollouts of a group, including invalid ones.
        cost: price of one rollout for rules "osla", "calibrated" and "variance", in centred units squared (rewards scaled to
            [-1, 1]); for rule "variance" times the mean energy of a failure. None is 1 / maximum**2, or for rule "variance" the
            gain by one rollout of a new prompt.
        total: rollouts, without retries, of all groups that are open together, for rule "total". Groups that are opened while none
            is open share a new total.
        chunk: rollouts added per test. 1 is the paper's rule; larger chunks need fewer serial rounds and more rollouts. "look" adds
            at once as many as the rule would ask for if its estimates for the group did not change; not for rule "total".
        seed: int64 from which all rollout seeds are derived.
        reward_range: (lowest, highest) reward and prior, reward units. Values that exceed a bound by float32 rounding are set to
            it.
        calibration: the fit for rules "calibrated" and "variance". Rule "total" uses the gain of "variance" if the calibration has
            learnt energies, of "calibrated" with any other calibration, and of "osla" without one.
        max_attempts: failures and expiries after which a rollout is closed as invalid.

    Raises:
        ValueError: an argument is out of bounds.
    """

    def __init__(
        self,
        *,
        rule: str = "osla",
        initial: int = 4,
        maximum: int = 16,
        cost: float | None = None,
        total: int | None = None,
        chunk: Chunk = 1,
        seed: int = 0,
        reward_range: tuple[float, float] = (0.0, 1.0),
        calibration: Calibration | None = None,
        max_attempts: int = 3,
    ) -> None:
        known = known_calibration(calibration)
        self._core = _core.RolloutAllocator(
            rule=choice("rule", rule, RULES),
            initial=integer("initial", initial),
            maximum=integer("maximum", maximum),
            cost=None if cost is None else real("cost", cost),
            total=None if total is None else integer("total", total),
            chunk=_chunk(chunk),
            seed=integer("seed", seed),
            reward_range=finite_range("reward_range", reward_range),
            calibration=None if known is None else astuple(known),
            max_attempts=integer("max_attempts", max_attempts),
        )

    def open(self, group_ids: ArrayLike | Sequence[str], priors: ArrayLike, counts: ArrayLike | None = None) -> None:
        """Open groups. Their initial rollouts are added to the end of the queue.

        Args:
            group_ids: (G,) int64 or str, the same kind for all groups of an allocator. An id may be used again after its group was
                drained.
            priors: (G,) float64, reward units; NaN means no prior.
            counts: (G,) int64, rollouts of each group before its first test, between `initial` and `maximum` (see
                `predicted_counts`). Those beyond `initial` are leased ahead of new groups. None is `initial` for all groups.

        Raises:
            ValueError: an id repeats or its group is not drained yet, the lengths differ, a count is out of bounds, a prior is
                outside `reward_range`, a dtype does not fit, or the initial rollouts exceed the rest of `total`. No group is
                opened then.
        """
        chosen = np.zeros(0, dtype=np.int64) if counts is None else _vector("counts", counts, np.int64)
        self._core.open(_group_ids(group_ids), _vector("priors", priors, np.float64), chosen)

    def lease(self, n: int) -> Leases:
        """At most `n` rollouts to run: first retries and rollouts of tested groups, then new groups in the order they were opened.

        Raises:
            ValueError: `n` is negative.
        """
        lease_id, group, index, seed = self._core.lease(integer("n", n), _microseconds())
        return Leases(lease_id, _id_array(group), index, seed)

    def report(self, lease_ids: ArrayLike, rewards: ArrayLike) -> None:
        """Settle rollouts with their rewards. The reward of an id that is not leased (duplicate, late or unknown) is ignored, and
        counted.

        Args:
            lease_ids: (n,) int64.
            rewards: (n,) float64, reward units. NaN or None marks an invalid rollout, which tests ignore.

        Raises:
            ValueError: a reward is outside `reward_range`, the lengths differ, or a dtype does not fit. No reward is applied
                then.
        """
        self._core.report(_vector("lease_ids", lease_ids, np.int64), _vector("rewards", rewards, np.float64, none_is_nan=True))

    def fail(self, lease_ids: ArrayLike) -> None:
        """Put failed rollouts back in the queue, with the same group, index and seed under a new lease id.

        After `max_attempts` failures or expiries, a rollout is closed as invalid, and its group continues without it. Ids that are
        not leased are counted as in `report`.

        Args:
            lease_ids: (n,) int64.

        Raises:
            ValueError: the dtype does not fit.
        """
        self._core.fail(_vector("lease_ids", lease_ids, np.int64))

    def expire(self, older_than: float) -> int:
        """Take back leases that are at least `older_than` seconds old, as if they had failed.

        This examines all groups that are not drained; one call every few seconds is enough.

        Returns:
            The number of leases taken back. A later report on one of them counts as late.

        Raises:
            ValueError: `older_than` is negative or NaN.
        """
        return self._core.expire(real("older_than", older_than), _microseconds())

    def would_ask(self, counts: ArrayLike, successes: ArrayLike, priors: ArrayLike) -> NDArray[np.int64]:
        """(n,) int64, the number of rollouts that a test would add to groups with these outcomes; 0 if it would close the group.

        For rules that decide by a group's own rewards: "osla", "calibrated" and "variance". The allocator is not changed.

        Args:
            counts: (n,) int64, rollouts of each group, all settled and valid, at most `maximum`.
            successes: (n,) int64, rollouts with the highest reward; all others have the lowest.
            priors: (n,) float64, reward units; NaN means no prior.

        Raises:
            ValueError: the rule is "uniform" or "total"; a count, a number of successes or a prior is out of bounds; the lengths
                differ; or a dtype does not fit.
        """
        return self._core.would_ask(
            _vector("counts", counts, np.int64), _vector("successes", successes, np.int64), _vector("priors", priors, np.float64)
        )

    @property
    def done(self) -> bool:
        """Whether every opened group is closed, so that nothing is queued or leased."""
        return self._core.done()

    def counts(self) -> dict[str, int]:
        """Statistics of the allocator, at this moment and since it was made.

        At this moment: `open_groups`, `closed_groups` (to be drained), `queued` and `leased` rollouts. Rollouts that rule "total"
        has not given to a group yet are not queued.

        Since it was made: `reported`, `failed` and `expired` leases; `invalid` rollouts, settled without a reward; and ids passed
        to `report` or `fail` that were not leased: `duplicate` (reported before), `late` (failed or expired before, or the group
        was drained) and `unknown` (never leased).
        """
        return self._core.counts()

    def drain(self) -> ClosedGroups:
        """Remove the closed groups from the allocator and return them, in the order in which they were opened."""
        group_ids, offsets, rewards, priors = self._core.drain()
        return ClosedGroups(_id_array(group_ids), offsets, rewards, priors)

    def snapshot(self) -> bytes:
        """The complete state of the allocator, for `restore`. Equal allocators give equal bytes."""
        return self._core.snapshot()

    @classmethod
    def restore(cls, blob: bytes) -> RolloutAllocator:
        """The allocator of a `snapshot`, which continues as the original would.

        Rollouts that were leased at that time are queued again, ahead of all others and in the order their groups were opened,
        because their workers are assumed to be gone. They keep their lease ids and seeds, and it does not count as a failed
        attempt.

        Raises:
            ValueError: `blob` is not a snapshot, has another format, is cut off, damaged or inconsistent.
        """
        restored = cls.__new__(cls)
        restored._core = _core.RolloutAllocator.restore(blob)
        return restored


def predicted_counts(rates: ArrayLike, total: int, lowest: int = 2, highest: int = 128) -> NDArray[np.int64]:
    """V0's budget before any rollout (arXiv 2602.03584): (G,) int64 rollouts of G groups, at most `total` in all.

    The value of a group with B rollouts is B (1 - p) (1 - (1 - p)^(B - 1)). Every group gets `lowest` rollouts. Each further
    rollout goes to the group whose value grows most (the first, if equal) and that has fewer than `highest`. Rollouts that would
    increase no group's value are not given out.

    Args:
        rates: (G,) float64, predicted success rates p in [0, 1]; NaN means no prediction, and counts as 1/2.
        total: most rollouts of all groups together.
        lowest, highest: least and most rollouts of a group.

    Raises:
        ValueError: a rate or a bound is out of bounds, or `total` is less than `lowest` for every group.
    """
    return _core.predicted_counts(
        _vector("rates", rates, np.float64), integer("total", total), integer("lowest", lowest), integer("highest", highest)
    )


def _chunk(chunk: Chunk) -> int | None:
    if isinstance(chunk, str) and chunk != "look":
        raise ValueError(f"chunk={shown(chunk)}; give an integer or 'look'")
    return None if isinstance(chunk, str) else integer("chunk", chunk)


def _microseconds() -> int:
    return time.monotonic_ns() // 1000


def _vector(
    name: str, values: ArrayLike, dtype: type[Scalar], wanted: str = "numbers", none_is_nan: bool = False
) -> NDArray[Scalar]:
    """`values` as a contiguous 1-D array. Raises ValueError unless their dtype converts to `dtype` without loss."""
    given = any_array(name, values)
    if given.dtype.kind == "O":
        given = array(name, given, wanted, none_is_nan)
    if given.ndim != 1:
        raise ValueError(f"{name} has shape {given.shape}; give one dimension")
    if given.size and not np.can_cast(given.dtype, dtype):
        raise ValueError(f"{name} has dtype {given.dtype}; give {np.dtype(dtype)} or a dtype that converts to it without loss")
    return np.ascontiguousarray(given, dtype=dtype)


def _group_ids(group_ids: ArrayLike | Sequence[str]) -> NDArray[np.int64] | list[str]:
    if isinstance(group_ids, str):
        raise ValueError(f"group_ids={group_ids!r} is one string; give a sequence of ids")
    # A list of str must not pass through NumPy's fixed-width strings: they strip trailing NULs.
    if not isinstance(group_ids, Sequence):
        given = any_array("group_ids", group_ids)
        group_ids = given.tolist() if given.dtype.kind in "OUT" and given.ndim == 1 else given
    if isinstance(group_ids, Sequence) and any(isinstance(name, str) for name in group_ids):
        if not all(isinstance(name, str) for name in group_ids):
            raise ValueError("group_ids mix strings and other types; give either strings or integers")
        return _encodable(cast("Sequence[str]", group_ids))
    return _vector("group_ids", group_ids, np.int64, wanted="integers or strings")


def _encodable(names: Sequence[str]) -> list[str]:
    try:
        "".join(names).encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"group_ids: {error.reason} in a string; give strings that UTF-8 can encode") from None
    return list(names)


def _id_array(ids: NDArray[np.int64] | list[str]) -> GroupIds:
    return np.array(ids, dtype=np.object_) if isinstance(ids, list) else ids
