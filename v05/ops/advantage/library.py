"""The op as a registered operator, `v05::fused_advantage`, which torch.compile and torch.export do not trace into.

An operator takes only tensors and numbers, so its schema lists the fields of `Rollouts`, `Groups` and `Options`, in their order.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch

from v05.arguments import integer
from v05.ops.advantage.backends import BACKEND_OF_DEVICE, BACKENDS, Backend
from v05.ops.advantage.compute import compute
from v05.ops.advantage.inputs import MOST_GROUPS, Groups, Rollouts, read_groups, read_prior, read_rollouts
from v05.ops.advantage.options import Options
from v05.ops.advantage.stats import empty_table, undefined_columns

# FRAGMENT: other files of this package add operators to the same namespace.
_LIBRARY = torch.library.Library("v05", "FRAGMENT")
_TAGS = (torch.Tag.pt2_compliant_tag, torch.Tag.needs_fixed_stride_order)
_LIBRARY.define(
    "fused_advantage(Tensor rewards, Tensor? mask, Tensor? cu_seqlens, Tensor? valid, Tensor? trajectory_ids, Tensor? energy, "
    "SymInt num_groups, Tensor? offsets, Tensor? ids, Tensor? prior, Tensor(a!) out, bool stats, "
    "int baseline, int scale, bool leave_one_out, bool raw_singleton, bool exclude_nonfinite, float low, float high, float eps, "
    "int max_rollouts, float cost, float[] calibration) -> Tensor table",
    tags=_TAGS,
)
# All fields of Groups except `order`, which is made from ids on the host and does not occur while tracing.
_ROLLOUTS, _GROUPS = len(Rollouts._fields), len(Groups._fields) - 1


def call_operator(
    rollouts: Rollouts,
    groups: Groups,
    prior: torch.Tensor | None,
    options: Options,
    out: torch.Tensor,
    stats: bool,
) -> torch.Tensor:
    """Do what `compute` does, through torch's dispatcher, so that a tracer records one operator."""
    table: torch.Tensor = torch.ops.v05.fused_advantage(*rollouts, *groups[:_GROUPS], prior, out, stats, *options.named().values())
    return table


def _run(backend: Backend, *given: Any) -> torch.Tensor:
    """The operator's body. It reads its arguments again, because an exported program passes on tensors of any dtype and layout."""
    rewards, mask, cu_seqlens, valid, trajectory_ids, energy = given[:_ROLLOUTS]
    count, offsets, ids = given[_ROLLOUTS : _ROLLOUTS + _GROUPS]
    prior, out, stats, *options = given[_ROLLOUTS + _GROUPS :]
    if not out.dtype.is_floating_point:
        raise ValueError(f"out: dtype {out.dtype} cannot hold advantages; give the dtype that the program was exported with")
    rollouts, out = read_rollouts(rewards, mask, cu_seqlens, valid, trajectory_ids, energy, out.dtype, out, tracing=False)
    device = rollouts.rewards.device
    number = integer("num_groups", count, 0, MOST_GROUPS) if offsets is None else None
    groups = read_groups(ids, offsets, number, rollouts.rewards.shape[0], device, tracing=False)
    prior = None if prior is None else read_prior(prior, groups.number, device)
    table = compute(rollouts, groups, prior, Options(*options), out, stats, backend)
    table[undefined_columns(options[0])] = 0.0  # an operator must return the same values at every call
    return table


def _fake(*given: Any) -> torch.Tensor:
    count, stats = given[_ROLLOUTS], given[_ROLLOUTS + _GROUPS + 2]
    return empty_table(count if stats else 0, given[0].device)


for _device, _name in BACKEND_OF_DEVICE.items():
    _LIBRARY.impl("fused_advantage", partial(_run, BACKENDS[_name]), _device.upper())
torch.library.register_fake("v05::fused_advantage", _fake, lib=_LIBRARY)
