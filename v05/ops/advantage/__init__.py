"""`fused_advantage` computes the advantages of rollouts and the statistics of their groups from rewards and a value prior.

The arguments are read into three values that have the same names in Python, C++ and Triton: `Rollouts`, `Groups` and `Options`.
CPU tensors go to the C++ core, CUDA tensors to one Triton launch. The arithmetic is in `csrc/include/v05/fusion.hpp` and
`kernels/advantage/fusion.py`. `v05/reference/` specifies both.
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
    refuse_wrong_offsets,
)
from v05.ops.advantage.library import call_operator
from v05.ops.advantage.options import known_options, read_options
from v05.ops.advantage.stats import AdvantageOutput, AdvantageStats

__all__ = ["AdvantageOutput", "AdvantageStats", "factorize", "fused_advantage"]

_VALUELESS = (FakeTensor, FunctionalTensor)  # the types that replace tensors while torch traces


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
    """Compute the advantages of N rollouts in G groups (prompts), and the statistics of each group.

    In the shapes below, N is the number of rollouts, G the number of groups and T the number of tokens of a padded response.
    Rewards, priors, baselines and advantages are in reward units. With rewards in [0, 1] the advantages are half those of the
    V_0.5 paper, whose rewards are -1 and 1.

    Advantages and statistics carry no gradient. Inputs that require a gradient are detached.

    On CUDA values are not inspected, so nothing synchronises as long as all tensors are already on the device. Non-finite rewards
    are excluded and counted. Rewards and priors outside `reward_range` are clipped and counted. Rows whose id names no group are
    excluded. Mask values other than 1 count as 0. Offsets are not checked.

    torch.compile(fullgraph=True) and torch.export accept the call. They see one registered operator, `v05::fused_advantage`,
    which declares that it writes to `out` and checks values when the graph runs. The operator does not cover strings as
    `group_ids`, `process_group`, or a `backend` other than the device's own: these break the graph under torch.compile.

    Args:
        rewards: (N,) outcome rewards of any real dtype with absolute values up to 1e150, or (N, T) token rewards, which are summed
            over `response_mask`. None in a list counts as NaN, a missing reward (see `nonfinite`). All arithmetic is in float64.
            On the CPU an advantage differs from the exact value, before it is rounded to `dtype`, by at most
            (k + 4) 2^-52 max abs(reward) in a group of k, divided by the divisor if there is a scale; "calibrated" adds
            (2 + k / 7) 1e-12 of the reward range. The result has the same bits on any number of threads.
        prior: (G,) predicted mean reward of each group, in reward units. Required by "v05", "prior", "calibrated", "optimal" and
            "ebpo". NaN means that a group has no prior: its mean is used instead, or under "calibrated" and "optimal" the vague
            component of the prior.
        group_ids: (N,) integers in any order, or N strings or other hashable ids of one type, such as UUIDs. Give exactly one of
            `group_ids` and `group_offsets`.
        group_offsets: (G + 1,) integers that rise from 0 to N. Group g has the rows group_offsets[g] .. group_offsets[g + 1] - 1.
        response_mask: (N, T) bool, or 0 and 1 in any real dtype. The advantages then have shape (N, T) and are 0 where the mask is
            0. A rollout whose mask is all 0 still counts in the statistics; exclude it with `valid`.
        cu_seqlens: (N + 1,) integers that rise from 0 to total_tokens, in place of `response_mask`. The advantages are then packed
            and have shape (total_tokens,). Without `response_mask` and `cu_seqlens` they have shape (N,).
        valid: (N,) bool, or integers 0 and 1. False marks an aborted or rejected rollout: it does not count in the statistics, and
            its advantage is 0.
        trajectory_ids: (N,) ids of the same kinds as `group_ids`. Rows of a group with equal ids belong to one trajectory, such as
            the turns of an agent, and count once in the statistics.
        energy: (N,) weights of at least 0, the squared norms of the rollouts' score gradients (`v05.energy`). "otb" and
            "batch_energy" need them. "opo" weighs by response length if they are not given. "optimal" does not read them, because
            its calibration has learnt from the energies of past rollouts.
        num_groups: G. Integer `group_ids` are then the positions 0 .. G-1. Required with integer ids under torch.compile and on
            CUDA, where finding G would synchronise.
        method: a name in `v05.methods.METHODS`.
        scale: the divisor of the advantages. "none": no division. "group": the group's standard deviation + eps. "batch": the
            standard deviation of all valid rewards + eps. Both deviations have ddof = 1, and rewards that are all equal are not
            scaled. "mean": the group's mean, for rewards of at least 0; a group with mean 0 is not scaled. None is the method's
            own scale.
        leave_one_out: compute the baseline of each rollout from the other rollouts of its group.
        reward_range: (lo, hi), which must contain all rewards and priors. Only methods with a prior read it.
        eps: added to the standard deviation, in reward units. With eps = 0 every reward must be 0 or have an absolute value of at
            least 1e-130.
        calibration: how far priors can be trusted and, for "optimal", how the energies of successes and failures differ. Read by
            "calibrated", "optimal" and "ebpo" (only its kappa). `v05.prior.calibration` fits it to past groups. None is
            `Calibration()`, the values to start from.
        singleton: the advantage of a group's only rollout if the method has no other baseline for it: "zero", or "raw" for its
            reward.
        max_rollouts, cost: settings of the budget rule behind `stats.take_more`. A cost of None is 1 / max_rollouts^2 in centred
            units or, for "optimal", the gain from the first rollout of a new prompt (docs/budgets.md).
        nonfinite: "raise" an error for a NaN or infinite reward, or "exclude" the rollout as if valid were False and count it in
            `stats.nonfinite`. On CUDA such rollouts are always excluded.
        stats: False skips the statistics.
        dtype: floating dtype of the advantages.
        out: a contiguous buffer with the shape, dtype and device of the advantages, to write them into. It must not share memory
            with an input. Required with `cu_seqlens` under torch.compile and on CUDA, where finding total_tokens would
            synchronise.
        process_group: the ranks over which groups may be split. Every rank passes its own rollouts, `group_ids` that mean the same
            on all ranks, and the `prior` of its groups. It gets back the advantages of its rollouts and the statistics of its
            groups. With `num_groups` these are all G groups on every rank, and a prior is NaN where the rank has none. The result
            is as if one process had all rollouts in rank order, and error messages number rows in that order. A few bytes per
            rollout are gathered through the host.
        backend: "cpp" or "triton"; None chooses by device. "triton" on CPU tensors needs TRITON_INTERPRET=1.

    Returns:
        `advantages`, and `stats` (None if stats=False) in the order of `prior`: by position with `group_offsets` or `num_groups`,
        otherwise by the first appearance of each id.

    Raises:
        ValueError: an argument is invalid. The message names the argument, the shape or value (with its rows) and the remedy. `out`
            has not been written then, unless the error is a mask value other than 0 and 1. While torch traces, an invalid argument
            breaks the graph, and the eager call that follows raises the error; with fullgraph=True torch raises instead.

    Example:
        >>> rewards = torch.tensor([1.0, 0.0, 0.0, 1.0, 1.0])
        >>> out = fused_advantage(rewards, torch.tensor([0.25, 0.75]), group_offsets=[0, 3, 5])
        >>> out.stats.count.tolist()
        [3, 2]
        >>> out.advantages.tolist()  # both means agree with the priors, so the priors are the baselines
        [0.75, -0.25, -0.25, 0.25, 0.25]

    Source: V_0.5, arXiv 2603.10848, for the fusion and the sequential test. `v05.methods` names the sources of the other methods.
    """
    # isinstance is slow, so the exact type of most tensors is compared first.
    tracing = torch.compiler.is_compiling() or (type(rewards) is not torch.Tensor and isinstance(rewards, _VALUELESS))
    given = (method, scale, leave_one_out, reward_range, eps, singleton, nonfinite, max_rollouts, cost, calibration, stats, dtype)
    try:
        rule, options, stats = read_options(*given) if tracing else known_options(*given)
    except TypeError:  # an option is not hashable, so the cache cannot look it up
        rule, options, stats = read_options(*given)
    if num_groups is not None and not isinstance(num_groups, torch.SymInt):
        num_groups = integer("num_groups", num_groups, 0, MOST_GROUPS)

    tensors = (rewards, response_mask, cu_seqlens, valid, trajectory_ids, energy, dtype, out, tracing)
    if process_group is not None:
        if tracing:
            raise ValueError("process_group: its exchange through the host cannot be traced; call outside torch.compile")
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
            try:
                placed_prior = read_prior(prior, groups.number, device)
            except ValueError:
                refuse_wrong_offsets(groups, rollouts.rewards.shape[0], tracing)  # they give a wrong number of groups
                raise
        elif rule.needs_prior:
            raise ValueError(f"prior: needed by method={rule.name!r}; give (G,) values in reward units")
        if tracing:
            table = call_operator(rollouts, groups, placed_prior, options, advantages, stats)
        else:
            if out is not None:
                refuse_shared_memory(out, rollouts, groups, placed_prior)
            table = compute(rollouts, groups, placed_prior, options, advantages, stats, run)
            if out is not None:  # so that autograd refuses a backward pass through the old values
                torch.autograd.graph.increment_version(out)
    except RuntimeError:  # raised by torch; checking every tensor beforehand would cost more than a small batch's advantages
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
