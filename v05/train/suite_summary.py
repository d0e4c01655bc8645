"""What the finished runs of a suite say: the learning rate that tuning takes, and how methods compare."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import fields
from typing import Any

import numpy as np

from v05.methods import REFERENCE
from v05.train.curves import bootstrap_interval, reaching
from v05.train.suite import RIVALS, Suite, tuning_runs
from v05.train.suite_rows import Row

LAST = 2  # evaluations at a tuning run's end whose mean decides
TARGET = f"{REFERENCE.name}@16"  # whose final accuracy the others are to reach


def tuned_rates(suite: Suite, rows: Iterable[Row]) -> dict[tuple[str, str], float]:
    """(mix, tuned spec) -> the learning rate whose run ended highest, by the mean of its last evaluations; of equals the lowest."""
    wanted = {run.key for run in tuning_runs(suite)}
    ends: dict[tuple[str, str], dict[float, float]] = defaultdict(dict)
    for row in rows:
        if row.key in wanted:
            ends[row.mix, row.label][row.learning_rate] = float(row.evaluations()[-LAST:, 3].mean())
    return {key: max(sorted(by_rate), key=lambda rate: by_rate[rate]) for key, by_rate in ends.items()}


def counted(rows: Iterable[Row]) -> dict[str, dict[str, dict[int, Row]]]:
    """The rows that count: mix -> label -> seed -> row."""
    by_mix: dict[str, dict[str, dict[int, Row]]] = defaultdict(lambda: defaultdict(dict))
    for row in rows:
        if row.stage == "count":
            by_mix[row.mix][row.label][row.seed] = row
    return by_mix


def summarise(rows: Iterable[Row]) -> list[dict[str, Any]]:
    """One record per mix and label of the runs that count, in the order of the rows; figures unrounded.

    Besides the means of the rows, of times the medians, which other work on the machine moves least: `seeds`, `accuracy_low`,
    `accuracy_high` (resampling seeds and prompts), and for every rival method the difference to it at the group size where it did
    best, on the seeds that both have (`over_grpo`, `_size`): choosing the rival's best afterwards favours the rival.
    `rollouts_to_grpo` is where the mean curve, straight between evaluations, reaches the final accuracy of grpo@16 for good, on
    the seeds that both have, None where it does not; `tokens_to_grpo` is the same in generated tokens. With two seeds or more
    `_low` and `_high` are their 95 % intervals.
    """
    return [_record(mix, label, by_label) for mix, by_label in counted(rows).items() for label in by_label]


def _record(mix: str, label: str, by_label: Mapping[str, Mapping[int, Row]]) -> dict[str, Any]:
    group = by_label[label]
    rows = list(group.values())
    numbers = [field.name for field in fields(Row) if field.type in ("int", "float") and field.name not in ("seed", "samples")]
    low, high = bootstrap_interval([row.prompt_accuracy for row in rows])
    record: dict[str, Any] = {"mix": mix, "label": label, "seeds": sorted(group)}
    for name in numbers:
        values = [float(getattr(row, name)) for row in rows]
        record[name] = float(np.median(values)) if name.endswith("seconds") else _mean(values)
    record |= {"accuracy_low": low, "accuracy_high": high}
    for rival in RIVALS:
        size = best_size(rival, by_label)
        if size is None or size == label:
            continue
        pairs = [(group[seed], by_label[size][seed]) for seed in group if seed in by_label[size]]
        if pairs:
            differences = [a.prompt_accuracy - b.prompt_accuracy for a, b in pairs]
            record |= {f"over_{rival}": float(np.mean(differences)), f"over_{rival}_size": size}
            if len(pairs) > 1:  # one seed says nothing of the others, which differ more than prompts do
                record[f"over_{rival}_low"], record[f"over_{rival}_high"] = bootstrap_interval(differences)
    target = by_label.get(TARGET, {})
    both = sorted(group.keys() & target.keys())
    for axis in ("rollouts", "tokens") if both else ():
        reached = reaching([group[seed].accuracy_over(axis) for seed in both], [target[seed].accuracy_after for seed in both])
        record[f"{axis}_to_grpo"] = reached.at
        if len(both) > 1:
            record |= {f"{axis}_to_grpo_low": reached.low, f"{axis}_to_grpo_high": reached.high}
    return record


def _mean(values: Sequence[float]) -> float:
    known = [value for value in values if not np.isnan(value)]
    return float(np.mean(known)) if known else float("nan")


def over_best_rival(rows: Iterable[Row], label: str) -> dict[str, float]:
    """How much higher `label` ends than each mix's best rival at its best size, mean over mixes: `over_best`, and with two seeds or
    more `_low` and `_high`, its 95 % interval, resampling seeds, alike in all mixes, and prompts.

    Empty where a mix lacks one of the two, or they share no seed.
    """
    by_mix = counted(rows)
    pairs = []
    for by_label in by_mix.values():
        best = [size for size in (best_size(rival, by_label) for rival in RIVALS) if size is not None]
        if label not in by_label or not best:
            return {}
        ends = {size: float(np.mean([row.accuracy_after for row in by_label[size].values()])) for size in best}
        pairs.append((by_label[label], by_label[max(best, key=lambda size: ends[size])]))
    return _mean_difference(pairs, "over_best")


def over(rows: Iterable[Row], label: str, other: str, mixes: Iterable[str]) -> dict[str, float]:
    """How much higher `label` ends than `other`, mean over `mixes`: `over`, `over_low` and `over_high` as of `over_best_rival`."""
    by_mix = counted(rows)
    return _mean_difference([(by_mix[mix].get(label, {}), by_mix[mix].get(other, {})) for mix in mixes], "over")


def _mean_difference(pairs: Sequence[tuple[Mapping[int, Row], Mapping[int, Row]]], name: str) -> dict[str, float]:
    """Mean over pairs of runs by seed, one pair a mix, on the seeds that all have."""
    seeds = set.intersection(*({*ours} & {*theirs} for ours, theirs in pairs)) if pairs else set()
    if not seeds:
        return {}
    differences = [
        np.concatenate([ours[seed].prompt_accuracy - theirs[seed].prompt_accuracy for ours, theirs in pairs])
        for seed in sorted(seeds)
    ]
    record = {name: float(np.mean(differences))}
    if len(seeds) > 1:
        record[f"{name}_low"], record[f"{name}_high"] = bootstrap_interval(differences)
    return record


def difference(record: Mapping[str, Any], name: str) -> str:
    """A difference of such a record as tables show it, with its interval: "+0.010 [-0.002, +0.021]"."""
    if name not in record:
        return ""
    interval = f" [{record[f'{name}_low']:+.3f}, {record[f'{name}_high']:+.3f}]" if f"{name}_low" in record else ""
    return f"{record[name]:+.3f}{interval}"


def best_size(method: str, by_label: Mapping[str, Mapping[int, Row]]) -> str | None:
    """The label of a method's group size that ended highest, over the seeds that all its sizes have."""
    sizes = {label: group for label, group in by_label.items() if re.fullmatch(rf"{method}@\d+", label)}
    common = set.intersection(*(set(group) for group in sizes.values())) if sizes else set()
    if not common:
        return None
    return max(sizes, key=lambda label: float(np.mean([sizes[label][seed].accuracy_after for seed in common])))
