"""The fields that readers of a run's files rely on: those of each kind of record in metrics.jsonl, and those of result.json.

Fields that earlier versions of v05 did not write are optional. null stands for NaN. Other fields and other kinds are ignored.
"""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from v05.messages import explained_places

Count = Annotated[float, Field(ge=0)]
Histogram = list[Count]  # empty if every group of the step was discarded
Sums = Annotated[list[float], Field(min_length=3, max_length=3)]  # groups, priors, outcomes
TENTHS = 10  # bins of a share


class Fields(BaseModel):
    model_config = ConfigDict(strict=True, frozen=True, allow_inf_nan=False)


class Record(Fields):
    kind: Annotated[str, Field(min_length=1)]


class Evaluation(Record):
    rollouts: Count
    seconds: Count
    accuracy: float
    entropy: float | None
    generated_tokens: Count | None = None
    prior_auc: float | None = None


class Probe(Record):
    rollouts: Count
    baseline_mse: float | None


class Final(Record):
    rollouts: Count
    greedy: float
    mean_at_k: float
    pass_at_k: float
    k: Count


class Step(Record):
    rollouts: Count
    seconds: Count
    generated_tokens: Count | None = None
    thrown_away: Count | None = None
    failures: Count | None = None
    group_size: float | None = None
    prior_rejected: float | None = None
    weight: float | None = None
    hallucination: float | None = None
    grad_norm: float | None = None
    gradient_noise: float | None = None
    group_sizes: Histogram | None = None
    weights: Histogram | None = None
    hallucinations: Histogram | None = None
    prior_outcomes: Annotated[list[Sums], Field(min_length=TENTHS, max_length=TENTHS)] | None = None
    generate_seconds: float | None = None
    verify_seconds: float | None = None
    sample_seconds: float | None = None
    advantage_seconds: float | None = None
    update_seconds: float | None = None
    sync_seconds: float | None = None


class Sampled(Fields):
    """A completion of a record of kind "group"."""

    text: str
    reward: float | None
    advantage: float | None


class Group(Record):
    step: Count
    prompt: str
    answer: str
    size: Count
    mean: float | None
    prior: float | None
    baseline: float | None
    completions: list[Sampled]


class Result(Fields):
    method: str
    seed: Annotated[int, Field(ge=0)]
    accuracy_before: float
    accuracy_after: float
    rollouts: Count
    steps: Count
    seconds: Count
    heldout_samples: Annotated[int, Field(ge=1)] | None = None
    heldout_successes: Annotated[list[Annotated[int, Field(ge=0)]], Field(min_length=1)] | None = None
    greedy: float | None = None
    mean_at_k: float | None = None
    pass_at_k: float | None = None
    k: Count | None = None


KINDS: dict[str, type[Record]] = {"evaluation": Evaluation, "probe": Probe, "final": Final, "step": Step, "group": Group}


def check_record(record: dict[str, Any], where: str) -> None:
    """Raise ValueError, beginning with `where`, if a record of metrics.jsonl is invalid."""
    kind = record.get("kind")
    _check(KINDS.get(kind, Record) if isinstance(kind, str) else Record, record, where)


def check_result(result: dict[str, Any], where: str) -> None:
    """Raise ValueError, beginning with `where`, if the content of result.json is invalid."""
    _check(Result, result, where)


def _check(fields: type[Fields], values: dict[str, Any], where: str) -> None:
    try:
        fields.model_validate(values)
    except ValidationError as error:
        raise ValueError(f"{where} is not as v05 writes it: {explained_places(error)}") from None
