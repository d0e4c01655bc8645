"""`fused_advantage`: rewards and a value prior in, advantages and group statistics out, in one call.

This file validates, groups and dispatches: CPU tensors go to the C++ core, CUDA tensors to one Triton launch. The arithmetic
lives in `csrc/include/v05/fusion.hpp` and `kernels/fusion.py`; `v05/reference.py` specifies both.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Any, Literal, NamedTuple, cast

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import ArrayLike, NDArray
from torch._C import _functorch
from torch._subclasses.fake_tensor import FakeTensor
from torch._subclasses.functional_tensor import FunctionalTensor

from v05 import _core
from v05.arguments import any_array, array, choice, finite_range, flag, integer, nonnegative, shown
from v05.methods import Baseline, Calibration, Method, Scale, find_method, known_calibration

_VALUELESS = (FakeTensor, FunctionalTensor)  # what stands for tensors while torch traces

SCALES: tuple[Scale, ...] = ("none", "group", "batch")  # positions are shared with advantage.hpp and kernels/advantage.py

# Rows of `AdvantageStats.table`, by what the method subtracts; their order is shared with bindings/advantage.cpp and
# kernels/advantage.py.
COMMON_ROWS = 6  # methods that define no more have no budget rule either
TABLE_ROWS: dict[int, int] = {
    Baseline.GROUP_MEAN: COMMON_ROWS,
    Baseline.PRIOR: COMMON_ROWS,
    Baseline.SHRINKAGE: 11,
    Baseline.CALIBRATED: 9,
}
DEFAULT_CALIBRATION = Calibration()
MOST_GROUPS = 2**31 - 1  # whose statistics take 190 GB
_NUMPY_DTYPES = {torch.float32: np.float32, torch.float64: np.float64}

Array = torch.Tensor | ArrayLike
_Kernel = Callable[..., torch.Tensor]


@dataclass(frozen=True, slots=True)
class AdvantageStats:
    """Statistics of each group, tensors of shape (G,); None where the method does not define one.

    They describe the full group, also under `leave_one_out`. A group without a valid rollout has count 0, mean NaN and the
    prior as its baseline. All but the prior are made of `table` when they are asked for: a tensor for each of them at each
    call would cost more than the statistics of a small batch.

    Attributes:
        count: int64, valid rollouts (trajectories) of the group.
        mean: float64, reward units.
        var: float64, reward units squared, ddof = 1; 0 for a single rollout.
        prior: float64, reward units, as given; None without a prior.
        baseline: float64, reward units.
        mse: float64, reward units squared, of the baseline: v05's plug-in estimate, or the variance of calibrated's posterior.
        weight: float64 in [0, 1], what the group mean weighs against the prior (v05).
        statistic: float64, T = k d^2 of the test "the prior is right"; it stands while T <= 1. NaN without a prior (v05).
        p_value: float64, of T under chi-square with one degree of freedom; a diagnostic (v05).
        hallucination: float64 in [0, 1], probability that the prior says nothing of this group (calibrated).
        take_more: bool, the method's budget rule would buy another rollout: v05's one-step look-ahead, or calibrated's gain.
        nonfinite: int64, NaN or infinite rewards of the group, left out.
        clipped: int64, rewards and priors of the group clipped to `reward_range` (CUDA only; on the CPU they are an error).
        table: float64, (6, G): count, nonfinite, clipped, mean, var, baseline; of v05 (11, G), with mse, weight, statistic,
            p_value, take_more after them; of calibrated (9, G), with mse, hallucination, take_more.
    """

    prior: torch.Tensor | None
    table: torch.Tensor

    @property
    def count(self) -> torch.Tensor:
        return self.table[0].to(torch.int64)

    @property
    def nonfinite(self) -> torch.Tensor:
        return self.table[1].to(torch.int64)

    @property
    def clipped(self) -> torch.Tensor:
        return self.table[2].to(torch.int64)

    @property
    def mean(self) -> torch.Tensor:
        return self.table[3]

    @property
    def var(self) -> torch.Tensor:
        return self.table[4]

    @property
    def baseline(self) -> torch.Tensor:
        return self.table[5]

    @property
    def mse(self) -> torch.Tensor | None:
        return self.table[6] if self._has_budget_rule else None

    @property
    def weight(self) -> torch.Tensor | None:
        return self._of(Baseline.SHRINKAGE, 7)

    @property
    def statistic(self) -> torch.Tensor | None:
        return self._of(Baseline.SHRINKAGE, 8)

    @property
    def p_value(self) -> torch.Tensor | None:
        return self._of(Baseline.SHRINKAGE, 9)

    @property
    def hallucination(self) -> torch.Tensor | None:
        return self._of(Baseline.CALIBRATED, 7)

    @property
    def take_more(self) -> torch.Tensor | None:
        return self.table[-1] != 0 if self._has_budget_rule else None

    @property
    def _has_budget_rule(self) -> bool:
        return self.table.shape[0] > COMMON_ROWS

    def _of(self, baseline: Baseline, row: int) -> torch.Tensor | None:
        return self.table[row] if self.table.shape[0] == TABLE_ROWS[baseline] else None


# An exported program may return one, and be saved.
torch.export.register_dataclass(AdvantageStats, serialized_type_name="v05.ops.AdvantageStats")


class AdvantageOutput(NamedTuple):
    """`advantages` in the requested layout and dtype; `stats`, or None when they were not asked for."""

    advantages: torch.Tensor
    stats: AdvantageStats | None


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
            stands in (of "calibrated", its vague prior). Needed by the methods "v05", "prior" and "calibrated".
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
        num_groups: G. With integer `group_ids` the ids are then 0 .. G-1 themselves; required with them on CUDA, where
            finding G would synchronise, and under torch.compile.
        method: a name of `v05.methods.METHODS`.
        scale: divide by nothing ("none"), by the group's standard deviation + eps ("group") or that of all valid rewards
            ("batch"), ddof = 1; rewards that are all equal are not scaled. None takes the method's own.
        leave_one_out: the baseline of a rollout is computed from the group's other rollouts.
        reward_range: (lo, hi) that holds rewards and priors; read by the methods with a prior.
        eps: added to the standard deviation, reward units. With 0 every reward is 0 or at least 1e-130 in size.
        calibration: how far priors are to be trusted, read by "calibrated"; `v05.prior.calibration` fits it to past groups. None is
            `Calibration()`, for before there are any.
        singleton: advantage of a group's only rollout when nothing but itself could be its baseline: "zero" or its "raw" reward.
        max_rollouts, cost: of the budget rule behind `stats.take_more`; cost None is 1 / max_rollouts^2 (centred units).
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
    tracing = torch.compiler.is_compiling() or isinstance(rewards, _VALUELESS)
    if not tracing and _functorch.peek_interpreter_stack() is not None:
        _refuse_transformed(
            rewards=rewards,
            prior=prior,
            group_ids=group_ids,
            group_offsets=group_offsets,
            response_mask=response_mask,
            cu_seqlens=cu_seqlens,
            valid=valid,
            trajectory_ids=trajectory_ids,
            out=out,
        )
    given = (method, scale, leave_one_out, reward_range, eps, singleton, nonfinite, max_rollouts, cost, calibration, stats, dtype)
    try:
        rule, options = _option_values(*given) if tracing else _known_option_values(*given)
    except TypeError:  # one cannot be hashed
        rule, options = _option_values(*given)
    if num_groups is not None and not isinstance(num_groups, torch.SymInt):
        num_groups = integer("num_groups", num_groups, 0, MOST_GROUPS)

    tensors = (rewards, response_mask, cu_seqlens, valid, trajectory_ids, dtype, out, tracing)
    if process_group is not None:
        if tracing:
            raise ValueError("process_group: gathers through the host, which torch cannot trace; call outside torch.compile")
        of_union: dict[str, Any] = dict(method=method, scale=scale, leave_one_out=leave_one_out, reward_range=reward_range)
        of_union |= dict(eps=eps, singleton=singleton, nonfinite=nonfinite, max_rollouts=max_rollouts, cost=cost)
        of_union |= dict(calibration=calibration, backend=backend)
        advantages, statistics = _across_ranks(process_group, tensors, prior, group_ids, group_offsets, num_groups, **of_union)
        return AdvantageOutput(advantages, statistics if stats else None)
    rewards, mask, cu, valid, trajectory_ids, advantages = _rollouts(*tensors)
    device = rewards.device
    run = _kernel(backend, device, tracing)
    offsets, ids, groups = _group(group_ids, group_offsets, num_groups, rewards.shape[0], device, tracing)
    if prior is None and rule.needs_prior:
        raise ValueError(f"prior: needed by method={rule.name!r}; give (G,) values in reward units")
    prior = None if prior is None else _prior(prior, groups, device)
    inputs = (rewards, offsets, ids, groups, prior, mask, cu, valid, trajectory_ids)
    if out is not None and not tracing:
        _refuse_shared_memory(out, inputs)

    table = run(*inputs, advantages, *options)
    if out is not None and not tracing:
        torch.autograd.graph.increment_version(out)  # autograd refuses a backward through the values that were overwritten
    return AdvantageOutput(advantages, AdvantageStats(prior, table) if stats else None)


def _refuse_transformed(**arguments: object) -> None:
    """Tensors of torch.func's transforms have no memory that could be read."""
    for name, value in arguments.items():
        if isinstance(value, torch.Tensor) and _functorch.is_functorch_wrapped_tensor(value):
            raise ValueError(
                f"{name}: a tensor of torch.func's vmap or grad, without memory; call outside of them, for all groups at once: "
                "advantages carry no gradient"
            )


