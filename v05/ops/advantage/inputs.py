"""Read the op's arguments into the values that it computes on: `Rollouts`, `Groups`, a prior and an output.

Every reader accepts tensors, arrays and sequences, and raises a ValueError that names the argument, the value seen and the remedy.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch._C import _functorch

from v05 import _core
from v05.arguments import any_array, array, shown
from v05.methods import Method

Array = torch.Tensor | ArrayLike
_NUMPY_DTYPES = {torch.float32: np.float32, torch.float64: np.float64}
# The core's number for the dtype of a buffer, shared with advantage.hpp.
DTYPES = {torch.bool: 1, torch.uint8: 1, torch.int64: 2, torch.float32: 3, torch.float64: 4, torch.int32: 5}
MOST_GROUPS = 2**31 - 1  # the statistics of so many groups take 200 GB


class Rollouts(NamedTuple):
    """The tensors of N rollouts, contiguous and on one device.

    Attributes:
        rewards: (N,), or (N, T) by token; float32 or float64.
        mask: (N, T) of a dtype in `DTYPES`; None unless rewards or advantages are by token.
        cu_seqlens: (N + 1,) int64; None unless advantages are packed.
        valid: (N,) bool; None if all rollouts are valid.
        trajectory_ids: (N,) int64; None if every row is a trajectory of its own.
        energy: (N,) float64; None if the method does not read it.
    """

    rewards: torch.Tensor
    mask: torch.Tensor | None
    cu_seqlens: torch.Tensor | None
    valid: torch.Tensor | None
    trajectory_ids: torch.Tensor | None
    energy: torch.Tensor | None


class Groups(NamedTuple):
    """The rows of each group, in one of three forms. All tensors are int64.

    Attributes:
        number: how many groups there are.
        offsets: (number + 1,) for contiguous groups: group g has the rows offsets[g] .. offsets[g + 1] - 1.
        ids: (N,) in [0, number), the group of each row in any order.
        order: (N,) rows sorted by group, into which `offsets` then point. Used on a GPU for ids that were given on the host.
    """

    number: int
    offsets: torch.Tensor | None
    ids: torch.Tensor | None
    order: torch.Tensor | None = None


def tensor_of(name: str, value: Array, none_is_nan: bool = False) -> torch.Tensor:
    """Return a tensor unchanged. Convert anything else through NumPy, so that Python floats keep their 64 bits."""
    if isinstance(value, torch.Tensor):
        return value
    return _wrapped(array(name, value, none_is_nan=none_is_nan))


def _wrapped(numbers: NDArray[Any]) -> torch.Tensor:
    if numbers.dtype.kind == "f" and numbers.dtype.itemsize > 8:  # torch has no wider float than float64
        numbers = numbers.astype(np.float64)
    elif numbers.dtype.char in "qQ":  # C's long long, which torch does not accept under this type code
        numbers = numbers.view(np.dtype(f"{numbers.dtype.byteorder}{numbers.dtype.kind}{numbers.dtype.itemsize}"))
    if not (numbers.flags.writeable and numbers.dtype.isnative and numbers.flags.c_contiguous):  # torch cannot wrap such arrays
        numbers = numbers.astype(numbers.dtype.newbyteorder("="), order="C")
    return torch.from_numpy(numbers)


def values_of(name: str, value: Array, none_is_nan: bool = False) -> torch.Tensor:
    """A detached tensor whose memory holds its values and not, as torch allows, their negatives."""
    tensor = tensor_of(name, value, none_is_nan)
    return (tensor.detach() if tensor.requires_grad else tensor).resolve_neg()


def placed(name: str, value: torch.Tensor, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """The tensor, contiguous, in this dtype and on this device. A comparison is cheaper than a conversion that changes nothing."""
    if value.dtype != dtype or value.device != device:
        if value.dtype.is_complex:
            raise ValueError(f"{name}: dtype {value.dtype} is not real")
        value = value.to(device, dtype)
    return value.contiguous()


def _rewards(rewards: Array) -> torch.Tensor:
    """Rewards as contiguous float32 or float64: half precision widens exactly, integers and bool become float64."""
    given = values_of("rewards", rewards, none_is_nan=True)
    dtype = given.dtype
    if dtype in (torch.float32, torch.float64):
        return given.contiguous()
    return placed("rewards", given, torch.float32 if dtype.is_floating_point else torch.float64, given.device)


def read_rollouts(
    rewards: Array,
    response_mask: Array | None,
    cu_seqlens: Array | None,
    valid: Array | None,
    trajectory_ids: Array | Sequence[str] | None,
    energy: Array | None,
    dtype: torch.dtype,
    out: torch.Tensor | None,
    tracing: bool,
) -> tuple[Rollouts, torch.Tensor]:
    """Return the rollouts and the buffer for their advantages."""
    rewards = _rewards(rewards)
    device, size = rewards.device, rewards.shape
    response_mask = None if response_mask is None else _mask(response_mask, device)
    if len(size) not in (1, 2):
        raise ValueError(f"rewards: shape {tuple(size)}; give (N,) outcome rewards or (N, T) token rewards")
    if len(size) == 2 and (response_mask is None or response_mask.shape != size):
        raise ValueError(
            f"rewards: token rewards of shape {tuple(size)} need response_mask of the same shape"
            + (
                "; if these are the rewards of prompts x rollouts, give rewards.flatten() with group_offsets=range(0, N + 1, k)"
                if response_mask is None
                else f", got {tuple(response_mask.shape)}"
            )
        )
    n = size[0]
    valid = None if valid is None else _valid(valid, n, device, tracing)
    trajectory_ids = None if trajectory_ids is None else _trajectories(trajectory_ids, n, device, tracing)
    mask, cu, shape = _layout(response_mask, cu_seqlens, out, n, device, tracing)
    if energy is not None:
        energy = placed("energy", values_of("energy", energy), torch.float64, device)
        _one_per_rollout("energy", energy, n)
    return Rollouts(rewards, mask, cu, valid, trajectory_ids, energy), _output(out, rewards, shape, dtype, tracing)


def energy_for(rule: Method, rollouts: Rollouts) -> torch.Tensor | None:
    """(N,) float64 weights of the rollouts: the given energies, or the lengths in tokens if the method weighs by length."""
    if rule.weight is None:
        return None
    if rollouts.energy is not None:
        return rollouts.energy
    if rule.weight == "length" and rollouts.mask is not None:
        return (rollouts.mask == 1).sum(-1, dtype=torch.float64)
    if rule.weight == "length" and rollouts.cu_seqlens is not None:
        return rollouts.cu_seqlens.diff().to(torch.float64)
    lengths = ", or a response_mask or cu_seqlens to weigh by length" if rule.weight == "length" else ""
    raise ValueError(f"energy: needed by method={rule.name!r}; give (N,) weights of at least 0{lengths}")


def read_groups(
    group_ids: Array | Sequence[str] | None,
    group_offsets: Array | None,
    num_groups: int | None,
    n: int,
    device: torch.device,
    tracing: bool,
) -> Groups:
    if (group_ids is None) == (group_offsets is None):
        given = "neither" if group_ids is None else "both"
        raise ValueError(f"group_ids and group_offsets: {given} given; give exactly one")
    if group_offsets is not None:
        offsets = _offsets("group_offsets", group_offsets, n, device, tracing)
        groups = offsets.shape[0] - 1
        if num_groups is not None and num_groups != groups:
            raise ValueError(f"num_groups={num_groups} contradicts group_offsets, which has {groups} groups; leave it out")
        return Groups(groups, offsets, None)
    assert group_ids is not None
    ids, named = integer_ids("group_ids", group_ids, tracing)
    if ids.ndim != 1 or ids.shape[0] != n:
        raise ValueError(f"group_ids: shape {tuple(ids.shape)} for {n} rollouts; give one id a rollout")
    if named is not None:
        if num_groups is not None and num_groups != named:
            raise ValueError(
                f"num_groups={num_groups}, but group_ids holds {named} distinct ids that are not integers; leave it out"
            )
        num_groups = named
    if num_groups is None:
        if tracing or not ids.is_cpu:
            raise ValueError(
                "num_groups: needed with integer group_ids on CUDA, where finding it would synchronise, and under torch.compile"
            )
        ids, num_groups = factorize(ids)
    if ids.is_cpu and device.type != "cpu" and not tracing:
        return _ordered(ids, num_groups, device)
    return Groups(num_groups, None, placed("group_ids", ids, torch.int64, device))


def _ordered(ids: torch.Tensor, num_groups: int, device: torch.device) -> Groups:
    """Groups on a device from ids on the host. Rows are ordered on the host and sent in one copy."""
    start = (num_groups + 2) // 2 * 2  # where the order begins; even, so that both parts are aligned
    parts = torch.from_numpy(_core.order_rows(ids.contiguous().numpy(), num_groups, start)).to(device)
    return Groups(num_groups, parts[: num_groups + 1], None, parts[start:])


def factorize(group_ids: Array | Sequence[str]) -> tuple[torch.Tensor, int]:
    """Number group ids by first appearance, so that several calls on the same rollouts need to do it only once.

    Args:
        group_ids: (N,) integers of any value, or N strings or other hashable ids of one type, such as UUIDs; on the CPU.

    Returns:
        ids: (N,) int64 on the CPU, in [0, G). Pass it to `fused_advantage` as `group_ids`.
        groups: G, the number of distinct ids. Pass it as `num_groups`.

    Raises:
        ValueError: `group_ids` are not ids of one of these kinds, not one-dimensional, or not on the CPU.

    Example:
        >>> factorize(["b", "a", "b"])
        (tensor([0, 1, 0]), 2)
    """
    ids, named = integer_ids("group_ids", group_ids, tracing=False)
    if named is not None:
        return ids, named
    if ids.ndim != 1 or not ids.is_cpu:
        raise ValueError(f"group_ids: shape {tuple(ids.shape)} on {ids.device}; give (N,) ids on the CPU")
    numbers, groups = _core.number_ids(ids.contiguous().numpy())
    return torch.from_numpy(numbers), groups


_NO_KEYS = (int, float, complex, np.number, np.bool_, type(None))  # other objects are compared by their hash


def keys_of(name: str, ids: ArrayLike | Sequence[str]) -> torch.Tensor | Sequence[Any] | NDArray[np.object_]:
    """Return integer ids as a tensor, and strings or other objects that are compared by their hash unchanged."""
    if isinstance(ids, str):
        raise ValueError(f"{name}={shown(ids)} is one string; give a sequence of ids")
    if isinstance(ids, np.ndarray) or not isinstance(ids, Sequence):
        given = any_array(name, ids)
        if given.dtype.kind in "SUT" and given.ndim == 1:
            given = given.astype(np.object_)
    elif _core.are_strings(name, ids):  # NumPy's own strings would strip trailing NULs
        return ids
    else:
        given = any_array(name, ids)
        given = given.astype(np.object_) if given.dtype.kind == "S" else given
    if given.dtype.kind == "O" and given.ndim == 1:
        if _core.are_strings(name, given):
            return given
        kinds = {type(key) for key in given}
        if len(kinds) == 1 and not issubclass(kinds.pop(), _NO_KEYS):
            return given
    return _wrapped(array(name, given, wanted="integers, strings or other ids of one kind"))


def integer_ids(name: str, ids: Array | Sequence[str], tracing: bool) -> tuple[torch.Tensor, int | None]:
    """Return int64 ids, and the number of distinct ids if they replace others (numbered by first appearance), else None."""
    if isinstance(ids, torch.Tensor):
        keys: torch.Tensor | Sequence[Any] | NDArray[np.object_] = tensor_of(name, ids)
    elif tracing:
        raise ValueError(f"{name}: torch traces only tensors; give an integer tensor and num_groups, or call outside torch.compile")
    else:
        keys = keys_of(name, ids)
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
    """int64 offsets on the device. The CPU core checks offsets when it reads them; offsets bound for a GPU are checked here."""
    offsets = tensor_of(name, value)
    size, dtype = offsets.shape, offsets.dtype
    if len(size) != 1 or size[0] < 1 or dtype.is_floating_point:
        raise ValueError(f"{name}: shape {tuple(size)}, dtype {dtype}; give integers (number of parts + 1,) that start at 0")
    if offsets.is_cpu and offsets.device != device and not tracing:
        offsets = offsets.to(torch.int64, copy=True).contiguous()  # a copy, which no other thread can change
        _core.check_offsets(name, offsets.numpy(), end)
    return placed(name, offsets, torch.int64, device)


def read_prior(prior: Array, groups: int, device: torch.device) -> torch.Tensor:
    values = placed("prior", values_of("prior", prior), torch.float64, device)
    size = values.shape
    if len(size) != 1 or size[0] != groups:
        raise ValueError(f"prior: shape {tuple(size)} for {groups} groups; give one value a group")
    return values


def refuse_wrong_offsets(groups: Groups, n: int, tracing: bool) -> None:
    """Raise ValueError if the offsets on a CPU do not rise from 0 to n. A call that succeeds has them checked by the core."""
    if groups.offsets is not None and groups.offsets.is_cpu and not tracing:
        _core.check_offsets("group_offsets", groups.offsets.numpy(), n)


def _layout(
    response_mask: torch.Tensor | None,
    cu_seqlens: Array | None,
    out: torch.Tensor | None,
    n: int,
    device: torch.device,
    tracing: bool,
) -> tuple[torch.Tensor | None, torch.Tensor | None, tuple[int, ...]]:
    """Return (mask, cu_seqlens, output shape) of the padded, packed or per-rollout layout."""
    if response_mask is not None:
        if cu_seqlens is not None:
            raise ValueError("response_mask and cu_seqlens: both given; give at most one of the two")
        size = response_mask.shape
        if len(size) != 2 or size[0] != n:
            raise ValueError(f"response_mask: shape {tuple(size)} for {n} rollouts; give (N, T)")
        return response_mask, None, (n, size[1])
    if cu_seqlens is not None:
        given = tensor_of("cu_seqlens", cu_seqlens)
        cu = _offsets("cu_seqlens", given, None, device, tracing)
        if cu.shape[0] != n + 1:
            raise ValueError(f"cu_seqlens: {cu.shape[0]} offsets for {n} rollouts; give N + 1 = {n + 1}")
        if given.is_cpu and not tracing:
            return None, cu, (max(int(given[-1]), 0),)  # a negative end is rejected later, by check_offsets
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
        return torch.from_numpy(np.empty(shape, _NUMPY_DTYPES[dtype]))  # half the time, less alignment
    if out is None:
        return torch.empty(shape, dtype=dtype, device=device)
    if not isinstance(out, torch.Tensor) or out.layout is not torch.strided:
        raise ValueError(f"out: {shown(out)}; give a contiguous {shape} tensor, {dtype}, on {device}")
    if out.shape != shape or out.dtype != dtype or out.device != device or not out.is_contiguous():
        seen = f"out: shape {tuple(out.shape)}, {out.dtype}, {out.device}{'' if out.is_contiguous() else ', not contiguous'}"
        raise ValueError(f"{seen}; give a contiguous {shape} tensor, {dtype}, on {device}")
    if out.requires_grad or (not tracing and out.is_neg()):
        raise ValueError("out: requires a gradient or is the negative of its memory; give a buffer to write into")
    return out


def refuse_shared_memory(out: torch.Tensor, rollouts: Rollouts, groups: Groups, prior: torch.Tensor | None) -> None:
    """A ValueError if `out` shares memory with an input, which would change while it is read. All tensors are contiguous."""
    begin = out.data_ptr()
    end = begin + out.nbytes
    for place, tensor in enumerate((*rollouts, groups.offsets, groups.ids, prior)):
        if tensor is not None and (first := tensor.data_ptr()) < end and begin < first + tensor.nbytes:
            raise ValueError(f"out: shares memory with {_READ[place]}; give a buffer of its own")


_READ = ("rewards", "response_mask", *Rollouts._fields[2:], "group_offsets", "group_ids", "prior")  # in the order of that loop


def _mask(response_mask: Array, device: torch.device) -> torch.Tensor:
    """The mask in a dtype that the core and the kernel read. They detect values other than 0 and 1."""
    mask = tensor_of("response_mask", response_mask)
    dtype = mask.dtype
    if dtype not in DTYPES:
        dtype = torch.float32 if dtype.is_floating_point else torch.int64
    return placed("response_mask", mask, dtype, device)


def _valid(valid: Array, n: int, device: torch.device, tracing: bool) -> torch.Tensor:
    flags = tensor_of("valid", valid)
    if flags.is_floating_point() or flags.is_complex():
        raise ValueError(f"valid: dtype {flags.dtype}; give bool")
    _one_per_rollout("valid", flags, n)
    if flags.dtype != torch.bool:
        if flags.is_cpu and not tracing and (odd := ((flags != 0) & (flags != 1)).nonzero()).numel():
            row = int(odd[0])
            raise ValueError(f"valid: {int(flags[row])} in row {row}; give bool, True for a rollout that counts")
        flags = flags == 1
    return placed("valid", flags, torch.bool, device)


def _trajectories(trajectory_ids: Array | Sequence[str], n: int, device: torch.device, tracing: bool) -> torch.Tensor:
    ids, _ = integer_ids("trajectory_ids", trajectory_ids, tracing)
    _one_per_rollout("trajectory_ids", ids, n)
    return placed("trajectory_ids", ids, torch.int64, device)


def _one_per_rollout(name: str, vector: torch.Tensor, n: int) -> None:
    if vector.ndim != 1 or vector.shape[0] != n:
        raise ValueError(f"{name}: shape {tuple(vector.shape)} for {n} rollouts; give one value a rollout")


def outcomes_of(rewards: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
    """(N,) outcome rewards. Token rewards are summed over the mask in float64."""
    if rewards.ndim == 1 or mask is None:
        return rewards
    return torch.where(mask == 1, rewards, 0.0).sum(-1, dtype=torch.float64)


def refuse_unreadable(**arguments: object) -> None:
    """Raise a ValueError that names the first tensor whose values are not in memory, if there is one."""
    outside = "call outside of vmap and grad, for all groups at once: advantages carry no gradient"
    for name, value in arguments.items():
        if not isinstance(value, torch.Tensor):
            continue
        if _functorch.is_functorch_wrapped_tensor(value):
            seen, remedy = "of torch.func's vmap or grad", outside
        elif value.layout is not torch.strided:
            seen, remedy = f"of layout {value.layout}", "give a dense one, as its to_dense() makes"
        elif value.is_meta:
            seen, remedy = "on the meta device", "give one that holds values"
        else:
            continue
        raise ValueError(f"{name}: a tensor {seen}, whose values are not in memory; {remedy}") from None
    if _functorch.peek_interpreter_stack() is not None:
        raise ValueError(f"rewards: torch.func's vmap or grad wraps them, so their values are not in memory; {outside}") from None
