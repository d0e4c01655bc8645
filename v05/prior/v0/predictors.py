"""Compares V0 with three references on the same queries: the policy's mean, nearest neighbours and logistic regression."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from sklearn.linear_model import LogisticRegression
from sklearn.neighbors import KNeighborsRegressor

from v05.prior.calibration import Calibrator
from v05.prior.scores import auc, auc_interval, brier, calibration_curve, cross_entropy
from v05.prior.v0 import V0Prior
from v05.prior.v0.logs import Queries, Row

NEIGHBOURS = 16
FOLDS = 4  # folds of a context; each is predicted from the others, to fit the calibration
SETTINGS = ("unseen", "seen")

Predictor = Callable[[Queries], NDArray[np.float64]]
Track = Callable[[Sequence[Queries], str], Iterable[Queries]]


def predictors(prior: V0Prior) -> dict[str, Predictor]:
    """Predictors by name. Each returns the (Q,) success rates of queries, predicted from their context."""

    def features(queries: Queries) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        texts = [*queries.context.prompts, *(row.prompt for row in queries.rows)]
        split = prior.meaning(texts).numpy()
        return split[: len(queries.context)], split[len(queries.context) :]

    def v0(queries: Queries) -> NDArray[np.float64]:
        prior.calibrator = calibrator_of(prior, queries)
        return prior.calibrated(prior.infer(queries.context, [row.prompt for row in queries.rows], queries.past))

    def mean(queries: Queries) -> NDArray[np.float64]:
        return np.full(len(queries.rows), queries.context.rate[queries.context.age == 0].mean())

    def knn(queries: Queries) -> NDArray[np.float64]:
        known, asked = features(queries)
        neighbours = KNeighborsRegressor(min(NEIGHBOURS, len(known)), weights="distance").fit(known, queries.context.rate)
        rates: NDArray[np.float64] = neighbours.predict(asked)
        return rates

    def logistic(queries: Queries) -> NDArray[np.float64]:
        known, asked = features(queries)
        rate = queries.context.rate
        if rate.max() == 0 or rate.min() == 1:  # one class: a regression cannot be fitted
            return np.full(len(asked), rate.mean())
        twice = np.repeat([True, False], len(known))  # each row as a success and as a failure, weighted by its rate
        model = LogisticRegression(max_iter=1000).fit(np.tile(known, (2, 1)), twice, sample_weight=np.concatenate((rate, 1 - rate)))
        rates: NDArray[np.float64] = model.predict_proba(asked)[:, 1]
        return rates

    return {"v0": v0, "mean": mean, "knn": knn, "logistic": logistic}


def calibrator_of(prior: V0Prior, queries: Queries) -> Calibrator:
    """A calibrator fitted on the context's newest version. Each fold of it is predicted from all other context rows."""
    context = queries.context
    calibrator = Calibrator(half_life=None)
    newest = np.flatnonzero(context.age == 0)
    for fold in range(FOLDS):
        asked = newest[fold::FOLDS]
        others = np.setdiff1d(np.arange(len(context)), asked)
        if len(asked) and len(others):
            predicted = prior.infer(context[others], [context.prompts[i] for i in asked], context.past[asked])
            calibrator.observe(context.rate[asked] * context.trials[asked], context.trials[asked], predicted)
    calibrator.fit()
    return calibrator


def score_predictors(prior: V0Prior, tasks: Sequence[Queries], track: Track, seed: int = 0) -> list[dict[str, Any]]:
    """One record per predictor and setting, with the scores of `v05.prior.scores` and the numbers of prompts and policies.

    The AUC counts only pairs of queries of the same policy. A setting without queries has no record.
    """
    asked = [queries for queries in tasks if queries.setting in SETTINGS]
    named = predictors(prior)
    predicted: dict[tuple[str, str], list[NDArray[np.float64]]] = {}
    for queries in track(asked, "predicting"):
        for name, predict in named.items():
            predicted.setdefault((name, queries.setting), []).append(predict(queries))
    records = []
    for setting in SETTINGS:
        chosen = [queries for queries in asked if queries.setting == setting]
        if not chosen:
            continue
        rows: list[Row] = [row for queries in chosen for row in queries.rows]
        rates = np.array([row.rate for row in rows])
        policy = np.repeat(np.arange(len(chosen)), [len(queries.rows) for queries in chosen])
        for name in named:
            values = np.concatenate(predicted[name, setting])
            low, high = auc_interval(values, rates, policy, seed)
            records.append(
                {
                    "predictor": name,
                    "setting": setting,
                    "prompts": len(rows),
                    "policies": len(chosen),
                    "auc": auc(values, rates, policy),
                    "auc_low": low,
                    "auc_high": high,
                    "brier": brier(values, rates),
                    "cross_entropy": cross_entropy(values, rates),
                    "calibration": calibration_curve(values, rates),
                }
            )
    return records