def _option_values(
    method: str,
    scale: Scale | None,
    leave_one_out: bool,
    reward_range: tuple[float, float],
    eps: float,
    singleton: str,
    nonfinite: str,
    max_rollouts: int,
    cost: float | None,
    calibration: Calibration | None,
    stats: bool,
    dtype: torch.dtype,
) -> tuple[Method, tuple[Any, ...]]:
    """The method, and the operator's arguments from `stats` on: options of `fused_advantage`, checked."""
    rule = find_method(method)
    low, high = finite_range("reward_range", reward_range)
    most = integer("max_rollouts", max_rollouts, 1)
    if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
        raise ValueError(f"dtype={dtype} cannot hold advantages; choose a floating dtype, such as torch.float32")
    trusted = known_calibration(calibration) or DEFAULT_CALIBRATION
    return rule, (
        flag("stats", stats),
        int(rule.baseline),
        SCALES.index(cast("Scale", choice("scale", rule.scale if scale is None else scale, SCALES))),
        flag("leave_one_out", leave_one_out) or rule.leave_one_out,
        choice("singleton", singleton, ("zero", "raw")) == "raw",
        choice("nonfinite", nonfinite, ("raise", "exclude")) == "exclude",
        low,
        high,
        nonnegative("eps", eps),
        most,
        1.0 / most**2 if cost is None else nonnegative("cost", cost, ", or None for 1 / max_rollouts^2"),
        (trusted.alpha, trusted.beta, trusted.kappa, trusted.eps),
    )


