"""Unbiased advantages for groups whose size depended on their own rewards.

A budget rule that stops when the rewards agree favours agreement. The mean of such a group is biased, and so is its policy
gradient, even with leave-one-out. The gradient of only the first `initial` rollouts, leave-one-out among themselves, is unbiased,
because their number is fixed, but it discards the other rollouts. Path counting averages that gradient over all orders of the
group's rewards under which the rule would have stopped at the same point. The average is still unbiased, uses every rollout and has
less noise (Rao-Blackwell; for a mean: Girshick, Mosteller & Savage 1946). The orders are counted as paths on the lattice of
(rollouts, successes). docs/calibrated.md has figures.
"""

from __future__ import annotations

from math import comb

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray

from v05.arguments import array, finite_range, integer
from v05.budget import Chunk, RolloutAllocator
from v05.methods import METHODS, Calibration, find_method
from v05.ops import fused_advantage


def path_counting_advantages(
    rewards: ArrayLike,
    prior: ArrayLike,
    group_offsets: ArrayLike,
    *,
    method: str,
    initial: int,
    maximum: int,
    cost: float | None = None,
    chunk: Chunk = 1,
    calibration: Calibration | None = None,
    reward_range: tuple[float, float] = (0.0, 1.0),
) -> torch.Tensor:
    """Compute advantages that give an unbiased policy gradient for groups that a budget rule stopped early.

    Average advantage times score within each group, then over groups.

    Args:
        rewards: (N,) rewards, each of them lo or hi of `reward_range`. The rollouts of a group are contiguous.
        prior: (G,) priors in reward units; NaN means no prior.
        group_offsets: (G + 1,) integers that rise from 0 to N.
        method: the method for the baselines, which must match the rule that stopped the groups: "v05" for "osla", "calibrated" for
            "calibrated", "optimal" for "variance".
        initial, maximum, cost, chunk, calibration: the settings of the `RolloutAllocator` that sampled the groups.
        reward_range: (lo, hi).

    Returns:
        (N,) float64 advantages in reward units, on the CPU.

    Raises:
        ValueError: a reward is neither lo nor hi, the method has no rule of its own, a group's size and successes are not where the
            rule stops, a shape is wrong, or a prior is outside `reward_range`.
    """
    rule = find_method(method)
    if not rule.counts_paths:
        counted = ", ".join(name for name, other in METHODS.items() if other.counts_paths)
        raise ValueError(f"method={method!r} has no stopping rule of its own; give one of {counted}")
    low, high = finite_range("reward_range", reward_range)
    initial, maximum = integer("initial", initial), integer("maximum", maximum)
    r, v = array("rewards", rewards).astype(np.float64), array("prior", prior).astype(np.float64)
    offsets = array("group_offsets", group_offsets, wanted="integers")
    if offsets.size and offsets.dtype.kind not in "iu":
        raise ValueError(f"group_offsets: dtype {offsets.dtype}; give integers")
    offsets = offsets.astype(np.int64)
    if (
        r.ndim != 1
        or offsets.ndim != 1
        or not len(offsets)
        or offsets[0] != 0
        or offsets[-1] != len(r)
        or (np.diff(offsets) < 0).any()
    ):
        raise ValueError(
            f"group_offsets={offsets.tolist()[:8]} do not rise from 0 to the length of rewards, shaped {r.shape}; give (G + 1,)"
        )
    if v.shape != (len(offsets) - 1,):
        raise ValueError(f"prior has shape {v.shape}, but group_offsets has {len(offsets) - 1} groups; give one prior a group")
    if outside := np.flatnonzero((v < low) | (v > high)).tolist():
        raise ValueError(f"prior[{outside[0]}]={v[outside[0]]} is outside reward_range={reward_range}; give it in reward units")
    if not np.isin(r, (low, high)).all():
        row = int(np.flatnonzero(~np.isin(r, (low, high)))[0])
        raise ValueError(f"rewards[{row}]={r[row]} is neither {low} nor {high}; paths are counted only for these two rewards")
    if not len(v):
        return torch.zeros(0, dtype=torch.float64, device="cpu")
    succeeds = r == high
    size = np.diff(offsets)
    successes = np.diff(np.concatenate([[0], np.cumsum(succeeds)])[offsets])
    of_success, of_failure = advantages_of_outcomes(
        v,
        size,
        successes,
        method=method,
        initial=initial,
        maximum=maximum,
        cost=cost,
        chunk=chunk,
        calibration=calibration,
        reward_range=(low, high),
    )
    stopped = ~np.isnan(of_success)
    if not stopped.all():
        g = int(np.flatnonzero(~stopped)[0])
        raise ValueError(
            f"group {g}: the rule does not stop at {size[g]} rollouts with {successes[g]} successes; "
            "give initial, maximum, cost, chunk and calibration as they were when it was sampled"
        )
    return torch.from_numpy(np.where(succeeds, np.repeat(of_success, size), np.repeat(of_failure, size)))


