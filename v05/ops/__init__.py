"""The ops, a room each: drop-in functions on tensors. `fused_advantage` is the entry point."""

from v05.methods import Calibration
from v05.ops.advantage import AdvantageOutput, AdvantageStats, factorize, fused_advantage
from v05.ops.policy_loss import LOSSES, Importance, LossFigures, PolicyLoss, loss_weights, policy_loss
from v05.ops.token_statistics import TokenStatistics, token_statistics

__all__ = [
    "LOSSES",
    "AdvantageOutput",
    "AdvantageStats",
    "Calibration",
    "Importance",
    "LossFigures",
    "PolicyLoss",
    "TokenStatistics",
    "factorize",
    "fused_advantage",
    "loss_weights",
    "policy_loss",
    "token_statistics",
]
