"""Makes rivals.json: `python tests/ops/golden/rivals.py > tests/ops/golden/rivals.json`. It uses exact fractions and no v05.

The cases of none, batch, batch_energy, opo, otb, js, ebpo and maxrl follow from their definitions:

- opo, otb: the energy-weighted mean of a group, sum(e r) / sum(e). With leave-one-out both sums are without the rollout's own.
- batch, batch_energy: the plain or energy-weighted mean of all other rollouts of the batch.
- js: the mean of the group's other rollouts, shrunk towards the mean of the other groups' means by v / (v + s).
- ebpo: (1 - S) mean + S prior with S = (s2 / k) / (s2 / k + tau2).
- maxrl: the group's mean. The difference between reward and mean is divided by the mean.
"""

from __future__ import annotations

import json
import math
from fractions import Fraction

REWARDS = [1, 0, 1, 1, 0, 0, 1, Fraction(1, 4), 1, 0]
IDS = [2, 0, 1, 2, 2, 0, 3, 1, 2, 0]
ENERGY = [3, 1, 2, 5, 1, 0, 7, 4, Fraction(1, 2), 8]


def mean(values: list[Fraction]) -> Fraction:
    return sum(values, Fraction(0)) / len(values)


def weighted(rows: list[int], rewards: list[Fraction], energy: list[Fraction]) -> Fraction:
    total = sum((energy[i] for i in rows), Fraction(0))
    return sum((energy[i] * rewards[i] for i in rows), Fraction(0)) / total if total else mean([rewards[i] for i in rows])


def variance(values: list[Fraction]) -> Fraction:
    return sum(((value - mean(values)) ** 2 for value in values), Fraction(0)) / (len(values) - 1)


def shrunk(g: int, without: int | None, rewards: list[Fraction], ids: list[int]) -> Fraction | None:
    """js: the baseline of group g, for its rollout `without` if one is left out. None if there is nothing to compare with."""
    groups = {i: [r for r, of in zip(rewards, ids, strict=True) if of == i] for i in set(ids)}
    others = [mean(members) for i, members in groups.items() if i != g]
    own = [r for i, r in enumerate(rewards) if ids[i] == g and i != without]
    several = [members for members in groups.values() if len(members) > 1]
    if not others:
        return mean(own) if own else None
    if len(groups[g]) == 1:
        return mean(others)
    v = mean([variance(members) / (len(members) - (without is not None)) for members in several])
    s = max(Fraction(0), variance([*others, mean(groups[g])]) - mean([variance(members) / len(members) for members in several]))
    weight = v / (v + s) if v + s else Fraction(0)
    return (1 - weight) * mean(own) + weight * mean(others)


def case(name: str, method: str, rewards: list[Fraction], ids: list[int], energy: list[Fraction], leave_one_out: bool) -> dict:
    everything = list(range(len(rewards)))
    advantages, stats = [Fraction(0)] * len(rewards), []
    for g in range(max(ids) + 1):
        rows = [i for i in everything if ids[i] == g]
        m = mean([rewards[i] for i in rows])
        var = variance([rewards[i] for i in rows]) if len(rows) > 1 else Fraction(0)
        of_batch = {"batch": mean(rewards), "batch_energy": weighted(everything, rewards, energy)}
        full = {"none": Fraction(0), **of_batch}.get(method, weighted(rows, rewards, energy))
        if method == "js":
            full = shrunk(g, None, rewards, ids)
        stats.append({"count": len(rows), "mean": float(m), "var": float(var), "baseline": float(full)})
        for i in rows:
            others = [row for row in (everything if method in of_batch else rows) if row != i]
            baseline = full
            if method == "batch":
                baseline = mean([rewards[row] for row in others]) if others else rewards[i]
            elif method == "js":
                left = shrunk(g, i, rewards, ids)
                baseline = rewards[i] if left is None else left
            elif method == "batch_energy" or (method in ("opo", "otb") and leave_one_out):
                baseline = weighted(others, rewards, energy) if others else rewards[i]
            advantages[i] = rewards[i] - baseline
    return of(method, name, rewards, ids, advantages, stats, leave_one_out) | {"energy": [float(e) for e in energy]}


def fused(own: list[Fraction], prior: Fraction | None, within: Fraction, among: Fraction) -> Fraction | None:
    """ebpo: the baseline of rollouts with these rewards. None if there is nothing to compare with."""
    if not own:
        return prior
    share = (within / len(own)) / (within / len(own) + among)
    return mean(own) if prior is None else (1 - share) * mean(own) + share * prior


