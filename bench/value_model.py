"""Compares V0 with its references on more queries than the test rows: on all context rows of a history of policies, in folds.

    python bench/value_model.py LOGS.jsonl

LOGS.jsonl has the format of `v05 fit-prior`. Each checkpoint's context rows are predicted in folds, from the checkpoint's other
rows and from earlier checkpoints. This is the "unseen" setting of `v05 fit-prior` with many more queries. Then the script times
1024 predictions.
"""

from __future__ import annotations

import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from v05.machine import cache_root
from v05.prior.v0 import V0Prior
from v05.prior.v0.backbone import Backbone
from v05.prior.v0.context import Past
from v05.prior.v0.head import load_head
from v05.prior.v0.logs import Queries, Row, read_logs, walk
from v05.prior.v0.predictors import score_predictors

FOLDS = 4
TIMED_PROMPTS, TIMED_CONTEXT = 1024, 256


def folds_of(task: Queries) -> list[Queries]:
    """Folds of a context's newest rows without a past, each as queries with the remaining rows as context."""
    context = task.context
    rows = np.flatnonzero((context.age == 0) & (context.past.trials == 0))
    rows = np.random.default_rng(0).permutation(rows)
    folds = []
    for fold in range(FOLDS):
        asked = rows[fold::FOLDS]
        kept = np.setdiff1d(np.arange(len(context)), asked)
        queries = [Row("", 0, context.prompts[i], context.rate[i], context.trials[i], "test") for i in asked]
        folds.append(replace(task, setting="unseen", context=context[kept], past=Past(*np.zeros((3, len(asked)))), rows=queries))
    return folds


def main() -> None:
    torch.set_num_threads(1)
    tasks = [task for task in walk(read_logs([Path(path) for path in sys.argv[1:]]), 1024) if task.setting == "unseen"]
    prior = V0Prior(Backbone(cache=cache_root()), load_head())
    print(f"{'predictor':10s} {'prompts':>8s} {'AUC':>20s} {'Brier':>8s} {'cross-entropy':>14s}")
    for r in score_predictors(prior, [fold for task in tasks for fold in folds_of(task)], lambda items, what: items):
        auc = f"{r['auc']:.3f} [{r['auc_low']:.3f}, {r['auc_high']:.3f}]"
        print(f"{r['predictor']:10s} {r['prompts']:8d} {auc:>20s} {r['brier']:8.4f} {r['cross_entropy']:14.4f}")
    context = tasks[-1].context[np.arange(TIMED_CONTEXT)]
    prompts = [prompt for task in tasks for prompt in task.context.prompts][:TIMED_PROMPTS]
    started = time.perf_counter()
    prior.infer(context, prompts, Past(*np.zeros((3, len(prompts)))))
    print(f"{len(prompts)} prompts from a context of {len(context)}: {time.perf_counter() - started:.2f} s, features kept")


if __name__ == "__main__":
    main()
