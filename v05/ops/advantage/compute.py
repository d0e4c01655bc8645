"""From read inputs to advantages and statistics."""

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
    """Write `out`, and return the table of `AdvantageStats`: of no group without `stats`.

    Columns that the method does not define are left as they are found: to fill them takes as long as the others.
    """
    count = groups.number if stats else 0
    on_host = out.is_cpu  # where NumPy takes half the time of torch.empty
    table = torch.from_numpy(np.empty((len(STATISTICS), count))) if on_host else empty_table(count, out.device)
    backend(rollouts, groups, prior, options, out, table if stats else None)
    return table
