"""Makes optimal.json: `python tests/ops/golden/optimal.py > tests/ops/golden/optimal.json`. It uses fifty digits and no v05.

The success rate has a Beta density around the calibrated prior, mixed with a vague one. Its mean given a group's rewards is the
ratio of two integrals. The baseline of least variance is the successes' share of the energy: p w / (p w + 1 - p), where w is the
ratio of a success's energy to a failure's.
"""

from __future__ import annotations

import json
import math
import statistics

from mpmath import mp

mp.dps = 50
CALIBRATION = {"alpha": 0.3, "beta": 0.8, "kappa": 6.0, "eps": 0.2, "delta0": 0.5, "delta1": 2.0}
REWARDS = [1.0, 0.0, 1.0, 1.0, 0.0, 0.0, 1.0, 0.25, 1.0, 0.0, 1.0]
IDS = [2, 0, 1, 2, 2, 0, 3, 1, 2, 0, 4]
PRIOR = [0.9, 0.15, 0.6, 0.001, math.nan]


def success_rate(rewards: list[float], prior: float) -> float:
    """The mean of the success rate given rewards in [0, 1]."""
    successes = math.fsum(rewards)
    failures = len(rewards) - successes
    parts = [(mp.mpf(1), mp.mpf("0.5"), mp.mpf("0.5"))]
    if not math.isnan(prior):
        v = min(max(prior, 0.005), 0.995)
        q = 1 / (1 + mp.exp(-CALIBRATION["alpha"]) * ((1 - mp.mpf(v)) / v) ** CALIBRATION["beta"])
        eps = mp.mpf(CALIBRATION["eps"])
        parts = [(eps, *parts[0][1:]), (1 - eps, CALIBRATION["kappa"] * q, CALIBRATION["kappa"] * (1 - q))]

    def integral(power: int) -> mp.mpf:
        """The integral of p^(successes + power) (1 - p)^failures over the mixture, one Beta integral for each part."""
        return sum(share * mp.beta(a + successes + power, b + failures) / mp.beta(a, b) for share, a, b in parts)

    return float(integral(1) / integral(0))


def baseline(rewards: list[float], prior: float, low: float, high: float) -> float:
    scaled = [(r - low) / (high - low) for r in rewards]
    value = (prior - low) / (high - low)
    p = success_rate(scaled, value)
    w = math.exp(min(max(CALIBRATION["delta0"] + CALIBRATION["delta1"] * math.log(1 - p), -8.0), 8.0))
    return low + (high - low) * p * w / (p * w + 1 - p)


def case(name: str, rows: int, low: float, high: float) -> dict:
    rewards = [low + (high - low) * r for r in REWARDS[:rows]]
    ids = IDS[:rows]
    groups = max(ids) + 1
    prior = [low + (high - low) * v for v in PRIOR[:groups]]
    advantages, stats = [0.0] * rows, []
    for g in range(groups):
        members = [i for i in range(rows) if ids[i] == g]
        of_group = [rewards[i] for i in members]
        var = statistics.variance(of_group) if len(of_group) > 1 else 0.0
        full = baseline(of_group, prior[g], low, high)
        stats.append({"count": len(members), "mean": statistics.fmean(of_group), "var": var, "baseline": full})
        for i in members:
            advantages[i] = rewards[i] - baseline([rewards[j] for j in members if j != i], prior[g], low, high)
    return {
        "id": name,
        "method": "optimal",
        "rewards": rewards,
        "group_ids": ids,
        "prior": prior,
        "reward_range": [low, high],
        "leave_one_out": False,
        "scale": None,
        "calibration": CALIBRATION,
        "expect": {"advantages": advantages, "stats": stats},
    }


def main() -> None:
    print(json.dumps([case("uneven groups", 11, 0.0, 1.0), case("rewards of -1 and 2", 11, -1.0, 2.0)], indent=1))


if __name__ == "__main__":
    main()
