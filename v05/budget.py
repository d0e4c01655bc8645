"""`RolloutAllocator`: how many rollouts each group gets, decided while they come in.

V_0.5 (arXiv 2603.10848) starts every group with a few rollouts and lets the one-step look-ahead test buy more where
the prior and the rewards disagree. The bookkeeping lives in `csrc/allocator/`; here arrays are checked and named.

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
        lease_id: int64, what `report` and `fail` take. A retry of a rollout has a new one.
        group: the caller's id, int64 or str (object array).
        index: int64, the rollout's place in its group.
        seed: int64, non-negative; a function of the allocator's seed, the group id and the index alone. An id that is
            used again gets the same seeds again.
    """

    lease_id: NDArray[np.int64]
    group: GroupIds
    index: NDArray[np.int64]
    seed: NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.lease_id)


@dataclass(frozen=True, eq=False)
class ClosedGroups:
    """G groups that have all their rollouts, in the order they were opened.

    Attributes:
        group_ids: (G,) int64 or str (object array).
        offsets: (G + 1,) int64; the rewards of group g are rewards[offsets[g] : offsets[g + 1]].
        rewards: (offsets[G],) float64, reward units, in index order; NaN where the rollout is invalid.
        priors: (G,) float64, reward units, as given.
    """

    group_ids: GroupIds
    offsets: NDArray[np.int64]
    rewards: NDArray[np.float64]
    priors: NDArray[np.float64]

    def __len__(self) -> int:
        return len(self.group_ids)