def ebpo(name: str, rewards: list[Fraction], ids: list[int], priors: list[Fraction | None], leave_one_out: bool) -> dict:
    within, among = Fraction(3, 16), Fraction(1, 16)
    stats, advantages = [], [Fraction(0)] * len(rewards)
    for g in range(max(ids) + 1):
        rows = [i for i in range(len(rewards)) if ids[i] == g]
        own = [rewards[i] for i in rows]
        full = fused(own, priors[g], within, among)
        var = variance(own) if len(own) > 1 else Fraction(0)
        stats.append({"count": len(rows), "mean": float(mean(own)), "var": float(var), "baseline": float(full)})
        for i in rows:
            left = fused([rewards[row] for row in rows if row != i], priors[g], within, among) if leave_one_out else full
            alone = len(rows) == 1 and priors[g] is None
            advantages[i] = Fraction(0) if alone else rewards[i] - left
    return of("ebpo", name, rewards, ids, advantages, stats, leave_one_out) | {
        "prior": [math.nan if prior is None else float(prior) for prior in priors],
        "calibration": {"kappa": float(within / among)},
    }


def maxrl(name: str, rewards: list[Fraction], ids: list[int]) -> dict:
    stats, advantages = [], [Fraction(0)] * len(rewards)
    for g in range(max(ids) + 1):
        rows = [i for i in range(len(rewards)) if ids[i] == g]
        m = mean([rewards[i] for i in rows])
        var = variance([rewards[i] for i in rows]) if len(rows) > 1 else Fraction(0)
        stats.append({"count": len(rows), "mean": float(m), "var": float(var), "baseline": float(m)})
        for i in rows:
            advantages[i] = (rewards[i] - m) / m if m else Fraction(0)
    return of("maxrl", name, rewards, ids, advantages, stats, False)


def of(method: str, name: str, rewards: list[Fraction], ids: list[int], advantages: list, stats: list, leave_one_out: bool) -> dict:
    return {
        "id": name,
        "method": method,
        "rewards": [float(r) for r in rewards],
        "group_ids": ids,
        "prior": None,
        "reward_range": [0.0, 1.0],
        "leave_one_out": leave_one_out,
        "scale": None,
        "calibration": None,
        "expect": {"advantages": [float(a) for a in advantages], "stats": stats},
    }


def main() -> None:
    rewards, energy = [Fraction(r) for r in REWARDS], [Fraction(e) for e in ENERGY]
    cases = []
    for method in ("none", "batch", "batch_energy", "opo", "otb"):
        for leave_one_out in (False, True):
            loo = ", leave-one-out" if leave_one_out else ""
            cases.append(case(f"uneven groups{loo}", method, rewards, IDS, energy, leave_one_out))
            cases.append(case(f"one group without energy{loo}", method, rewards[:4], [0] * 4, [Fraction(0)] * 4, leave_one_out))
            cases.append(case(f"one rollout a prompt{loo}", method, rewards[:5], [0, 1, 2, 3, 4], energy[:5], leave_one_out))
    js = {
        "uneven groups": (rewards, IDS),
        "chance explains all": ([Fraction(r) for r in (1, 0, 1, 0, 0, Fraction(1, 4))], [0, 0, 1, 1, 2, 2]),  # s = 0
        "two rollouts a prompt or three": ([Fraction(r) for r in (1, 1, 0, 0, 1, 0, 0, Fraction(1, 4))], [0, 0, 1, 1, 2, 2, 1, 0]),
        "two rollouts a prompt": ([Fraction(r) for r in (1, 1, 0, 0, 1, 0, 0, 0)], [0, 0, 1, 1, 2, 2, 3, 3]),
        "groups far apart, one of one rollout": ([Fraction(r) for r in (10, 9, 0, 1, 0, 5)], [0, 0, 1, 1, 1, 2]),
        "no noise": ([Fraction(r) for r in (1, 1, 0, 0, 1)], [0, 0, 1, 1, 2]),
        "all equal": ([Fraction(1, 2)] * 4, [0, 0, 1, 1]),
        "one group": (rewards[:4], [0] * 4),
        "one rollout a prompt": (rewards[:5], [0, 1, 2, 3, 4]),
        "one rollout": (rewards[:1], [0]),
    }
    for name, (values, ids) in js.items():
        cases.append(case(name, "js", values, ids, [Fraction(0)] * len(values), False))
    priors = [Fraction(1, 8), None, Fraction(3, 4), Fraction(1, 2), None]
    for leave_one_out in (False, True):
        loo = ", leave-one-out" if leave_one_out else ""
        cases.append(ebpo(f"uneven groups{loo}", rewards, IDS, priors[:4], leave_one_out))
        cases.append(ebpo(f"one rollout a prompt{loo}", rewards[:5], [0, 1, 2, 3, 4], priors, leave_one_out))
    cases.append(maxrl("uneven groups", rewards, IDS))
    cases.append(maxrl("all failed, all succeeded", [Fraction(r) for r in (0, 0, 0, 1, 1)], [0, 0, 0, 1, 1]))
    cases.append(maxrl("one rollout a prompt", rewards[:5], [0, 1, 2, 3, 4]))
    print(json.dumps(cases, indent=1))


if __name__ == "__main__":
    main()