# Options repeat at every step, so that the checked ones are kept.
_known_option_values = lru_cache(maxsize=64, typed=True)(_option_values)


def _tensor(name: str, value: Array, none_is_nan: bool = False) -> torch.Tensor:
    """A dense tensor as it is; anything else through NumPy, so that Python floats keep their 64 bits."""
    if isinstance(value, torch.Tensor):
        if value.layout is not torch.strided:
            raise ValueError(f"{name}: layout {value.layout}; give a dense tensor, as its to_dense() makes")
        return value
    return _wrapped(array(name, value, none_is_nan=none_is_nan))


def _wrapped(numbers: NDArray[Any]) -> torch.Tensor:
    if numbers.dtype.kind == "f" and numbers.dtype.itemsize > 8:  # more digits than torch has
        numbers = numbers.astype(np.float64)
    elif numbers.dtype.char in "qQ":  # C's long long, which torch does not know by this name
        numbers = numbers.view(np.dtype(f"{numbers.dtype.byteorder}{numbers.dtype.kind}{numbers.dtype.itemsize}"))
    if not (numbers.flags.writeable and numbers.dtype.isnative and numbers.flags.c_contiguous):  # what torch cannot wrap
        numbers = numbers.astype(numbers.dtype.newbyteorder("="), order="C")
    return torch.from_numpy(numbers)


def _values(name: str, value: Array, none_is_nan: bool = False) -> torch.Tensor:
    """A tensor without a gradient, whose memory holds its values and not their negative."""
    tensor = _tensor(name, value, none_is_nan)
    return (tensor.detach() if tensor.requires_grad else tensor).resolve_neg()


