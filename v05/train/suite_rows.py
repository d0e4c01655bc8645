"""runs.csv: one row per finished run of a suite."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from v05.files import read_text
from v05.train.compare import load_run, mean_of
from v05.train.curves import Curve
from v05.train.suite import Planned, RunKey, Suite

ROWS = "runs.csv"
STAGES = ("generate", "verify", "advantage", "update", "sync")
KINDS = {"int": int, "float": float, "str": str}


@dataclass(frozen=True)
class Row:
    """A finished run, as a row of runs.csv. Means are over the run's steps or probes; NaN if there is nothing to average.

    Attributes:
        stage: "tune" or "count".
        mix, label, seed, learning_rate, total_rollouts: identify the run together with `stage`.
        rollouts, tokens, steps: totals of training.
        accuracy_before, accuracy_after: held-out accuracy.
        group_size: mean rollouts per prompt.
        prior_rejected: mean share of groups whose prior was rejected.
        baseline_mse: mean squared error of the baseline against fresh rollouts, without the first probe.
        grad_norm: mean gradient norm before clipping.
        entropy_before, entropy_after: entropy in nats per token.
        greedy, mean_at_k, pass_at_k, k: final measurements on the held-out prompts, as in result.json.
        prior_auc: AUC of the prior on the held-out prompts, at the end.
        thrown_away: rollouts discarded for lack of signal (DAPO).
        seconds: training time; the other columns in seconds are its stages.
        samples: rollouts per held-out prompt.
        successes: successful rollouts of each held-out prompt at the end, one digit per prompt.
        curve: JSON list of [rollouts, tokens, seconds, accuracy], one per evaluation.
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
    greedy: float
    mean_at_k: float
    pass_at_k: float
    k: int
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
    def key(self) -> RunKey:
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


def in_order(suite: Suite, rows: Iterable[Row]) -> list[Row]:
    """The rows in the order of the suite's mixes and methods. Raises ValueError for a row that does not belong to the suite."""
    rows = list(rows)
    labels = list(suite.specs)
    for row in rows:
        if row.mix not in suite.mixes or row.label not in (*labels, *suite.tuned):
            raise ValueError(f"{ROWS} has a run of {row.label} on {row.mix}, which this suite does not have; give another --out")
    return sorted(rows, key=lambda row: (suite.mixes.index(row.mix), labels.index(row.label) if row.stage == "count" else 0))


def read_rows(directory: Path) -> list[Row]:
    """The rows of a suite's directory; empty if it has no runs.csv."""
    path = directory / ROWS
    return read_csv(path) if path.is_file() else []


def read_csv(path: Path) -> list[Row]:
    """The rows of a runs.csv. Raises ValueError if it has other columns, or naming the line that is not a complete row."""
    reader = csv.DictReader(io.StringIO(read_text(path), newline=""))
    names: list[str] = [field.name for field in fields(Row)]
    try:
        columns = reader.fieldnames
        rows = [_row(line) for line in reader] if columns == names else []
    except (csv.Error, TypeError, ValueError):
        raise ValueError(
            f"{path}:{reader.line_num} is not a complete row; delete the line, and its run will be read again"
        ) from None
    if columns != names:
        raise ValueError(f"{path}: columns {columns} are not those of a suite, {names}; give another --out")
    return rows


def _row(line: Mapping[str, str]) -> Row:
    """The row of a line. Raises TypeError or ValueError if it is incomplete or has invalid values."""
    row = Row(**{field.name: KINDS[str(field.type)](line[field.name]) for field in fields(Row)})
    curve = row.evaluations()
    finite = np.isfinite(curve).all() and np.isfinite([row.accuracy_before, row.accuracy_after, row.learning_rate]).all()
    if len(line) != len(fields(Row)) or curve.ndim != 2 or curve.shape[1:] != (4,) or not finite:
        raise ValueError(line)
    if row.samples < 1 or not (row.successes.isascii() and row.successes.isdecimal()):
        raise ValueError(line)
    return row


def append_row(directory: Path, row: Row) -> None:
    """Append a run to runs.csv, which is created if necessary."""
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
        **{name: run.result.get(name, float("nan")) for name in ("greedy", "mean_at_k", "pass_at_k")},
        k=int(run.result.get("k", 0)),
        prior_auc=aucs[-1] if aucs else float("nan"),
        thrown_away=sum(step.get("thrown_away") or 0 for step in run.steps),
        seconds=run.result["seconds"],
        **{f"{name}_seconds": sum(step.get(f"{name}_seconds") or 0.0 for step in run.steps) for name in STAGES},
        samples=run.result["heldout_samples"],
        successes="".join(str(count) for count in run.result["heldout_successes"]),
        curve=json.dumps(curve),
    )
