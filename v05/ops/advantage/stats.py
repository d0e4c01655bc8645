"""The statistics of groups: one table with one order of columns, whatever the method, and what is read from it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch

from v05.methods import Baseline

# The columns of a table, in the order of advantage.hpp and kernels/advantage.
STATISTICS = (
    "count",
    "nonfinite",
    "clipped",
    "mean",
    "var",
    "baseline",
    "mse",
    "weight",
    "statistic",
    "hallucination",
    "take_more",
)
COLUMN = {name: place for place, name in enumerate(STATISTICS)}
SOME_DEFINE = STATISTICS[6:]
# Of these, the ones that a baseline defines.
DEFINED: dict[int, tuple[str, ...]] = {
    Baseline.SHRINKAGE: ("mse", "weight", "statistic", "take_more"),
    Baseline.CALIBRATED: ("mse", "hallucination", "take_more"),
    Baseline.LEAST_VARIANCE: ("mse", "hallucination", "take_more"),
}


@dataclass(frozen=True, slots=True, repr=False)
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
        p_value: float64, of T under chi-square with one degree of freedom; a diagnostic, computed when it is asked for (v05).
        hallucination: float64 in [0, 1], probability that the prior says nothing of this group (calibrated).
        take_more: bool, the method's budget rule would buy another rollout (v05, calibrated, optimal).
        nonfinite: int64, NaN or infinite rewards of the group, left out.
        clipped: int64, rewards and priors of the group clipped to `reward_range` (CUDA only; on the CPU they are an error).
        table: float64, (11, G): the columns of `STATISTICS`. Those that the method does not define hold anything.
        method_baseline: the `v05.methods.Baseline`, which says what those are.
    """

    prior: torch.Tensor | None
    table: torch.Tensor
    method_baseline: int

    @property
    def count(self) -> torch.Tensor:
        return self.table[COLUMN["count"]].to(torch.int64)

    @property
    def nonfinite(self) -> torch.Tensor:
        return self.table[COLUMN["nonfinite"]].to(torch.int64)

    @property
    def clipped(self) -> torch.Tensor:
        return self.table[COLUMN["clipped"]].to(torch.int64)

    @property
    def mean(self) -> torch.Tensor:
        return self.table[COLUMN["mean"]]

    @property
    def var(self) -> torch.Tensor:
        return self.table[COLUMN["var"]]

    @property
    def baseline(self) -> torch.Tensor:
        return self.table[COLUMN["baseline"]]

    @property
    def mse(self) -> torch.Tensor | None:
        return self._if_defined("mse")

    @property
    def weight(self) -> torch.Tensor | None:
        return self._if_defined("weight")

    @property
    def statistic(self) -> torch.Tensor | None:
        return self._if_defined("statistic")

    @property
    def p_value(self) -> torch.Tensor | None:
        statistic = self.statistic
        return None if statistic is None else torch.special.erfc((statistic / 2).sqrt())

    @property
    def hallucination(self) -> torch.Tensor | None:
        return self._if_defined("hallucination")

    @property
    def take_more(self) -> torch.Tensor | None:
        more = self._if_defined("take_more")
        return None if more is None else more != 0

    def __repr__(self) -> str:
        values = {name: getattr(self, name) for name in (*STATISTICS, "p_value", "prior")}
        return f"AdvantageStats({', '.join(f'{name}={value}' for name, value in values.items() if value is not None)})"

    def _if_defined(self, name: str) -> torch.Tensor | None:
        return self.table[COLUMN[name]] if name in DEFINED.get(self.method_baseline, ()) else None


# An exported program may return one, and be saved.
torch.export.register_dataclass(AdvantageStats, serialized_type_name="v05.ops.AdvantageStats")


def undefined_columns(baseline: int) -> list[int]:
    """The columns that no method of this baseline defines."""
    defined = DEFINED.get(baseline, ())
    return [COLUMN[name] for name in SOME_DEFINE if name not in defined]


def empty_table(groups: int, device: torch.device) -> torch.Tensor:
    return torch.empty(len(STATISTICS), groups, dtype=torch.float64, device=device)


class AdvantageOutput(NamedTuple):
    """`advantages` in the requested layout and dtype; `stats`, or None when they were not asked for."""

    advantages: torch.Tensor
    stats: AdvantageStats | None
