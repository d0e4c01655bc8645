"""The statistics of groups: a table whose columns are the same for every method, and `AdvantageStats`, which reads it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch

from v05.methods import Baseline

# The columns of the table. advantage.hpp and kernels/advantage have the same order.
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
# The statistics of SOME_DEFINE that each baseline defines.
DEFINED: dict[int, tuple[str, ...]] = {
    Baseline.SHRINKAGE: ("mse", "weight", "statistic", "take_more"),
    Baseline.CALIBRATED: ("mse", "hallucination", "take_more"),
    Baseline.LEAST_VARIANCE: ("mse", "hallucination", "take_more"),
}


@dataclass(frozen=True, slots=True, repr=False)
class AdvantageStats:
    """Statistics of each group as tensors of shape (G,). A statistic that the method does not define is None.

    Statistics describe the full group, also under `leave_one_out`. A group without a valid rollout has count 0, mean NaN and the
    prior as its baseline. Each statistic except the prior is made from `table` when it is read, because making all of them at
    every call would take longer than computing those of a small batch.

    Attributes:
        count: int64, the number of valid rollouts (trajectories) of the group.
        mean: float64, mean reward in reward units.
        var: float64, variance of the rewards in reward units squared, ddof = 1; 0 for a single rollout.
        prior: float64, the prior as given, in reward units; None without a prior.
        baseline: float64, in reward units.
        mse: float64, estimated squared error of the baseline in reward units squared: the plug-in estimate of "v05", or the
            posterior variance of the success rate ("calibrated", "optimal").
        weight: float64 in [0, 1], the weight of the group mean against the prior ("v05").
        statistic: float64, the statistic T = k d^2 of the test whether the prior is right ("v05"). The prior is kept while T <= 1.
            NaN without a prior.
        p_value: float64, the p-value of T under a chi-square distribution with one degree of freedom ("v05"). A diagnostic.
        hallucination: float64 in [0, 1], the probability that the prior is uninformative about this group ("calibrated",
            "optimal").
        take_more: bool, whether the method's budget rule asks for another rollout ("v05", "calibrated", "optimal").
        nonfinite: int64, the number of NaN or infinite rewards, which are excluded.
        clipped: int64, the number of rewards and priors that were clipped to `reward_range`. Always 0 on the CPU, where such a
            value is an error.
        table: float64, (11, G), the rows of `STATISTICS`. Rows that the method does not define have arbitrary values.
        method_baseline: the number of the method's `v05.methods.Baseline`, which decides what statistics are defined.
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


# So that an exported program can return one and be saved.
torch.export.register_dataclass(AdvantageStats, serialized_type_name="v05.ops.AdvantageStats")


def undefined_columns(baseline: int) -> list[int]:
    """The places in `STATISTICS` of the statistics that methods with this baseline do not define."""
    defined = DEFINED.get(baseline, ())
    return [COLUMN[name] for name in SOME_DEFINE if name not in defined]


def empty_table(groups: int, device: torch.device) -> torch.Tensor:
    return torch.empty(len(STATISTICS), groups, dtype=torch.float64, device=device)


class AdvantageOutput(NamedTuple):
    """The result of `fused_advantage`.

    Attributes:
        advantages: (N,), (N, T) or (total_tokens,) in the requested dtype, reward units unless a scale divides them.
        stats: the statistics of each group; None with stats=False.
    """

    advantages: torch.Tensor
    stats: AdvantageStats | None
