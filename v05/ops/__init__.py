"""The ops: functions on tensors, each in a package of its own.

- `fused_advantage` turns rewards and a value prior into advantages and group statistics. Start here.
- `policy_loss` turns log-probabilities and advantages into a policy-gradient loss.
- `token_statistics` computes log-probabilities, entropies and energies of tokens from logits or hidden states.
"""

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