def _placed(name: str, value: torch.Tensor, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """Contiguous, in the dtype and on the device. Asking first is cheaper than a conversion to what it is already."""
    if value.dtype != dtype or value.device != device:
        if value.dtype.is_complex:
            raise ValueError(f"{name}: dtype {value.dtype} is not real")
        if value.is_meta and device.type != "meta":
            raise ValueError(f"{name}: on the meta device, which holds no values; give a tensor on {device}")
        value = value.to(device, dtype)
    return value.contiguous()


def _rewards(rewards: Array) -> torch.Tensor:
    """Rewards as contiguous float32 or float64: half precision widens exactly, integers and bool become float64."""
    given = _values("rewards", rewards, none_is_nan=True)
    dtype = given.dtype
    if dtype in (torch.float32, torch.float64):
        return given.contiguous()
    return _placed("rewards", given, torch.float32 if dtype.is_floating_point else torch.float64, given.device)


class _Rollouts(NamedTuple):
    """The tensors of N rollouts as the operator takes them."""

    rewards: torch.Tensor
    mask: torch.Tensor | None
    cu_seqlens: torch.Tensor | None
    valid: torch.Tensor | None
    trajectory_ids: torch.Tensor | None
    out: torch.Tensor


def _rollouts(
    rewards: Array,
    response_mask: Array | None,
    cu_seqlens: Array | None,
    valid: Array | None,
    trajectory_ids: Array | None,
    dtype: torch.dtype,
    out: torch.Tensor | None,
    tracing: bool,
) -> _Rollouts:
    rewards = _rewards(rewards)
    device, size = rewards.device, rewards.shape
    response_mask = None if response_mask is None else _mask(response_mask, device)
    if len(size) not in (1, 2):
        raise ValueError(f"rewards: shape {tuple(size)}; give (N,) outcome rewards or (N, T) token rewards")
    if len(size) == 2 and (response_mask is None or response_mask.shape != size):
        raise ValueError(
            f"rewards: token rewards of shape {tuple(size)} need response_mask of the same shape"
            + ("" if response_mask is None else f", got {tuple(response_mask.shape)}")
        )
    n = size[0]
    valid = None if valid is None else _valid(valid, n, device, tracing)
    trajectory_ids = None if trajectory_ids is None else _trajectories(trajectory_ids, n, device, tracing)
    mask, cu, shape = _layout(response_mask, cu_seqlens, out, n, device, tracing)
    return _Rollouts(rewards, mask, cu, valid, trajectory_ids, _output(out, rewards, shape, dtype, tracing))


def _group(
    group_ids: Array | Sequence[str] | None,
    group_offsets: Array | None,
    num_groups: int | None,
    n: int,
    device: torch.device,
    tracing: bool,
) -> tuple[torch.Tensor | None, torch.Tensor | None, int]:
    """(offsets (G+1,), None, G) of contiguous groups, or (None, ids (N,) that are positions of groups, G)."""
    if (group_ids is None) == (group_offsets is None):
        given = "neither" if group_ids is None else "both"
        raise ValueError(f"group_ids and group_offsets: {given} given; give exactly one")
    if group_offsets is not None:
        offsets = _offsets("group_offsets", group_offsets, n, device, tracing)
        groups = offsets.shape[0] - 1
        if num_groups is not None and num_groups != groups:
            raise ValueError(f"num_groups={num_groups} contradicts group_offsets, which has {groups} groups; leave it out")
        return offsets, None, groups
    assert group_ids is not None
    ids, named = _integer_ids("group_ids", group_ids, tracing)
    if ids.ndim != 1 or ids.shape[0] != n:
        raise ValueError(f"group_ids: shape {tuple(ids.shape)} for {n} rollouts; give one id a rollout")
    if named is not None:
        if num_groups is not None and num_groups != named:
            raise ValueError(
                f"num_groups={num_groups}, but group_ids holds {named} distinct ids that are no positions; leave it out"
            )
        num_groups = named
    if num_groups is None:
        if tracing or not ids.is_cpu:
            raise ValueError(
                "num_groups: needed with integer group_ids on CUDA, where finding it would synchronise, and under torch.compile"
            )
        ids, num_groups = factorize(ids)
    elif ids.is_cpu and device.type != "cpu" and not tracing:
        _core.check_ids(ids.contiguous().numpy(), num_groups)
    return None, _placed("group_ids", ids, torch.int64, device), num_groups


def factorize(group_ids: Array | Sequence[str]) -> tuple[torch.Tensor, int]:
    """Number group ids by first appearance, once for several calls on the same rollouts.

    Args:
        group_ids: (N,) integers of any value, or N strings or other ids of one kind that can be hashed, such as UUIDs; on the CPU.

    Returns:
        ids: (N,) int64 in [0, G), and G: what `fused_advantage` takes as `group_ids` and `num_groups`.

    Raises:
        ValueError: not ids, or not on the CPU.
    """
    ids, named = _integer_ids("group_ids", group_ids, tracing=False)
    if named is not None:
        return ids, named
    if ids.ndim != 1 or not ids.is_cpu:
        raise ValueError(f"group_ids: shape {tuple(ids.shape)} on {ids.device}; give (N,) ids on the CPU")
    numbers, groups = _core.number_ids(ids.contiguous().numpy())
    return torch.from_numpy(numbers), groups


def group_rows_on_device(ids: torch.Tensor, num_groups: int) -> tuple[torch.Tensor, torch.Tensor]:
    """(offsets (G+1,), order (N,)) of integer ids in [0, num_groups), by one sort and without a host synchronisation."""
    ordered, order = torch.sort(ids, stable=True)
    offsets = torch.searchsorted(ordered, torch.arange(num_groups + 1, device=ids.device, dtype=ids.dtype))
    return offsets, order


def first_of_trajectory(
    trajectory_ids: torch.Tensor, offsets: torch.Tensor, order: torch.Tensor | None, valid: torch.Tensor | None
) -> torch.Tensor:
    """(N,) bool: the row is the first valid one of its trajectory in its group. Two stable sorts, no synchronisation."""
    n = trajectory_ids.numel()
    position = torch.arange(n, device=trajectory_ids.device)
    rows = position if order is None else order
    group = torch.searchsorted(offsets[1:].contiguous(), position, right=True)  # of the row at each position
    ignored = torch.zeros(n, dtype=torch.bool, device=rows.device) if valid is None else ~valid[rows]
    by = torch.argsort(ignored, stable=True)
    by = by[torch.argsort(trajectory_ids[rows][by], stable=True)]
    by = by[torch.argsort(group[by], stable=True)]
    key = torch.stack((group[by], trajectory_ids[rows][by]))
    starts = torch.ones(n, dtype=torch.bool, device=rows.device)
    starts[1:] = (key[:, 1:] != key[:, :-1]).any(dim=0)
    first = torch.empty_like(starts)
    first[rows[by]] = starts & ~ignored[by]
    return first


_NO_KEYS = (int, float, complex, np.number, np.bool_, type(None))  # no ids that are told apart by their hash


def _keys(name: str, ids: ArrayLike | Sequence[str]) -> torch.Tensor | Sequence[Any] | NDArray[np.object_]:
    """Integer ids as a tensor; strings, and other objects that are told apart by their hash, as they are."""
    if isinstance(ids, str):
        raise ValueError(f"{name}={shown(ids)} is one string; give a sequence of ids")
    if not isinstance(ids, Sequence):
        ids = any_array(name, ids)
        ids = ids.tolist() if ids.dtype.kind in "SUT" and ids.ndim == 1 else ids
    # A list of strings must not pass through NumPy's own, which strip trailing NULs.
    if isinstance(ids, Sequence) and _core.are_strings(name, ids):
        return ids
    given = any_array(name, ids)
    if given.dtype.kind in "OS" and given.ndim == 1:
        objects = given.astype(np.object_)
        kinds = {type(key) for key in objects}
        if _core.are_strings(name, objects) or (len(kinds) == 1 and not issubclass(kinds.pop(), _NO_KEYS)):
            return objects
    return _wrapped(array(name, given, wanted="integers, strings or other ids of one kind"))


def _integer_ids(name: str, ids: Array | Sequence[str], tracing: bool) -> tuple[torch.Tensor, int | None]:
    """Integer ids, and how many differ when they stand for other ids (numbered by first appearance)."""
    if isinstance(ids, torch.Tensor):
        keys: torch.Tensor | Sequence[Any] | NDArray[np.object_] = _tensor(name, ids)
    elif tracing:
        raise ValueError(f"{name}: torch traces tensors only; give an integer tensor and num_groups, or call outside torch.compile")
    else:
        keys = _keys(name, ids)
    if not isinstance(keys, torch.Tensor):
        try:
            dense, named = _core.factorize(keys)
        except TypeError as error:
            raise ValueError(f"{name}: {error}; give integers, strings or other ids that can be hashed") from None
        return torch.from_numpy(dense), named
    if keys.dtype == torch.int64:
        return keys, None
    if keys.numel() > 0 and (keys.is_floating_point() or keys.is_complex()):
        raise ValueError(f"{name}: dtype {keys.dtype}; give integers or strings")
    return keys.to(torch.int64), None


def _offsets(name: str, value: Array, end: int | None, device: torch.device, tracing: bool) -> torch.Tensor:
    """int64 offsets on the device. The CPU kernel checks what it reads; values on their way to another device are checked here."""
    offsets = _tensor(name, value)
    size, dtype = offsets.shape, offsets.dtype
    if len(size) != 1 or size[0] < 1 or dtype.is_floating_point:
        raise ValueError(f"{name}: shape {tuple(size)}, dtype {dtype}; give integers (number of parts + 1,) that start at 0")
    if offsets.is_cpu and offsets.device != device and not tracing:
        offsets = offsets.to(torch.int64, copy=True).contiguous()  # what is checked is what is sent, whatever other threads do
        _core.check_offsets(name, offsets.numpy(), end)
    return _placed(name, offsets, torch.int64, device)


def _prior(prior: Array, groups: int, device: torch.device) -> torch.Tensor:
    values = _placed("prior", _values("prior", prior), torch.float64, device)
    size = values.shape
    if len(size) != 1 or size[0] != groups:
        raise ValueError(f"prior: shape {tuple(size)} for {groups} groups; give one value a group")
    return values


def _layout(
    response_mask: torch.Tensor | None,
    cu_seqlens: Array | None,
    out: torch.Tensor | None,
    n: int,
    device: torch.device,
    tracing: bool,
) -> tuple[torch.Tensor | None, torch.Tensor | None, tuple[int, ...]]:
    """(mask, cu_seqlens, output shape) of the padded, packed or per-rollout layout."""
    if response_mask is not None:
        if cu_seqlens is not None:
            raise ValueError("response_mask and cu_seqlens: both given; give at most one of the two")
        mask = response_mask
        if mask.ndim != 2 or mask.shape[0] != n:
            raise ValueError(f"response_mask: shape {tuple(mask.shape)} for {n} rollouts; give (N, T)")
        return mask, None, (n, mask.shape[1])
    if cu_seqlens is not None:
        given = _tensor("cu_seqlens", cu_seqlens)
        cu = _offsets("cu_seqlens", given, None, device, tracing)
        if cu.shape[0] != n + 1:
            raise ValueError(f"cu_seqlens: {cu.shape[0]} offsets for {n} rollouts; give N + 1 = {n + 1}")
        if given.is_cpu and not tracing:
            return None, cu, (max(int(given[-1]), 0),)  # below 0 they fall, which is complained about where they are read
        if out is None:
            raise ValueError(
                "out: needed with cu_seqlens on CUDA, where finding total_tokens would synchronise, and under torch.compile"
            )
        return None, cu, (out.numel(),)
    return None, None, (n,)


def _output(
    out: torch.Tensor | None,
    rewards: torch.Tensor,
    shape: tuple[int, ...],
    dtype: torch.dtype,
    tracing: bool,
) -> torch.Tensor:
    device = rewards.device
    if out is None and len(shape) == 1 and rewards.is_cpu and dtype in _NUMPY_DTYPES and not tracing:
        return torch.from_numpy(np.empty(shape, _NUMPY_DTYPES[dtype]))  # in half the time; but rows start anywhere
    if out is None:
        return torch.empty(shape, dtype=dtype, device=device)
    if not isinstance(out, torch.Tensor) or out.layout is not torch.strided:
        raise ValueError(f"out: {shown(out)}; give a contiguous {shape} tensor, {dtype}, on {device}")
    if tuple(out.shape) != shape or out.dtype != dtype or out.device != device or not out.is_contiguous():
        seen = f"out: shape {tuple(out.shape)}, {out.dtype}, {out.device}{'' if out.is_contiguous() else ', not contiguous'}"
        raise ValueError(f"{seen}; give a contiguous {shape} tensor, {dtype}, on {device}")
    if out.requires_grad or (not tracing and out.is_neg()):
        raise ValueError("out: requires a gradient or is the negative of its memory; give a buffer to write into")
    return out


def _refuse_shared_memory(out: torch.Tensor, inputs: tuple[torch.Tensor | int | None, ...]) -> None:
    """What is read must not change while `out` is written. All are contiguous."""
    names = ("rewards", "group_offsets", "group_ids", "", "prior", "response_mask", "cu_seqlens", "valid", "trajectory_ids")
    begin, end = _extent(out)
    for name, read in zip(names, inputs, strict=True):
        if isinstance(read, torch.Tensor):
            first, last = _extent(read)
            if max(first, begin) < min(last, end):
                raise ValueError(f"out: shares memory with {name}; give a buffer of its own")


def _extent(contiguous: torch.Tensor) -> tuple[int, int]:
    begin = contiguous.data_ptr()
    return begin, begin + contiguous.nbytes


def _mask(response_mask: Array, device: torch.device) -> torch.Tensor:
    """The mask in a dtype that the core and the kernel read; they find the values that are neither 0 nor 1."""
    mask = _tensor("response_mask", response_mask)
    if mask.dtype not in _DTYPES:
        mask = _placed("response_mask", mask, torch.float32 if mask.is_floating_point() else torch.int64, device)
    return _placed("response_mask", mask, mask.dtype, device)


def _valid(valid: Array, n: int, device: torch.device, tracing: bool) -> torch.Tensor:
    flags = _tensor("valid", valid)
    if flags.is_floating_point() or flags.is_complex():
        raise ValueError(f"valid: dtype {flags.dtype}; give bool")
    _one_per_rollout("valid", flags, n)
    if flags.dtype != torch.bool:
        if flags.is_cpu and not tracing and (odd := ((flags != 0) & (flags != 1)).nonzero()).numel():
            row = int(odd[0])
            raise ValueError(f"valid: {int(flags[row])} in row {row}; give bool, True for a rollout that counts")
        flags = flags == 1
    return _placed("valid", flags, torch.bool, device)


def _trajectories(trajectory_ids: Array | Sequence[str], n: int, device: torch.device, tracing: bool) -> torch.Tensor:
    ids, _ = _integer_ids("trajectory_ids", trajectory_ids, tracing)
    _one_per_rollout("trajectory_ids", ids, n)
    return _placed("trajectory_ids", ids, torch.int64, device)


def _one_per_rollout(name: str, vector: torch.Tensor, n: int) -> None:
    if vector.ndim != 1 or vector.shape[0] != n:
        raise ValueError(f"{name}: shape {tuple(vector.shape)} for {n} rollouts; give one value a rollout")


def _outcomes(rewards: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
    """(N,) outcome rewards: token rewards are summed over the mask, in float64."""
    if rewards.ndim == 1 or mask is None:
        return rewards
    return torch.where(mask == 1, rewards, 0.0).sum(-1, dtype=torch.float64)


class _RankRollouts(NamedTuple):
    """What a rank tells the others, on the host: its rollouts' rewards and not their groups' moments, which takes a few bytes
    each, and no digit depends on the split."""

    keys: list[Any]
    outcomes: torch.Tensor
    prior: torch.Tensor | None
    valid: torch.Tensor
    trajectories: list[Any] | None


def _of_this_rank(
    local: _Rollouts,
    trajectory_ids: Array | Sequence[str] | None,
    prior: Array | None,
    group_ids: Array | Sequence[str] | None,
    group_offsets: Array | None,
    num_groups: int | None,
) -> _RankRollouts:
    if group_ids is None or group_offsets is not None:
        raise ValueError("group_ids: needed with process_group, and alone, to tell which groups of two ranks are one")
    n = local.rewards.shape[0]
    keys = _key_list("group_ids", group_ids)
    if len(keys) != n:
        raise ValueError(f"group_ids: {len(keys)} ids for {n} rollouts; give one id a rollout")
    if num_groups is not None and not all(isinstance(key, int) for key in keys):
        raise ValueError(f"num_groups={num_groups}: names groups of integer ids; leave it out with others")
    if local.cu_seqlens is not None and local.cu_seqlens.is_cpu:
        _core.check_offsets("cu_seqlens", local.cu_seqlens.numpy(), local.out.shape[0])
    if local.mask is not None and local.mask.is_cpu:
        _core.check_mask(local.mask.data_ptr(), _DTYPES[local.mask.dtype], n, local.mask.numel())
    return _RankRollouts(
        keys,
        _outcomes(local.rewards, local.mask).to("cpu", torch.float64),
        None if prior is None else _placed("prior", _values("prior", prior), torch.float64, torch.device("cpu")),
        torch.ones(n, dtype=torch.bool, device="cpu") if local.valid is None else local.valid.cpu(),
        None if trajectory_ids is None else _key_list("trajectory_ids", trajectory_ids),
    )


def _key_list(name: str, ids: Array | Sequence[str]) -> list[Any]:
    """Ids as every rank knows them: not numbered, which each rank would do by itself."""
    keys = ids if isinstance(ids, torch.Tensor) else _keys(name, ids)
    return _integer_ids(name, keys, tracing=False)[0].tolist() if isinstance(keys, torch.Tensor) else list(keys)


def _across_ranks(
    process_group: dist.ProcessGroup,
    given: tuple[Any, ...],
    prior: Array | None,
    group_ids: Array | Sequence[str] | None,
    group_offsets: Array | None,
    num_groups: int | None,
    **options: Any,
) -> tuple[torch.Tensor, AdvantageStats]:
    """The advantages of this rank's rollouts, in its own layout, and the statistics of its groups."""
    if not isinstance(process_group, dist.ProcessGroup):
        raise ValueError(
            f"process_group={shown(process_group)} is no process group of torch.distributed that this process belongs to; "
            "give one, such as dist.group.WORLD"
        )
    local: _Rollouts | None = None
    mine: _RankRollouts | str
    trajectory_ids = given[4]
    try:
        local = _rollouts(*given)
        mine = _of_this_rank(local, trajectory_ids, prior, group_ids, group_offsets, num_groups)
    except Exception as error:  # whatever it is, it is told to the others, who wait for this rank
        mine = str(error) if isinstance(error, ValueError) else repr(error)
    ranks: list[Any] = [None] * dist.get_world_size(process_group)
    dist.all_gather_object(ranks, mine, group=process_group)
    for rank, theirs in enumerate(ranks):
        if isinstance(theirs, str):
            raise ValueError(f"{theirs} (on rank {rank} of the process group)")
    assert local is not None
    device = local.rewards.device

    all_keys = [key for rank in ranks for key in rank.keys]
    ids, found = _core.factorize(all_keys) if num_groups is None else (np.array(all_keys, dtype=np.int64), num_groups)
    starts = np.cumsum([0, *(len(rank.keys) for rank in ranks)])

    def groups_of(rank: int) -> NDArray[np.int64]:
        """The groups of a rank's own prior and statistics, in their order."""
        if num_groups is not None:
            return np.arange(num_groups)
        groups, first = np.unique(ids[starts[rank] : starts[rank + 1]], return_index=True)
        return groups[np.argsort(first)]

    shared_prior = None
    if any(rank.prior is not None for rank in ranks):
        shared_prior = torch.full((found,), torch.nan, dtype=torch.float64, device="cpu")
        for rank, theirs in enumerate(ranks):
            groups, rank_prior = groups_of(rank), theirs.prior
            if rank_prior is None or tuple(rank_prior.shape) != groups.shape:
                raise ValueError(
                    f"prior: rank {rank} has {len(groups)} groups and gave "
                    + ("no prior" if rank_prior is None else f"shape {tuple(rank_prior.shape)}")
                    + "; every rank gives one value for each of its groups"
                )
            known = shared_prior[torch.from_numpy(groups)]
            contradicted = (known != rank_prior) & ~known.isnan() & ~rank_prior.isnan()
            if contradicted.any():
                g = int(contradicted.nonzero()[0])
                raise ValueError(
                    f"prior: rank {rank} gave {rank_prior[g].item()} for a group that an earlier rank gave {known[g].item()}; "
                    "give a group's prior alike on all its ranks, or NaN on all but one"
                )
            shared_prior[torch.from_numpy(groups)] = torch.where(rank_prior.isnan(), known, rank_prior)
    if len({rank.trajectories is None for rank in ranks}) > 1:
        raise ValueError("trajectory_ids: given on some ranks only; give them on all or on none")
    union = fused_advantage(
        torch.cat([rank.outcomes for rank in ranks]).to(device),
        shared_prior,
        group_ids=torch.from_numpy(ids).to(device),
        num_groups=found,
        valid=torch.cat([rank.valid for rank in ranks]),
        trajectory_ids=None if trajectory_ids is None else [key for rank in ranks for key in rank.trajectories],
        dtype=torch.float64,
        **options,
    )
    assert union.stats is not None
    me = dist.get_rank(process_group)
    own_groups = torch.from_numpy(groups_of(me)).to(device)
    whole = union.stats
    stats = AdvantageStats(
        prior=None if whole.prior is None else whole.prior[own_groups],
        table=whole.table[:, own_groups],
    )
    return _spread(union.advantages[starts[me] : starts[me + 1]], local), stats


def _spread(advantages: torch.Tensor, rollouts: _Rollouts) -> torch.Tensor:
    """Write (N,) advantages into the padded, packed or per-rollout `out`."""
    out = rollouts.out
    values = advantages.to(out.dtype)
    if rollouts.mask is not None:
        return torch.where(rollouts.mask == 1, values[:, None], torch.zeros((), dtype=out.dtype, device=out.device), out=out)
    if rollouts.cu_seqlens is not None:
        values = values.repeat_interleave(rollouts.cu_seqlens.diff(), output_size=out.numel())
    return out.copy_(values)


def _run_cpp(
    rewards: torch.Tensor,
    offsets: torch.Tensor | None,
    ids: torch.Tensor | None,
    num_groups: int,
    prior: torch.Tensor | None,
    mask: torch.Tensor | None,
    cu_seqlens: torch.Tensor | None,
    valid: torch.Tensor | None,
    trajectory_ids: torch.Tensor | None,
    out: torch.Tensor,
    stats: bool,
    baseline: int,
    *rule: Any,
) -> torch.Tensor:
    """Write `out` and return the table of `AdvantageStats`, of no group without `stats`; `rule` is what the operator's schema
    has after baseline."""
    # The core writes float32 and float64; a half-precision output is rounded from float32.
    target = out if out.dtype in (torch.float32, torch.float64) else torch.empty_like(out, dtype=torch.float32)
    table = torch.from_numpy(np.empty((TABLE_ROWS[baseline], num_groups if stats else 0)))  # in half the time of torch.empty
    _core.fused_advantage(
        rewards.data_ptr(),
        _DTYPES[rewards.dtype],
        rewards.ndim == 2,
        rewards.shape[0],
        None if offsets is None else offsets.data_ptr(),
        None if ids is None else ids.data_ptr(),
        num_groups,
        None if prior is None else prior.data_ptr(),
        None if mask is None else mask.data_ptr(),
        0 if mask is None else _DTYPES[mask.dtype],
        None if cu_seqlens is None else cu_seqlens.data_ptr(),
        None if valid is None else valid.data_ptr(),
        None if trajectory_ids is None else trajectory_ids.data_ptr(),
        target.data_ptr(),
        _DTYPES[target.dtype],
        target.numel(),
        table.data_ptr(),
        torch.get_num_threads(),
        stats,
        baseline,
        *rule,
    )
    if target is not out:
        out.copy_(target)
    return table


def _run_triton(
    rewards: torch.Tensor,
    offsets: torch.Tensor | None,
    ids: torch.Tensor | None,
    num_groups: int,
    prior: torch.Tensor | None,
    mask: torch.Tensor | None,
    cu_seqlens: torch.Tensor | None,
    valid: torch.Tensor | None,
    trajectory_ids: torch.Tensor | None,
    out: torch.Tensor,
    stats: bool,
    baseline: int,
    scale: int,
    leave_one_out: bool,
    raw_singleton: bool,
    exclude_nonfinite: bool,  # a kernel cannot raise: it always excludes and counts
    *rule: Any,
) -> torch.Tensor:
    from v05.kernels.advantage import fused_advantage as launch

    order = None
    if ids is not None:
        placed = (ids >= 0) & (ids < num_groups)  # a kernel cannot refuse ids: rows of no group go to group 0, left out
        offsets, order = group_rows_on_device(torch.where(placed, ids, 0), num_groups)
        valid = placed if valid is None else valid & placed
    assert offsets is not None
    if mask is not None and mask.dtype == torch.bool:
        mask = mask.view(torch.uint8)
    counted = valid
    if trajectory_ids is not None:
        finite = _outcomes(rewards, mask).isfinite()
        counted = first_of_trajectory(trajectory_ids, offsets, order, finite if valid is None else valid & finite)
    table = _empty_table(rewards, num_groups, stats, baseline)
    inputs = (rewards, offsets, order, prior, mask, cu_seqlens, valid, counted)
    launch(*inputs, out, table if stats else None, baseline, scale, leave_one_out, raw_singleton, *rule)
    return table


def _empty_table(rewards: torch.Tensor, num_groups: int, stats: bool, baseline: int) -> torch.Tensor:
    return torch.empty((TABLE_ROWS[baseline], num_groups if stats else 0), dtype=torch.float64, device=rewards.device)


_STATS_AND_BASELINE = slice(6, 8)  # of the operator's arguments after num_groups
# What the core tells its buffers by, shared with bindings/advantage.cpp.
_DTYPES = {torch.bool: 1, torch.uint8: 1, torch.int64: 2, torch.float32: 3, torch.float64: 4, torch.int32: 5}
_BACKENDS: dict[str, _Kernel] = {"cpp": _run_cpp, "triton": _run_triton}
_BACKEND_OF_DEVICE = {"cpu": "cpp", "cuda": "triton"}


def _kernel(backend: str | None, device: torch.device, tracing: bool) -> _Kernel:
    """What computes on the device. torch's dispatcher, which finds the same, is asked only to be seen by a tracer: it costs more
    than the advantages of a small batch."""
    own = _BACKEND_OF_DEVICE.get(device.type)
    if own is None:
        raise ValueError(f"rewards: device {device} has no backend; move the tensors to one of {', '.join(_BACKEND_OF_DEVICE)}")
    if backend is None:
        backend = own
    elif choice("backend", backend, _BACKENDS) == "cpp" and own != "cpp":
        raise ValueError(f"backend='cpp' needs CPU tensors, got {device}")
    elif backend != own and tracing:
        raise ValueError(
            f"backend={backend!r} is not that of {device}, and torch traces no other; leave it out under torch.compile"
        )
    return torch.ops.v05.fused_advantage if tracing else _BACKENDS[backend]


# FRAGMENT: other files of this package may add operators of their own to the namespace.
_LIBRARY = torch.library.Library("v05", "FRAGMENT")
_TAGS = (torch.Tag.pt2_compliant_tag, torch.Tag.needs_fixed_stride_order)
_LIBRARY.define(
    "fused_advantage(Tensor rewards, Tensor? offsets, Tensor? ids, SymInt num_groups, Tensor? prior, Tensor? mask, "
    "Tensor? cu_seqlens, Tensor? valid, Tensor? trajectory_ids, Tensor(a!) out, bool stats, int baseline, int scale, "
    "bool leave_one_out, bool raw_singleton, bool exclude_nonfinite, float low, float high, float eps, int max_rollouts, "
    "float cost, float[] calibration) -> Tensor table",
    tags=_TAGS,
)


def _run_checked(
    run: _Kernel,
    rewards: torch.Tensor,
    offsets: torch.Tensor | None,
    ids: torch.Tensor | None,
    num_groups: int,
    prior: torch.Tensor | None,
    mask: torch.Tensor | None,
    cu_seqlens: torch.Tensor | None,
    valid: torch.Tensor | None,
    trajectory_ids: torch.Tensor | None,
    out: torch.Tensor,
    *rest: Any,
) -> torch.Tensor:
    """The registered operator: an exported program hands over whatever it is given, in any dtype and layout."""
    if not out.dtype.is_floating_point:
        raise ValueError(f"out: dtype {out.dtype} cannot hold advantages; give the program what it was exported with")
    rewards, mask, cu_seqlens, valid, trajectory_ids, out = _rollouts(
        rewards, mask, cu_seqlens, valid, trajectory_ids, out.dtype, out, tracing=False
    )
    device = rewards.device
    groups = integer("num_groups", num_groups, 0, MOST_GROUPS) if offsets is None else None
    offsets, ids, num_groups = _group(ids, offsets, groups, rewards.shape[0], device, tracing=False)
    prior = None if prior is None else _prior(prior, num_groups, device)
    return run(rewards, offsets, ids, num_groups, prior, mask, cu_seqlens, valid, trajectory_ids, out, *rest)


for _device, _name in _BACKEND_OF_DEVICE.items():
    _LIBRARY.impl("fused_advantage", partial(_run_checked, _BACKENDS[_name]), _device.upper())
torch.library.register_fake(
    "v05::fused_advantage",
    lambda rewards, offsets, ids, num_groups, *rest: _empty_table(rewards, num_groups, *rest[_STATS_AND_BASELINE]),
    lib=_LIBRARY,
)
