"""The ops, a room each: drop-in functions on tensors. `fused_advantage` is the entry point."""

from v05.methods import Calibration
from v05.ops.advantage import AdvantageOutput, AdvantageStats, factorize, fused_advantage

__all__ = ["AdvantageOutput", "AdvantageStats", "Calibration", "factorize", "fused_advantage"]
