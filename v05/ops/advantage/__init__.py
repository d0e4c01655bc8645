"""`fused_advantage`: rewards and a value prior in, advantages and group statistics out, in one call.

What is given becomes three values, under the same names in Python, C++ and Triton: `Rollouts`, `Groups` and `Options`. CPU tensors
go to the C++ core, CUDA tensors to one Triton launch. The arithmetic lives in `csrc/include/v05/fusion.hpp` and
`kernels/advantage/fusion.py`; `v05/reference/` specifies both.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
import torch.distributed as dist
from torch._subclasses.fake_tensor import FakeTensor
from torch._subclasses.functional_tensor import FunctionalTensor

from v05.arguments import integer
from v05.methods import Calibration, Scale
from v05.ops.advantage.backends import backend_for
from v05.ops.advantage.compute import compute
from v05.ops.advantage.distributed import across_ranks
from v05.ops.advantage.inputs import (
    MOST_GROUPS,
    Array,
    energy_for,
    factorize,
    read_groups,
    read_prior,
    read_rollouts,
    refuse_shared_memory,
    refuse_unreadable,
)
from v05.ops.advantage.library import call_operator
from v05.ops.advantage.options import known_options, read_options
from v05.ops.advantage.stats import AdvantageOutput, AdvantageStats

__all__ = ["AdvantageOutput", "AdvantageStats", "factorize", "fused_advantage"]

_VALUELESS = (FakeTensor, FunctionalTensor)  # what stands for tensors while torch traces


def fused_advantage(
    rewards: Array,
    prior: Array | None = None,
    *,
    group_ids: Array | Sequence[str] | None = None,
    group_offsets: Array | None = None,
    response_mask: Array | None = None,
    cu_seqlens: Array | None = None,
    valid: Array | None = None,
    trajectory_ids: Array | None = None,
    energy: Array | None = None,
    num_groups: int | None = None,
    method: str = "v05",
    scale: Scale | None = None,
    leave_one_out: bool = False,
    reward_range: tuple[float, float] = (0.0, 1.0),
    eps: float = 1e-6,
    singleton: Literal["zero", "raw"] = "zero",
    calibration: Calibration | None = None,
    max_rollouts: int = 16,
    cost: float | None = None,
    nonfinite: Literal["raise", "exclude"] = "raise",
    stats: bool = True,
    dtype: torch.dtype = torch.float32,
    out: torch.Tensor | None = None,
    process_group: dist.ProcessGroup | None = None,
    backend: Literal["cpp", "triton"] | None = None,
) -> AdvantageOutput:
    """Advantages of N rollouts in G groups (prompts), and the statistics of each group.

    N rollouts, G groups, T tokens of a padded response. Rewards, priors, baselines and advantages are in reward units; with
    rewards in (0, 1) the advantages are half those of the V_0.5 paper, whose rewards are +-1.

    Advantages and statistics carry no gradient: inputs that require one are detached.

    torch.compile(fullgraph=True) and torch.export take the call whole, as the registered operator
    `v05::fused_advantage`, with `out` as a declared mutation; values are then checked when the graph runs. Strings as `group_ids`,
    `process_group` and a `backend` that is not the device's own stay eager: under torch.compile they break the graph.

    Args:
        rewards: (N,) outcome rewards of any real dtype, at most 1e150 in size, or (N, T) token rewards, which are summed over
            `response_mask`. None is NaN, no reward. All arithmetic is float64 (half precision widens exactly): on the CPU an
            advantage is the exact one of these rewards, rounded to `dtype`, up to (k + 4) 2^-52 max abs(reward) in a group of k
            (over the divisor, under a scale), to which "calibrated" adds (2 + k / 7) 1e-12 of the reward range; the same bits on
            any thread count.
        prior: (G,) predicted mean reward of each group, in reward units; NaN where there is none, and the group mean then
            stands in (of "calibrated", its vague prior). Needed by "v05", "prior", "calibrated", "optimal" and "ebpo".
        group_ids: (N,) integers in any order, or N strings or other ids of one kind that can be hashed, such as UUIDs. Exactly one
            of `group_ids` and `group_offsets`.
        group_offsets: (G+1,) integers from 0 to N: the rollouts of group g are rows offsets[g] .. offsets[g+1] - 1.
        response_mask: (N, T) of bool, or of 0 and 1 in any real dtype: advantages come back (N, T), zero where the mask is zero. A
            row of zeros keeps counting in the statistics; `valid` leaves it out.
        cu_seqlens: (N+1,) integers from 0 to total_tokens: advantages come back packed, (total_tokens,). With neither of the
            two they come back (N,).
        valid: (N,) bool, or integers 0 and 1; False marks an aborted or rejected rollout: left out of the statistics, advantage 0.
        trajectory_ids: (N,) ids as `group_ids` are; rows of a group that share one are one trajectory and count once in the
            statistics.
        energy: (N,) weights of at least 0, squared score norms (`v05.energy`); read by the methods that weigh rollouts by them
            ("otb", "batch_energy", and "opo", whose weights are the lengths of the responses where none are given). "optimal" does
            not read them: its calibration has learnt from those of past rollouts.
        num_groups: G. With integer `group_ids` the ids are then 0 .. G-1 themselves; required with them on CUDA, where
            finding G would synchronise, and under torch.compile.
        method: a name of `v05.methods.METHODS`.
        scale: divide by nothing ("none"), by the group's standard deviation + eps ("group") or that of all valid rewards
            ("batch"), ddof = 1; rewards that are all equal are not scaled; or by the group's mean ("mean", for rewards of at least
            0; a mean of 0 divides nothing). None takes the method's own.
        leave_one_out: the baseline of a rollout is computed from the group's other rollouts.
        reward_range: (lo, hi) that holds rewards and priors; read by the methods with a prior.
        eps: added to the standard deviation, reward units. With 0 every reward is 0 or at least 1e-130 in size.
        calibration: how far priors are to be trusted, and for "optimal" what energies successes and failures have; read by
            "calibrated", "optimal" and "ebpo" (its kappa alone); `v05.prior.calibration` fits it to past groups. None is
            `Calibration()`, for before there are any.
        singleton: advantage of a group's only rollout when nothing but itself could be its baseline: "zero" or its "raw" reward.
        max_rollouts, cost: of the budget rule behind `stats.take_more`; cost None is 1 / max_rollouts^2 (centred units) and, of
            "optimal", what a rollout of a fresh prompt brings (docs/budgets.md).
        nonfinite: what a NaN or infinite reward does: "raise", or "exclude" it like valid=False and count it. CUDA always
            excludes.
        stats: False skips the statistics.
        dtype: floating dtype of the advantages.
        out: a contiguous buffer of the output's shape, dtype and device, apart from what is read, to write into; required with
            cu_seqlens on CUDA, where finding total_tokens would synchronise, and under torch.compile.
        process_group: groups may be split over its ranks: every rank passes its own rollouts, with `group_ids` that mean the same
            on all ranks and the `prior` of its own groups (with `num_groups`: of all groups, NaN where it knows none), and gets
            its own rows and groups back. The result is that of one process on the ranks' rollouts in rank order, rows in error
            messages are counted so. Gathers a few bytes a rollout through the host.
        backend: "cpp" or "triton"; None goes by device. "triton" on CPU tensors needs TRITON_INTERPRET=1.

    Returns:
        `advantages`, and `stats` ordered like `prior`: by group_offsets, by id when `num_groups` is given, else by the first
        appearance of the id.

    Raises:
        ValueError: names the argument, the shape or value seen (rows, for values) and the remedy; `out` is then untouched, unless
            it is a mask that holds more than 0 and 1. On CUDA values are not inspected: non-finite rewards are left out, rewards
            and priors outside `reward_range` clipped, both counted; rows whose id names no group are left out; a token whose mask
            is neither 0 nor 1 counts as 0; offsets are trusted. Nothing synchronises
            there as long as every tensor given is already on the device. While torch traces, what would raise here breaks
            the graph, and is raised by the eager call that follows unless fullgraph=True forbids it.

    Example:
        >>> rewards = torch.tensor([1.0, 0.0, 0.0, 1.0, 1.0])
        >>> out = fused_advantage(rewards, torch.tensor([0.25, 0.75]), group_offsets=[0, 3, 5])
        >>> out.stats.count.tolist()
        [3, 2]
        >>> out.advantages.tolist()  # both means agree with their priors, which therefore stand as baselines
        [0.75, -0.25, -0.25, 0.25, 0.25]

    Source: V_0.5, arXiv 2603.10848 (fusion, sequential test); the other methods as named in `v05.methods`.
    """
    # The type of most tensors is compared first, which costs less than to ask for the others'.
    tracing = torch.compiler.is_compiling() or (type(rewards) is not torch.Tensor and isinstance(rewards, _VALUELESS))
    given = (method, scale, leave_one_out, reward_range, eps, singleton, nonfinite, max_rollouts, cost, calibration, stats, dtype)
    try:
        rule, options, stats = read_options(*given) if tracing else known_options(*given)
    except TypeError:  # one cannot be hashed
        rule, options, stats = read_options(*given)
    if num_groups is not None and not isinstance(num_groups, torch.SymInt):
        num_groups = integer("num_groups", num_groups, 0, MOST_GROUPS)

    tensors = (rewards, response_mask, cu_seqlens, valid, trajectory_ids, energy, dtype, out, tracing)
    if process_group is not None:
        if tracing:
            raise ValueError("process_group: gathers through the host, which torch cannot trace; call outside torch.compile")
        of_rank = (prior, group_ids, group_offsets, num_groups, rule, options, backend)
        advantages, statistics = across_ranks(process_group, tensors, *of_rank)
        return AdvantageOutput(advantages, statistics if stats else None)
    placed_prior = None
    try:
        rollouts, advantages = read_rollouts(*tensors)
        if rule.weight is not None or energy is not None:
            rollouts = rollouts._replace(energy=energy_for(rule, rollouts))
        device = rollouts.rewards.device
        run = backend_for(backend, device, tracing)
        groups = read_groups(group_ids, group_offsets, num_groups, rollouts.rewards.shape[0], device, tracing)
        if prior is not None:
            placed_prior = read_prior(prior, groups.number, device)
        elif rule.needs_prior:
            raise ValueError(f"prior: needed by method={rule.name!r}; give (G,) values in reward units")
        if tracing:
            table = call_operator(rollouts, groups, placed_prior, options, advantages, stats)
        else:
            if out is not None:
                refuse_shared_memory(out, rollouts, groups, placed_prior)
            table = compute(rollouts, groups, placed_prior, options, advantages, stats, run)
            if out is not None:  # autograd refuses a backward through what was overwritten
                torch.autograd.graph.increment_version(out)
    except RuntimeError:  # torch's own; to ask every tensor before would cost more than the advantages of a small batch
        refuse_unreadable(
            rewards=rewards,
            prior=prior,
            group_ids=group_ids,
            group_offsets=group_offsets,
            response_mask=response_mask,
            cu_seqlens=cu_seqlens,
            valid=valid,
            trajectory_ids=trajectory_ids,
            energy=energy,
            out=out,
        )
        raise
    return AdvantageOutput(advantages, AdvantageStats(placed_prior, table, options.baseline) if stats else None)
