"""Makes rivals.json: `python tests/ops/golden/rivals.py > tests/ops/golden/rivals.json`. Exact fractions, and nothing of v05.

Cases of the baselines none, batch, opo and otb, worked out from their definitions: the energy-weighted mean of a group is
sum(e r) / sum(e), of its others with both sums short of the rollout's own; the batch's is the mean of all other rollouts.
"""

from __future__ import annotations

import json
from fractions import Fraction

REWARDS = [1, 0, 1, 1, 0, 0, 1, Fraction(1, 4), 1, 0]
IDS = [2, 0, 1, 2, 2, 0, 3, 1, 2, 0]
ENERGY = [3, 1, 2, 5, 1, 0, 7, 4, Fraction(1, 2), 8]


def mean(values: list[Fraction]) -> Fraction:
    return sum(values, Fraction(0)) / len(values)


def weighted(rows: list[int], rewards: list[Fraction], energy: list[Fraction]) -> Fraction:
    total = sum((energy[i] for i in rows), Fraction(0))
    return sum((energy[i] * rewards[i] for i in rows), Fraction(0)) / total if total else mean([rewards[i] for i in rows])


def case(name: str, method: str, rewards: list[Fraction], ids: list[int], energy: list[Fraction], leave_one_out: bool) -> dict:
    everything = list(range(len(rewards)))
    advantages, stats = [Fraction(0)] * len(rewards), []
    for g in range(max(ids) + 1):
        rows = [i for i in everything if ids[i] == g]
        m = mean([rewards[i] for i in rows])
        var = sum(((rewards[i] - m) ** 2 for i in rows), Fraction(0)) / (len(rows) - 1) if len(rows) > 1 else Fraction(0)
        full = {"none": Fraction(0), "batch": mean(rewards)}.get(method, weighted(rows, rewards, energy))
        stats.append({"count": len(rows), "mean": float(m), "var": float(var), "baseline": float(full)})
        for i in rows:
            others = [row for row in (everything if method == "batch" else rows) if row != i]
            baseline = full
            if method == "batch":
                baseline = mean([rewards[row] for row in others]) if others else rewards[i]
            elif method in ("opo", "otb") and leave_one_out:
                baseline = weighted(others, rewards, energy) if others else rewards[i]
            advantages[i] = rewards[i] - baseline
    return {
        "id": name,
        "method": method,
        "rewards": [float(r) for r in rewards],
        "group_ids": ids,
        "prior": None,
        "energy": [float(e) for e in energy],
        "reward_range": [0.0, 1.0],
        "leave_one_out": leave_one_out,
        "scale": None,
        "calibration": None,
        "expect": {"advantages": [float(a) for a in advantages], "stats": stats},
    }


def main() -> None:
    rewards, energy = [Fraction(r) for r in REWARDS], [Fraction(e) for e in ENERGY]
    cases = []
    for method in ("none", "batch", "opo", "otb"):
        for leave_one_out in (False, True):
            loo = ", leave-one-out" if leave_one_out else ""
            cases.append(case(f"uneven groups{loo}", method, rewards, IDS, energy, leave_one_out))
            cases.append(case(f"one group without energy{loo}", method, rewards[:4], [0] * 4, [Fraction(0)] * 4, leave_one_out))
            cases.append(case(f"one rollout a prompt{loo}", method, rewards[:5], [0, 1, 2, 3, 4], energy[:5], leave_one_out))
    print(json.dumps(cases, indent=1))


if __name__ == "__main__":
    main()
