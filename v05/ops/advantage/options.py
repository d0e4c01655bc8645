"""`Options` say how rewards become advantages. They are checked once for each set of values and then cached."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import astuple, dataclass, fields
from functools import cached_property, lru_cache
from typing import TYPE_CHECKING, Any, cast

import torch

from v05 import _core
from v05.arguments import choice, finite_range, flag, integer, nonnegative
from v05.methods import Calibration, Method, Scale, find_method, known_calibration

if TYPE_CHECKING:
    from v05.kernels.advantage.launch import KernelOptions

SCALES: tuple[Scale, ...] = ("none", "group", "batch", "mean")  # positions are shared with advantage.hpp and kernels/advantage
DEFAULT_CALIBRATION = Calibration()


@dataclass(frozen=True)
class Options:
    """The arguments of the C++ core and the Triton kernel that are not tensors, in the order of the registered operator's schema.

    Attributes:
        baseline: a `v05.methods.Baseline`.
        scale: a position in `SCALES`.
        leave_one_out, raw_singleton, exclude_nonfinite: as in `fused_advantage`.
        low, high: the ends of `reward_range`, reward units.
        eps, max_rollouts, cost: as in `fused_advantage`.
        calibration: the six fields of a `Calibration`, in its order.
    """

    baseline: int
    scale: int
    leave_one_out: bool
    raw_singleton: bool
    exclude_nonfinite: bool
    low: float
    high: float
    eps: float
    max_rollouts: int
    cost: float
    calibration: Sequence[float]

    @cached_property
    def core(self) -> _core.Options:
        """These options as an object of the C++ core."""
        return _core.Options(**self.named())

    @cached_property
    def kernel(self) -> KernelOptions:
        """These options as arguments of the Triton kernel."""
        from v05.kernels.advantage.launch import kernel_options

        return kernel_options(self)

    def named(self) -> dict[str, Any]:
        return {field.name: getattr(self, field.name) for field in fields(self)}


def read_options(
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
) -> tuple[Method, Options, bool]:
    """Return the method, its options and whether to compute statistics. A ValueError names the option, its value and the remedy."""
    rule = find_method(method)
    low, high = finite_range("reward_range", reward_range)
    most = integer("max_rollouts", max_rollouts, 1)
    if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
        raise ValueError(f"dtype={dtype} cannot hold advantages; choose a floating dtype, such as torch.float32")
    trusted = known_calibration(calibration) or DEFAULT_CALIBRATION
    if cost is not None:
        cost = nonnegative("cost", cost, ", or None for the budget rule's own")
    else:
        cost = trusted.fresh_prompt_gain if rule.budget_rule == "variance" else 1.0 / most**2
    options = Options(
        baseline=int(rule.baseline),
        scale=SCALES.index(cast("Scale", choice("scale", rule.scale if scale is None else scale, SCALES))),
        leave_one_out=flag("leave_one_out", leave_one_out) or rule.leave_one_out,
        raw_singleton=choice("singleton", singleton, ("zero", "raw")) == "raw",
        exclude_nonfinite=choice("nonfinite", nonfinite, ("raise", "exclude")) == "exclude",
        low=low,
        high=high,
        eps=nonnegative("eps", eps),
        max_rollouts=most,
        cost=cost,
        calibration=astuple(trusted),
    )
    return rule, options, flag("stats", stats)


# Options repeat at every step, so the checked result is cached.
known_options = lru_cache(maxsize=64, typed=True)(read_options)
