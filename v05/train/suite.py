"""Suites: experiments over several task mixes, with a learning rate tuned for each method, as `v05 compare --suite` runs them.

    v05 compare --suite headline --out runs/headline

First every method of `Suite.tuned` is tuned on every mix: one seed, fewer rollouts, other held-out prompts. Then every method runs
with every seed at the rate that won. A run that ends becomes a row of runs.csv, which holds all that tables and figures are made
of; a run that has a row is not run again, so the suite goes on where it stopped, in other processes or on another day.
"""

from __future__ import annotations

import csv
import io
import json
import re
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from v05.files import read_text
from v05.methods import METHODS, REFERENCE
from v05.train.compare import load_run, mean_of
from v05.train.config import EvaluationConfig, RunConfig, run_config
from v05.train.curves import Curve, bootstrap_interval, reaching

ROWS = "runs.csv"
TUNING_SEED = 1000  # no seed that counts
LAST = 2  # evaluations at a tuning run's end whose mean decides
STAGES = ("generate", "verify", "advantage", "update", "sync")
RIVALS = tuple(method.name for method in METHODS.values() if method.rival)
TARGET = f"{REFERENCE.name}@16"  # whose final accuracy the others are to reach
KINDS = {"int": int, "float": float, "str": str}


@dataclass(frozen=True)
class Suite:
    """An experiment.

    Attributes:
        mixes: presets.
        tuned: what is tuned -> what runs at its learning rate; as `run_config` reads it.
        ablations: what is tuned -> what else runs at its learning rate, on the first mix only.
        learning_rates: that are tried.
        rollouts, tuning_rollouts: of a run.
        seeds: of a method.
        evaluation: of a run.
    """

    mixes: tuple[str, ...]
    tuned: Mapping[str, tuple[str, ...]]
    ablations: Mapping[str, tuple[str, ...]]
    learning_rates: tuple[float, ...]
    rollouts: int
    tuning_rollouts: int
    seeds: int
    evaluation: EvaluationConfig


SUITES = {
    "headline": Suite(
        mixes=("arithmetic", "symbols", "hard"),
        tuned={f"{rival}@{small}": (f"{rival}@{small // 2}", f"{rival}@{small}") for rival in RIVALS for small in (4, 16)}
        | {
            "v05@4": ("v05@2", "v05@4"),
            "v05@4..16": ("v05@4..16", "v05@4..16+oracle", "v05@4..16+noise", "v05@4..16+weighting=rollout"),
            "calibrated@2": ("calibrated@1", "calibrated@2", "calibrated@4"),
            "calibrated@2..16": ("calibrated@1..16", "calibrated@2..16"),
            "prior@1": ("prior@1",),
        },
        ablations={
            "v05@4": ("v05@1", "v05@8", "v05@4+noise"),
            "v05@4..16": ("v05@4..16+cost=0.00123", "v05@4..16+cost=0.0123"),  # a decade around 1/256
            "calibrated@2": ("calibrated@4+noise",),
            "dr_grpo@4": ("rloo@4",),
            "grpo@16": ("grpo@16+clip=10",),
            "dapo@16": ("dapo@16+clip=10",),
        },
        learning_rates=(3e-5, 1e-4, 3e-4, 1e-3),
        rollouts=24_576,
        tuning_rollouts=8_192,
        seeds=5,
        evaluation=EvaluationConfig(evaluations=4, prompts=1024, samples=2, probe_prompts=16, probe_samples=64),
    ),
    "smoke": Suite(  # a minute, for tests of the pipeline
        mixes=("smoke",),
        tuned={"grpo@4": ("grpo@4",), "v05@4": ("v05@4", "v05@2..8+oracle")},
        ablations={"grpo@4": ("rloo@4",)},
        learning_rates=(1e-4, 1e-3),
        rollouts=128,
        tuning_rollouts=64,
        seeds=2,
        evaluation=EvaluationConfig(evaluations=2, prompts=8, samples=2, probe_prompts=4, probe_samples=16),
    ),
}


