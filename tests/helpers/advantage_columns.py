"""The statistics of an output, for tests that compare all of them."""

import torch

from v05.ops import AdvantageStats
from v05.ops.advantage.stats import STATISTICS


def columns(stats: AdvantageStats) -> list[torch.Tensor]:
    """The statistics that the method defines. The other columns of the table may hold any values."""
    return [column for name in STATISTICS if (column := getattr(stats, name)) is not None]
