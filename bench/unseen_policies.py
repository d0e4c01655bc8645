"""Compares V0 with its references on policies that it has never seen: `nice python bench/unseen_policies.py`.

Character-level policies of different sizes and tasks are warm-started and then trained by different methods at different learning
rates. Every run has its own prompts. The head that ships was trained on the runs of some of the policies (by the command in
v05/prior/v0/pretrain.py). The outcomes/ of the other runs are scored as in `v05 fit-prior`, with the warm start of the run as the
backbone. There are two references more than in `v05 fit-prior`: logistic regression on standardised features with a cross-validated
penalty, and V0 without its transformer. Writes bench/results/value_model_unseen_policies.csv. It takes ten minutes on one core.
After an interruption, the same command resumes.
"""

from __future__ import annotations

import csv
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
import typer
from machine import commit, processor, versions
from numpy.typing import NDArray
from rich.progress import track
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import KFold
from sklearn.preprocessing import StandardScaler

from v05.machine import cache_root
from v05.prior.scores import LEAST_CONFIDENT, auc, auc_interval, brier, cross_entropy
from v05.prior.v0 import V0Prior
from v05.prior.v0.backbone import Backbone
from v05.prior.v0.head import InContextHead, load_head
from v05.prior.v0.logs import Queries, read_logs, walk
from v05.prior.v0.predictors import SETTINGS, Predictor, predictors
from v05.tasks import ReasoningGymConfig, Source, make_task
from v05.train.compare import RunStatus, run_all
from v05.train.config import EvaluationConfig, OptimizerConfig, PolicyConfig, RunConfig, WarmStartConfig
from v05.train.policy import policy_folder
from v05.train.presets import PRESETS, run_config

RESULTS = Path(__file__).parent / "results" / "value_model_unseen_policies.csv"
RUNS = Path("runs") / "unseen-policies"
# Method and learning rate of each run of a policy: the preset's rate, and higher ones, so that the runs differ.
TRAINED = (("v05@4..16", 3e-4), ("grpo@8", 1e-3), ("dr_grpo@4", 1e-3), ("calibrated@4", 2e-3))
ROLLOUTS = 16_000
EVALUATION = EvaluationConfig(evaluations=4, prompts=512, samples=8, probe_prompts=0)
CONTEXTS = (64, 256, 1024)  # largest number of context rows: few, the default of runs, and all that there are
PENALTIES = 10.0 ** np.arange(-5, 2)  # sklearn's C, for features of variance 1
FOLDS, DRAWS = 4, 1000


def _source(dataset: str, low: int, high: int, weight: float) -> Source:
    return Source(dataset=dataset, weight=weight, settings=dict(min_terms=2, max_terms=2, min_digits=low, max_digits=high))


def _family(seed: int, width: int, *mix: Source) -> tuple[PolicyConfig, ReasoningGymConfig]:
    """A policy of a quarter of the size of tiny, warm-started on its own mix."""
    warm_start = WarmStartConfig(target_accuracy=0.25, decay_steps=50, validate_every=50, seed=seed)
    return (
        PolicyConfig(hidden_size=width, layers=2, intermediate_size=3 * width, max_new_tokens=6, warm_start=warm_start),
        ReasoningGymConfig(surface="terse", operand_width=2, mix=mix, seed=1000 * seed),
    )


POLICIES = {
    "tiny": (PRESETS["tiny"]["policy"], PRESETS["tiny"]["task"]),
    "two-digits": _family(1, 64, _source("chain_sum", 1, 2, 2), _source("products", 1, 2, 1)),
    "sums": _family(2, 64, _source("chain_sum", 1, 2, 1)),
    "products": _family(3, 96, _source("products", 1, 2, 2), _source("chain_sum", 2, 2, 1)),
}
TRAINED_ON = ("tiny", "sums")  # policies that the shipped head was trained on; the others are scored


def config_of(number: int, folder: Path, policy: PolicyConfig, task: ReasoningGymConfig, spec: str, rate: float) -> RunConfig:
    """The configuration of run `number`. Its seed gives it prompts that no other run has."""
    return run_config(
        "tiny",
        spec,
        seed=number,
        task=task.model_copy(update={"seed": number + 1}),
        policy=PolicyConfig(path=folder, max_new_tokens=policy.max_new_tokens),
        optimizer=OptimizerConfig(learning_rate=rate),
        evaluation=EVALUATION,
        total_rollouts=ROLLOUTS,
    )


def tuned_logistic(prior: V0Prior) -> Predictor:
    """Logistic regression on standardised features, with the penalty that is best in cross-validation on the context."""

    def fitted(known: NDArray[np.float64], rate: NDArray[np.float64], penalty: float) -> LogisticRegression:
        twice = np.repeat([True, False], len(known))
        weight = np.concatenate((rate, 1 - rate))
        return LogisticRegression(C=penalty, max_iter=1000).fit(np.tile(known, (2, 1)), twice, sample_weight=weight)

    def predict(queries: Queries) -> NDArray[np.float64]:
        features = prior.meaning([*queries.context.prompts, *(row.prompt for row in queries.rows)]).numpy()
        count, rate = len(queries.context), queries.context.rate
        features = StandardScaler().fit(features[:count]).transform(features)
        losses = [
            np.mean(
                [
                    cross_entropy(fitted(features[kept], rate[kept], penalty).predict_proba(features[left])[:, 1], rate[left])
                    for kept, left in KFold(FOLDS).split(rate)
                ]
            )
            for penalty in PENALTIES
        ]
        best = fitted(features[:count], rate, PENALTIES[int(np.argmin(losses))])
        rates: NDArray[np.float64] = best.predict_proba(features[count:])[:, 1]
        return rates

    return predict