@dataclass(frozen=True)
class Row:
    """A finished run: a line of runs.csv. Means are over the run's steps or probes; NaN where there is nothing to average.

    Attributes:
        stage: "tune" or "count".
        mix, label, seed, learning_rate, total_rollouts: what was run; no two rows share them all.
        rollouts, tokens, steps: spent.
        accuracy_before, accuracy_after: on the held-out prompts.
        group_size: rollouts a prompt.
        prior_rejected: share of groups whose prior was.
        baseline_mse: squared error of the baseline against fresh rollouts, without the first probe.
        grad_norm: before clipping.
        entropy_before, entropy_after: nats a token.
        prior_auc: of the prior on the held-out prompts, at the end.
        thrown_away: rollouts without signal (DAPO).
        seconds: of training, and its stages.
        samples: rollouts a held-out prompt.
        successes: of each held-out prompt at the end, a digit each.
        curve: [[rollouts, tokens, seconds, accuracy], ...] of each evaluation, as JSON.
    """

    stage: str
    mix: str
    label: str
    seed: int
    learning_rate: float
    total_rollouts: int
    rollouts: int
    tokens: int
    steps: int
    accuracy_before: float
    accuracy_after: float
    group_size: float
    prior_rejected: float
    baseline_mse: float
    grad_norm: float
    entropy_before: float
    entropy_after: float
    prior_auc: float
    thrown_away: int
    seconds: float
    generate_seconds: float
    verify_seconds: float
    advantage_seconds: float
    update_seconds: float
    sync_seconds: float
    samples: int
    successes: str
    curve: str

    @property
    def key(self) -> tuple[str, str, str, int, float, int]:
        return self.stage, self.mix, self.label, self.seed, self.learning_rate, self.total_rollouts

    @property
    def prompt_accuracy(self) -> NDArray[np.float64]:
        """(P,) final accuracy on each held-out prompt."""
        return np.array([int(digit) for digit in self.successes]) / self.samples

    def evaluations(self) -> NDArray[np.float64]:
        """(E, 4) rollouts, tokens, seconds and accuracy of each evaluation."""
        return np.array(json.loads(self.curve))

    def accuracy_over(self, axis: str) -> Curve:
        """The learning curve over "rollouts" or "tokens"."""
        evaluations = self.evaluations()
        return evaluations[:, ("rollouts", "tokens").index(axis)], evaluations[:, 3]


@dataclass(frozen=True)
class Planned:
    """A run of a suite: its configuration, and what its row will be known by."""

    stage: str
    mix: str
    label: str
    config: RunConfig

    @property
    def key(self) -> tuple[str, str, str, int, float, int]:
        config = self.config
        return self.stage, self.mix, self.label, config.seed, config.optimizer.learning_rate, config.total_rollouts

    @property
    def name(self) -> str:
        """Its directory, below the suite's."""
        rate = f"-lr{self.config.optimizer.learning_rate:g}" if self.stage == "tune" else ""
        return f"{self.stage}/{self.mix}/{self.label}{rate}-seed{self.config.seed}"


def tuning_runs(suite: Suite) -> list[Planned]:
    """What decides the learning rates."""
    evaluation = suite.evaluation.model_copy(update={"skip": suite.evaluation.prompts})  # not those that count
    return [
        _planned("tune", mix, spec, TUNING_SEED, rate, suite.tuning_rollouts, evaluation)
        for mix in suite.mixes
        for spec in suite.tuned
        for rate in suite.learning_rates
    ]


def counted_runs(suite: Suite, rates: Mapping[tuple[str, str], float], seeds: int) -> list[Planned]:
    """The runs that count, seed by seed: what is finished early compares all methods."""
    return [
        _planned("count", mix, spec, seed, rates[mix, tuned], suite.rollouts, suite.evaluation)
        for seed in range(seeds)
        for mix in suite.mixes
        for tuned, specs in (*suite.tuned.items(), *(suite.ablations.items() if mix == suite.mixes[0] else ()))
        for spec in specs
    ]


def _planned(stage: str, mix: str, spec: str, seed: int, rate: float, rollouts: int, evaluation: EvaluationConfig) -> Planned:
    optimizer = {"learning_rate": rate}
    run = run_config(mix, spec, seed=seed, optimizer=optimizer, total_rollouts=rollouts, evaluation=evaluation)
    return Planned(stage, mix, spec, run)


def tuned_rates(suite: Suite, rows: Iterable[Row]) -> dict[tuple[str, str], float]:
    """(mix, tuned spec) -> the learning rate whose run ended highest, by the mean of its last evaluations; of equals the lowest."""
    wanted = {run.key for run in tuning_runs(suite)}
    ends: dict[tuple[str, str], dict[float, float]] = defaultdict(dict)
    for row in rows:
        if row.key in wanted:
            ends[row.mix, row.label][row.learning_rate] = float(row.evaluations()[-LAST:, 3].mean())
    return {key: max(sorted(by_rate), key=lambda rate: by_rate[rate]) for key, by_rate in ends.items()}