class RolloutAllocator:
    """Hands out rollouts and decides, group by group, when there are enough (arXiv 2603.10848, one-step look-ahead).

    A group starts with `initial` rollouts. Once all that were asked for have settled, the rule looks at the valid
    rewards in index order and either closes the group for good or asks for more, in chunks. So the allocation does not
    depend on the order in which rewards arrive. All methods may be called from several threads.

    Rule "total" compares groups, so there order does matter. A lease that finds neither retries nor initial rollouts
    gives `chunk` rollouts to the group whose gain is largest among those that have all theirs settled at that moment
    (the first to be opened, if equal), then to the next, until the lease is full. Leases that wait for all reports
    compare all groups. When the total is spent, groups close as they settle.

    Args:
        rule: "osla" asks for more while the estimated squared error of the baseline falls by more than `cost` per
            rollout; "calibrated" while the expected variance of the success rate does, with the prior as calibrated
            on past groups; "variance" while the variance of the group's gradient does, under the baseline of method "optimal";
            "uniform" never asks for more than `initial`; "total" shares out a fixed number.
        initial: rollouts of a group before its first test.
        maximum: most rollouts of a group, invalid ones included.
        cost: of one rollout, centred units squared (rewards scaled to [-1, 1]), for rule "variance" with the mean energy of a
            failure as the unit of energies. None is 1 / maximum**2 or, of rule "variance", what a rollout of a fresh prompt
            brings. Rules "osla", "calibrated", "variance".
        total: rollouts, retries not counted, of all groups that are open together; groups opened when none is open
            share a new total. Rule "total".
        chunk: rollouts added at a time. 1 is the paper's rule; more of them trade rollouts for fewer serial rounds. "look" adds at
            once as many as the rule would take if what it estimates of the group stayed as it is; not for rule "total".
        seed: int64 that all rollout seeds derive from.
        reward_range: (lowest, highest) of rewards and priors, reward units; what float32 rounding took past a bound is the bound.
        calibration: for rules "calibrated" and "variance". Rule "total" shares out by the gain of "variance" with one that has
            learnt energies, by that of "calibrated" with another, by osla's without one.
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
        """Open groups; their initial rollouts join the end of the queue.

        Args:
            group_ids: (G,) int64, or str; one kind per allocator. An id may be used again once its group was drained.
            priors: (G,) float64, reward units; NaN is no prior.
            counts: (G,) int64 rollouts, `initial` to `maximum`, before the first test of each group (see `predicted_counts`); those
                beyond `initial` are leased as extra ones are, ahead of new groups. None is `initial` for all.

        Raises:
            ValueError: an id repeats or its group is not drained yet, the lengths differ, a count is out of bounds, a prior is
                outside `reward_range`, a dtype does not fit, the initial rollouts are more than is left of `total`. No group is
                opened then.
        """
        chosen = np.zeros(0, dtype=np.int64) if counts is None else _vector("counts", counts, np.int64)
        self._core.open(_group_ids(group_ids), _vector("priors", priors, np.float64), chosen)

    def lease(self, n: int) -> Leases:
        """At most `n` rollouts to run: those of tested groups and retries first, then new groups in open order.

        Raises:
            ValueError: `n` is negative.
        """
        lease_id, group, index, seed = self._core.lease(integer("n", n), _microseconds())
        return Leases(lease_id, _id_array(group), index, seed)

    def report(self, lease_ids: ArrayLike, rewards: ArrayLike) -> None:
        """Settle rollouts. An id that is not out (duplicate, late, unknown) is counted and its reward is not applied.

        Args:
            lease_ids: (n,) int64.
            rewards: (n,) float64, reward units; NaN or None marks an invalid rollout, which the test leaves out.

        Raises:
            ValueError: a reward is outside `reward_range`, the lengths differ, a dtype does not fit. Nothing is applied
                then.
        """
        self._core.report(_vector("lease_ids", lease_ids, np.int64), _vector("rewards", rewards, np.float64, none_is_nan=True))

    def fail(self, lease_ids: ArrayLike) -> None:
        """Put rollouts back in the queue: same group, index and seed under a new lease id.

        After `max_attempts` failures or expiries a rollout is closed as invalid and its group goes on without it. Ids that are not
        out are counted as in `report`.

        Args:
            lease_ids: (n,) int64.

        Raises:
            ValueError: the dtype does not fit.
        """
        self._core.fail(_vector("lease_ids", lease_ids, np.int64))

    def expire(self, older_than: float) -> int:
        """Take back leases that have been out for `older_than` seconds or longer, as if they had failed.

        Looks at all groups that are not drained; a call every few seconds is often enough.

        Returns:
            How many leases were taken back. A report on one of them comes late.

        Raises:
            ValueError: `older_than` is negative or NaN.
        """
        return self._core.expire(real("older_than", older_than), _microseconds())

    def would_ask(self, counts: ArrayLike, successes: ArrayLike, priors: ArrayLike) -> NDArray[np.int64]:
        """(n,) how many rollouts would be added at once to groups with these outcomes; 0 where the group would be closed.

        For the rules that decide by a group's own rewards: "osla", "calibrated" and "variance". Nothing changes.

        Args:
            counts: (n,) int64 rollouts of a group, all settled and valid, at most `maximum`.
            successes: (n,) int64 of them that have the highest reward; the others have the lowest.
            priors: (n,) float64, reward units; NaN is no prior.

        Raises:
            ValueError: the rule is another; a count, a number of successes or a prior is out of bounds, the lengths differ, a dtype
                does not fit.
        """
        return self._core.would_ask(
            _vector("counts", counts, np.int64), _vector("successes", successes, np.int64), _vector("priors", priors, np.float64)
        )

    @property
    def done(self) -> bool:
        """Every opened group is closed: nothing is queued and nothing is out."""
        return self._core.done()

    def counts(self) -> dict[str, int]:
        """What the allocator holds now and has seen since it was made.

        Now: `open_groups`, `closed_groups` (to be drained), `queued` and `leased` rollouts. What rule "total" has not
        given to a group yet is not queued.
        Since it was made: `reported`, `failed` and `expired` leases; `invalid` rollouts, settled without a reward; and
        ids given to `report` or `fail` that were not out: `duplicate` (reported before), `late` (failed or expired
        before, or the group was drained), `unknown` (never handed out).
        """
        return self._core.counts()

    def drain(self) -> ClosedGroups:
        """Take the closed groups, in open order. The allocator forgets them."""
        group_ids, offsets, rewards, priors = self._core.drain()
        return ClosedGroups(_id_array(group_ids), offsets, rewards, priors)

    def snapshot(self) -> bytes:
        """All of the allocator, for `restore`. Equal allocators give equal bytes."""
        return self._core.snapshot()

    @classmethod
    def restore(cls, blob: bytes) -> RolloutAllocator:
        """The allocator of a `snapshot`, which goes on as the original would.

        What was leased then is queued again, ahead of all else and in open order: its workers are taken to be gone. No
        attempt is lost by it, and its lease ids and seeds are those of before.

        Raises:
            ValueError: `blob` is not a snapshot, is of another format, cut off, damaged or contradictory.
        """
        restored = cls.__new__(cls)
        restored._core = _core.RolloutAllocator.restore(blob)
        return restored


def predicted_counts(rates: ArrayLike, total: int, lowest: int = 2, highest: int = 128) -> NDArray[np.int64]:
    """V0's budget before any rollout (arXiv 2602.03584): (G,) int64 rollouts of G groups, at most `total` in all.

    A group of B rollouts is worth B (1 - p) (1 - (1 - p)^(B - 1)). Every group has `lowest`; the next rollout goes to the group
    whose worth grows most, the first if equal, and none has more than `highest`. What would add to no group's worth is left.

    Args:
        rates: (G,) float64 predicted success rates p in [0, 1]; NaN, no prediction, counts as 1/2.

    Raises:
        ValueError: a rate or a bound is out of bounds, `total` does not hold `lowest` rollouts for each group.
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
    """`values` as a contiguous 1-D array; a ValueError unless their dtype converts to `dtype` without loss."""
    given = any_array(name, values)
    if given.dtype.kind == "O":
        given = array(name, given, wanted, none_is_nan)
    if given.ndim != 1:
        raise ValueError(f"{name} has shape {given.shape}; give one dimension")
    if given.size and not np.can_cast(given.dtype, dtype):
        raise ValueError(f"{name} has dtype {given.dtype}; give {np.dtype(dtype)} or what converts to it without loss")
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
            raise ValueError("group_ids mix strings and other types; an allocator keeps to the kind it was first given")
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
