"""Results of a suite from its finished runs: the learning rates that tuning chooses, and the comparison of methods."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import fields
from typing import Any

import numpy as np

from v05.methods import REFERENCE
from v05.train.curves import bootstrap_interval, bootstrap_interval_over_mixes, reaching
from v05.train.suite import RIVALS, Suite, tuning_runs
from v05.train.suite_rows import Row

LAST = 2  # number of final evaluations whose mean accuracy decides a tuning
TARGET = f"{REFERENCE.name}@16"  # the other methods are to reach its final accuracy


def tuned_rates(suite: Suite, rows: Iterable[Row]) -> dict[tuple[str, str], float]:
    """(mix, tuned spec) -> best learning rate, by the mean accuracy of the last evaluations; the lowest rate if several are
    equal."""
    wanted = {run.key for run in tuning_runs(suite)}
    ends: dict[tuple[str, str], dict[float, float]] = defaultdict(dict)
    for row in rows:
        if row.key in wanted:
            ends[row.mix, row.label][row.learning_rate] = float(row.evaluations()[-LAST:, 3].mean())
    return {key: max(sorted(by_rate), key=lambda rate: by_rate[rate]) for key, by_rate in ends.items()}


def counted(rows: Iterable[Row]) -> dict[str, dict[str, dict[int, Row]]]:
    """The rows of counted runs: mix -> label -> seed -> row."""
    by_mix: dict[str, dict[str, dict[int, Row]]] = defaultdict(lambda: defaultdict(dict))
    for row in rows:
        if row.stage == "count":
            by_mix[row.mix][row.label][row.seed] = row
    return by_mix


def summarise(rows: Iterable[Row]) -> list[dict[str, Any]]:
    """One record per mix and label of the counted runs, in the order of the rows. Numbers are not rounded.

    A record has the means of the rows' numbers, and the medians of times, because other work on the machine affects medians least.
    It also has:

    - `seeds`; `accuracy_low` and `accuracy_high`, the 95 % interval from resampling seeds and prompts.
    - `over_RIVAL` and `over_RIVAL_size` for every rival method: the difference in accuracy to the rival's best group size, on the
      seeds that both have. Choosing the best size after the fact favours the rival.
    - `rollouts_to_grpo`: the rollouts after which the mean curve, linear between evaluations, stays at or above the final accuracy
      of grpo@16, on the seeds that both have; None if it never does. `tokens_to_grpo` counts generated tokens instead.

    With two or more seeds, `_low` and `_high` are the 95 % intervals of these values.
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
            # The interval of one seed would ignore the differences among seeds, which are larger than those among prompts.
            if len(pairs) > 1:
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
    """How much higher `label` ends than each mix's best rival at its best size, mean over mixes: `over_best`.

    With two or more seeds in every mix, `over_best_low` and `over_best_high` are its 95 % interval from resampling each mix's seeds
    and prompts. Empty if a mix lacks `label` or a rival, or if they share no seed.
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
    """How much higher `label` ends than `other`, mean over `mixes`: `over`, `over_low` and `over_high`, as in `over_best_rival`."""
    by_mix = counted(rows)
    return _mean_difference([(by_mix[mix].get(label, {}), by_mix[mix].get(other, {})) for mix in mixes], "over")


def _mean_difference(pairs: Sequence[tuple[Mapping[int, Row], Mapping[int, Row]]], name: str) -> dict[str, float]:
    """The mean over pairs, one per mix, of the difference between two methods' runs by seed, on the seeds that both have."""
    by_mix = [
        [ours[seed].prompt_accuracy - theirs[seed].prompt_accuracy for seed in sorted({*ours} & {*theirs})]
        for ours, theirs in pairs
    ]
    if not by_mix or not all(by_mix):
        return {}
    record = {name: float(np.mean([np.mean(differences) for differences in by_mix]))}
    if min(map(len, by_mix)) > 1:
        record[f"{name}_low"], record[f"{name}_high"] = bootstrap_interval_over_mixes(by_mix)
    return record


def difference(record: Mapping[str, Any], name: str) -> str:
    """A difference from a record as text for a table, with its interval: "+0.010 [-0.002, +0.021]"."""
    if name not in record:
        return ""
    interval = f" [{record[f'{name}_low']:+.3f}, {record[f'{name}_high']:+.3f}]" if f"{name}_low" in record else ""
    return f"{record[name]:+.3f}{interval}"


def best_size(method: str, by_label: Mapping[str, Mapping[int, Row]]) -> str | None:
    """The label of the fixed group size at which the method ended highest, on the seeds that all its sizes have."""
    sizes = {label: group for label, group in by_label.items() if re.fullmatch(rf"{method}@\d+", label)}
    common = set.intersection(*(set(group) for group in sizes.values())) if sizes else set()
    if not common:
        return None
    return max(sizes, key=lambda label: float(np.mean([sizes[label][seed].accuracy_after for seed in common])))