def in_order(suite: Suite, rows: Iterable[Row]) -> list[Row]:
    """The rows as the suite lists its mixes and methods, whichever ended first; ValueError for one that is not of the suite."""
    rows = list(rows)
    labels = [spec for specs in (*suite.tuned.values(), *suite.ablations.values()) for spec in specs]
    for row in rows:
        if row.mix not in suite.mixes or row.label not in (*labels, *suite.tuned):
            raise ValueError(f"{ROWS} has a run of {row.label} on {row.mix}, which this suite has not; give another --out")
    return sorted(rows, key=lambda row: (suite.mixes.index(row.mix), labels.index(row.label) if row.stage == "count" else 0))


def read_rows(directory: Path) -> list[Row]:
    """The rows of a suite's directory; none where it has none."""
    path = directory / ROWS
    return read_csv(path) if path.is_file() else []


def read_csv(path: Path) -> list[Row]:
    """The rows of a suite's file; ValueError where it has other columns, or names the line that is no row."""
    reader = csv.DictReader(io.StringIO(read_text(path), newline=""))
    names: list[str] = [field.name for field in fields(Row)]
    try:
        columns = reader.fieldnames
        rows = [_row(line) for line in reader] if columns == names else []
    except (csv.Error, TypeError, ValueError):
        raise ValueError(f"{path}:{reader.line_num} is no whole row; delete the line, and its run is read again") from None
    if columns != names:
        raise ValueError(f"{path}: columns {columns} are not those of a suite, {names}; give another --out")
    return rows


def _row(line: Mapping[str, str]) -> Row:
    """The row of a line; TypeError or ValueError where it is cut, or has other values than rows have."""
    row = Row(**{field.name: KINDS[str(field.type)](line[field.name]) for field in fields(Row)})
    curve = row.evaluations()
    finite = np.isfinite(curve).all() and np.isfinite([row.accuracy_before, row.accuracy_after, row.learning_rate]).all()
    if len(line) != len(fields(Row)) or curve.ndim != 2 or curve.shape[1:] != (4,) or not finite:
        raise ValueError(line)
    if row.samples < 1 or not (row.successes.isascii() and row.successes.isdecimal()):
        raise ValueError(line)
    return row


def append_row(directory: Path, row: Row) -> None:
    """Add a run to runs.csv."""
    path = directory / ROWS
    fresh = not path.exists()
    with path.open("a", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, [field.name for field in fields(Row)], lineterminator="\n")
        if fresh:
            writer.writeheader()
        writer.writerow(asdict(row))


def row_of(planned: Planned, directory: Path) -> Row:
    """The row of a finished run directory."""
    run = load_run(planned.label, directory)
    curve = [[e["rollouts"], e["generated_tokens"], round(e["seconds"], 3), e["accuracy"]] for e in run.evaluations]
    aucs = [e["prior_auc"] for e in run.evaluations if e.get("prior_auc") is not None]
    stage, mix, label, seed, rate, total = planned.key
    return Row(
        stage=stage,
        mix=mix,
        label=label,
        seed=seed,
        learning_rate=rate,
        total_rollouts=total,
        rollouts=run.result["rollouts"],
        tokens=curve[-1][1],
        steps=run.result["steps"],
        accuracy_before=run.result["accuracy_before"],
        accuracy_after=run.result["accuracy_after"],
        group_size=mean_of(run.steps, "group_size"),
        prior_rejected=mean_of(run.steps, "prior_rejected"),
        baseline_mse=mean_of(run.probes[1:], "baseline_mse"),
        grad_norm=mean_of(run.steps, "grad_norm"),
        entropy_before=mean_of(run.evaluations[:1], "entropy"),
        entropy_after=mean_of(run.evaluations[-1:], "entropy"),
        prior_auc=aucs[-1] if aucs else float("nan"),
        thrown_away=sum(step.get("thrown_away") or 0 for step in run.steps),
        seconds=run.result["seconds"],
        **{f"{name}_seconds": sum(step.get(f"{name}_seconds") or 0.0 for step in run.steps) for name in STAGES},
        samples=run.result["heldout_samples"],
        successes="".join(str(count) for count in run.result["heldout_successes"]),
        curve=json.dumps(curve),
    )


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
