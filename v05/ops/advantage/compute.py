"""Run a backend on inputs that have been read and checked."""

from __future__ import annotations

import numpy as np
import torch

from v05.ops.advantage.backends import Backend
from v05.ops.advantage.inputs import Groups, Rollouts
from v05.ops.advantage.options import Options
from v05.ops.advantage.stats import STATISTICS, empty_table


def compute(
    rollouts: Rollouts,
    groups: Groups,
    prior: torch.Tensor | None,
    options: Options,
    out: torch.Tensor,
    stats: bool,
    backend: Backend,
) -> torch.Tensor:
    """Write the advantages into `out` and return the (11, G) table of `AdvantageStats`, or an (11, 0) table without `stats`.

    Columns that the method does not define stay uninitialised: filling them would take as long as the other columns.
    """
    count = groups.number if stats else 0
    on_host = out.is_cpu  # np.empty takes half the time of torch.empty there
    table = torch.from_numpy(np.empty((len(STATISTICS), count))) if on_host else empty_table(count, out.device)
    backend(rollouts, groups, prior, options, out, table if stats else None)
    return table
