"""Reads histories of policies from disk and splits them into queries and contexts.

A file holds JSON lines with policy, prompt, score and trials, the format of V0. `policy` is model@step, and the versions of a model
are ordered by step. `score` is the mean reward in [-1, 1] of `trials` rollouts. A row may have a `split`: "test" rows are queries
to report on, "train" rows are queries to train on, and all other rows are context. Without it, a hash of the prompt's text decides.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from v05.files import read_objects
from v05.prior.v0.context import Context, History, Past

TEST_SHARE, TRAIN_SHARE = 0.2, 0.1  # shares of the prompts, for rows without a split
SEEN_SHARE = 0.25  # largest share of a version's context rows that become "seen" queries


@dataclass(frozen=True)
class Row:
    """Outcome of one prompt under one version of a policy.

    Attributes:
        model, step: the policy's name before and after its last "@". If the part after it is no number, the step is the policy's
            order of appearance.
        rate: success rate in [0, 1].
        split: "context", "train" or "test".
    """

    model: str
    step: float
    prompt: str
    rate: float
    trials: float
    split: str


@dataclass(frozen=True)
class Queries:
    """Queries under one version of a policy, with the context to predict them from.

    Attributes:
        policy: model@step.
        setting: "unseen" for prompts that the history never held, "seen" for prompts that it held under earlier versions, "train"
            for prompts to train on.
        context: the context that the policy's history held at that version.
        past: the past of the Q prompts before that version.
        rows: the Q rows to predict.
    """

    policy: str
    setting: str
    context: Context
    past: Past
    rows: list[Row]


def read_logs(paths: Sequence[Path]) -> list[Row]:
    """The rows of JSON-lines files.

    Raises:
        ValueError: a row lacks a field or has a value out of bounds (the message names file and line), or there is no row.
        OSError: a file cannot be read.
    """
    rows: list[Row] = []
    order: dict[str, int] = {}
    for path in paths:
        rows += [_row(fields, f"{path}, line {number}", order) for number, fields in read_objects(Path(path))]
    if not rows:
        raise ValueError(f"{', '.join(map(str, paths))}: no rows; a line is {{policy, prompt, score, trials}}")
    return rows


def _row(fields: dict[str, Any], where: str, order: dict[str, int]) -> Row:
    try:
        policy, prompt = str(fields["policy"]), fields["prompt"]
        score, trials = float(fields["score"]), float(fields["trials"])
    except (ValueError, TypeError, KeyError, OverflowError) as error:
        raise ValueError(f"{where}: {error!r}; a line is a JSON object with policy, prompt, score and trials") from None
    if not isinstance(prompt, str):
        raise ValueError(f"{where}: prompt={prompt!r} is not text; give the prompt as the policy reads it")
    if not -1 <= score <= 1:
        raise ValueError(f"{where}: score={score} is outside [-1, 1]; give the mean of rewards scaled to -1 (wrong) and 1 (right)")
    if not (trials >= 1 and math.isfinite(trials)):
        raise ValueError(f"{where}: trials={trials} is not a number of rollouts; leave out prompts without a rollout")
    model, _, step = policy.rpartition("@")
    appearance = order.setdefault(policy, len(order))
    split = fields.get("split")
    split = _split_of(prompt) if split is None else split if split in ("train", "test") else "context"
    return Row(model or policy, float(step) if model and _is_number(step) else appearance, prompt, (score + 1) / 2, trials, split)


def _is_number(text: str) -> bool:
    try:
        return math.isfinite(float(text))
    except ValueError:
        return False


def share(text: str) -> float:
    """A hash of the text as a number in [0, 1)."""
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big") / 2**64


def _split_of(prompt: str) -> str:
    # The prefix matters: training runs choose held-out prompts by the hash of the bare text, so all of those would be "test".
    number = share(f"split {prompt}")
    return "test" if number < TEST_SHARE else "train" if number < TEST_SHARE + TRAIN_SHARE else "context"


def walk(rows: Sequence[Row], context_size: int) -> Iterator[Queries]:
    """The queries of every version of every model. Their context comes from earlier versions and the version's own context rows.

    Test prompts never enter a history, so they stay unseen. "Seen" queries are rows of a version whose prompts the history already
    holds from earlier versions. At most SEEN_SHARE of a version's context rows become "seen" queries, and the context omits them.
    """
    for model in dict.fromkeys(row.model for row in rows):
        history, held = History(), set[str]()
        mine = [row for row in rows if row.model == model]
        for step in sorted({row.step for row in mine}):
            policy = f"{model}@{step:g}"
            version = _pooled([row for row in mine if row.step == step])
            context = [row for row in version if row.split != "test"]
            again = sorted((row for row in context if row.prompt in held), key=lambda row: share(f"{policy} {row.prompt}"))
            seen = again[: max(1, int(SEEN_SHARE * len(context)))] if len(context) > 1 else []
            held_back = {row.prompt for row in seen}
            rest = [row for row in context if row.prompt not in held_back]
            asked = {
                "unseen": [row for row in version if row.split == "test" and row.prompt not in held],
                "seen": seen + [row for row in version if row.split == "test" and row.prompt in held],
                "train": [row for row in rest if row.split == "train"],
            }
            pasts = {setting: history.past([row.prompt for row in queries]) for setting, queries in asked.items()}
            kept = [row for row in rest if row.split == "context"]
            if not kept:
                continue
            history.add(*_columns(kept))
            now = history.context(context_size)
            for setting, queries in asked.items():
                if queries:
                    yield Queries(policy, setting, now, pasts[setting], queries)
            history.extend(*_columns(seen + asked["train"]))
            held |= {row.prompt for row in context}


def _columns(rows: list[Row]) -> tuple[list[str], NDArray[np.float64], NDArray[np.float64]]:
    return [row.prompt for row in rows], np.array([row.rate for row in rows]), np.array([row.trials for row in rows])


def _pooled(rows: list[Row]) -> list[Row]:
    """One row per prompt: the rollouts of a prompt that occurs several times are pooled."""
    pooled: dict[str, Row] = {}
    for row in rows:
        old = pooled.get(row.prompt)
        if old is not None:
            trials = old.trials + row.trials
            row = replace(old, rate=(old.rate * old.trials + row.rate * row.trials) / trials, trials=trials)
        pooled[row.prompt] = row
    return list(pooled.values())