def advantages_of_outcomes(
    prior: NDArray[np.float64],
    sizes: NDArray[np.int64],
    successes: NDArray[np.int64],
    *,
    method: str,
    initial: int,
    maximum: int,
    cost: float | None,
    chunk: Chunk,
    calibration: Calibration | None,
    reward_range: tuple[float, float],
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """The (G,) advantages of a success and the (G,) advantages of a failure, reward units, by path counting.

    They are NaN if no path leads to such a group or the rule would not have stopped there.

    Args:
        prior: (G,) reward units.
        sizes, successes: (G,) numbers of rollouts and of successes.
        others: as in `path_counting_advantages`.
    """
    allocator = RolloutAllocator(
        rule=find_method(method).budget_rule or "uniform",
        initial=initial,
        maximum=maximum,
        cost=cost,
        chunk=chunk,
        reward_range=reward_range,
        calibration=(calibration or Calibration()) if find_method(method).reads_calibration else None,
    )
    block = _block(prior, initial, method=method, calibration=calibration, reward_range=reward_range)
    weights = count_paths(_asked(allocator, prior, initial, maximum), *block, initial)
    inside = (sizes >= initial) & (sizes <= maximum)
    group, size, count = np.arange(len(sizes)), np.where(inside, sizes, 0), np.where(inside, successes, 0)
    of_success, of_failure = np.where(inside, weights[:, group, size, count], np.nan)
    return of_success, of_failure


def count_paths(
    asked: NDArray[np.integer | np.bool_], of_success: NDArray[np.float64], of_failure: NDArray[np.float64], initial: int
) -> NDArray[np.float64]:
    """The (2, G, K + 1, K + 1) advantages of a success and of a failure in a group that stopped at k rollouts with x successes.

    They are NaN where the rule does not stop, and where no path leads to (k, x).

    Args:
        asked: (G, K + 1, K + 1), how many rollouts the rule adds at (k, x), at most K - k.
        of_success, of_failure: (G, initial + 1) leave-one-out advantages among `initial` rollouts with x successes.
    """
    groups, rows, _ = asked.shape
    x = np.arange(initial + 1)
    paths = np.array([comb(initial, int(successes)) for successes in x], dtype=np.float64)
    # First axis: rollouts until the next test. Second axis: the number of paths to (k, x), and the sums over these paths of the
    # successes' and of the failures' part in the mean advantage of the first `initial` rollouts.
    under_way = np.zeros((rows - initial, 3, groups, rows))
    under_way[0, 0, :, : initial + 1] = paths
    under_way[0, 1, :, : initial + 1] = paths * np.where(x > 0, x * of_success, 0.0) / initial
    under_way[0, 2, :, : initial + 1] = paths * np.where(x < initial, (initial - x) * of_failure, 0.0) / initial
    tested = np.zeros((3, groups, rows, rows))
    for k in range(initial, rows):
        tested[:, :, k] = under_way[0]
        for more in range(1, len(under_way)):
            under_way[more] += np.where(asked[:, k] == more, under_way[0], 0.0)
        under_way = under_way[1:]
        under_way[..., 1:] += under_way[..., :-1].copy()  # a path goes on to x + 1 (a success) or stays at x (a failure)
    sizes, successes = np.indices((rows, rows))
    reached = (tested[0] > 0) & (asked == 0)
    with np.errstate(divide="ignore", invalid="ignore"):
        block = np.where(reached, tested[1:] / tested[0], np.nan)  # averages over the paths
        shared_out = np.stack([block[0] * sizes / np.maximum(successes, 1), block[1] * sizes / np.maximum(sizes - successes, 1)])
    return shared_out


def _asked(allocator: RolloutAllocator, prior: NDArray[np.float64], initial: int, maximum: int) -> NDArray[np.int64]:
    """(G, K + 1, K + 1), how many rollouts the allocator adds to a group at (k, x), for k from initial to maximum."""
    sizes, successes = np.array([(k, x) for k in range(initial, maximum + 1) for x in range(k + 1)]).T
    asked = np.zeros((len(prior), maximum + 1, maximum + 1), dtype=np.int64)
    found = allocator.would_ask(np.tile(sizes, len(prior)), np.tile(successes, len(prior)), np.repeat(prior, len(sizes)))
    asked[:, sizes, successes] = found.reshape(len(prior), -1)
    return asked


def _block(
    prior: NDArray[np.float64], initial: int, *, method: str, calibration: Calibration | None, reward_range: tuple[float, float]
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """The (G, initial + 1) leave-one-out advantages of a success and of a failure among `initial` rollouts with x successes."""
    low, high = reward_range
    template = np.concatenate([np.repeat((high, low), (x, initial - x)) for x in range(initial + 1)])
    groups = len(prior) * (initial + 1)
    of_block = fused_advantage(
        np.tile(template, len(prior)),
        np.repeat(prior, initial + 1),
        group_offsets=np.arange(groups + 1) * initial,
        method=method,
        leave_one_out=True,
        reward_range=reward_range,
        calibration=calibration,
        dtype=torch.float64,
    ).advantages.numpy()
    by_rollout = of_block.reshape(len(prior), initial + 1, initial)
    return by_rollout[:, :, 0], by_rollout[:, :, -1]