def queries_of(directory: Path, size: int, first: bool) -> list[Queries]:
    """The queries of a run, with contexts of at most `size` rows. All runs share the warm start, so only the first includes it."""
    tasks = walk(read_logs(sorted(directory.glob("outcomes/*.jsonl"))), size)
    return [task for task in tasks if task.setting in SETTINGS and (first or not task.policy.endswith("@0"))]


def scores_of(queries: list[Queries], predicted: dict[str, list[NDArray[np.float64]]]) -> Iterator[dict[str, object]]:
    """One record per predictor. V0's gain over it in cross-entropy has a bootstrap interval over the prompts of each run."""
    rows = [row for task in queries for row in task.rows]
    rates = np.array([row.rate for row in rows])
    version = np.repeat(np.arange(len(queries)), [len(task.rows) for task in queries])
    _, prompt = np.unique([f"{row.model}\n{row.prompt}" for row in rows], return_inverse=True)
    draws = np.random.default_rng(0).multinomial(prompt.max() + 1, np.full(prompt.max() + 1, 1 / (prompt.max() + 1)), DRAWS)
    values = {name: np.concatenate(parts).clip(LEAST_CONFIDENT, 1 - LEAST_CONFIDENT) for name, parts in predicted.items()}
    losses = {name: -rates * np.log(v) - (1 - rates) * np.log1p(-v) for name, v in values.items()}
    for name, value in values.items():
        low, high = auc_interval(value, rates, version)
        gain = np.bincount(prompt, losses[name] - losses["v0"])
        gains = draws @ gain / (draws @ np.bincount(prompt))
        gain_low, gain_high = np.percentile(gains, (2.5, 97.5))
        yield {
            "predictor": name,
            "checkpoints": len(queries),
            "prompts": len(rows),
            "auc": auc(value, rates, version),
            "auc_low": low,
            "auc_high": high,
            "brier": brier(value, rates),
            "cross_entropy": cross_entropy(value, rates),
            "v0_gain": gain.sum() / len(rows),
            "v0_gain_low": gain_low,
            "v0_gain_high": gain_high,
        }


def tell() -> Callable[[list[RunStatus]], None]:
    """A function that prints a line for each run that ends."""
    told: set[str] = set()

    def watch(states: list[RunStatus]) -> None:
        for state in states:
            if state.status in ("done", "failed") and state.name not in told:
                print(f"{state.name}: {state.status}, held-out accuracy {state.accuracy}", flush=True)
                told.add(state.name)

    return watch


def main(out: Annotated[Path, typer.Option(help="The directory of the runs.")] = RUNS) -> None:
    torch.set_num_threads(1)
    records = []
    number = 0
    for name, (policy, task) in POLICIES.items():
        folder = policy_folder(policy, task, make_task(task), print)
        configs = {}
        for spec, rate in TRAINED:
            configs[f"{name}-{spec}-{rate:g}"] = config_of(number, folder, policy, task, spec, rate)
            number += 1
        if failed := run_all(configs, out, 1, tell()):
            raise SystemExit(f"failed: {', '.join(failed)}; see log.txt in {out}")
        if name in TRAINED_ON:
            continue
        prior, plain = (V0Prior(Backbone(folder, cache_root()), head) for head in (load_head(), InContextHead().eval()))
        named = predictors(prior) | {"logistic, tuned": tuned_logistic(prior), "v0, no transformer": predictors(plain)["v0"]}
        for size in CONTEXTS:
            asked = [queries for i, run in enumerate(configs) for queries in queries_of(out / run, size, first=i == 0)]
            predicted = [[predict(q) for predict in named.values()] for q in track(asked, f"{name}: predicting from {size}")]
            for setting in SETTINGS:
                chosen = [i for i, queries in enumerate(asked) if queries.setting == setting]
                parts = {which: [predicted[i][p] for i in chosen] for p, which in enumerate(named)}
                about = {"policy": name, "setting": setting, "context": max(len(asked[i].context) for i in chosen)}
                records += [about | scores for scores in scores_of([asked[i] for i in chosen], parts)]
    where = {"device": processor(), "commit": commit(), "versions": versions("torch", "scikit-learn")}
    with RESULTS.open("w", newline="") as file:
        writer = csv.DictWriter(file, [*records[0], *where], lineterminator="\n")
        writer.writeheader()
        for record in records:
            writer.writerow({key: f"{value:.4f}" if isinstance(value, float) else value for key, value in record.items()} | where)
    print(RESULTS.read_text())


if __name__ == "__main__":
    typer.run(main)
