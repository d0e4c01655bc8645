"""Compares priors on a few hundred prompts that return over many epochs.

    python bench/returning_prompts.py --preset symbols --csv bench/results/returning_prompts.csv

The prompts come from a preset and are written as a JSON-lines task. The policy starts from the preset's warm start. Every method in
METHODS is trained with one rollout per prompt under every prior in PRIORS. The figures of a run are the policy's mean probability
of the reference answer before and after training, on the training prompts ("trained") and on held-out prompts ("heldout").

One run per seed, method `optimal` with prior `history`, is watched. At every step, all priors and those in TRACKERS predict the
step's success rates and learn its outcomes, so that they are compared on the same policies and rollouts. Figures for each quarter
of the run:
  brier, auc      scores of the predictions against the exact success rates of the sampling policy
  calibrated, optimal
                  the second moment of the gradient under this method, divided by that with the exact success rate as the baseline.
                  It is the sum of A^2 E over rollouts, with advantages A and the energies E that the engine returns
  moved, clipped  D in SPO's rho = 2^(-D / 0.06), the mean absolute change of the token log-probabilities of a prompt's last
                  completion since it was sampled; and how often rho is at its lower bound
"""

from __future__ import annotations

import argparse
import csv
import itertools
import json
import tempfile
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from machine import commit, processor, versions
from numpy.typing import NDArray

from v05.estimator import Estimator
from v05.prior.scores import auc, brier
from v05.prior.spo import SpoPrior
from v05.rollout import Completion
from v05.rollout.scheduler import RolloutBatch
from v05.rollout.scoring import completion_logprobs
from v05.tasks import Prompt, make_task
from v05.train.config import RunConfig
from v05.train.estimator import close_batch, estimate_batch, make_estimator
from v05.train.oracle import answer_probability
from v05.train.policy import policy_folder
from v05.train.presets import PRESETS, run_config
from v05.train.trainer import Trainer

METHODS = ("calibrated", "optimal")
PRIORS = ("history", "spo", "mean", "constant", "oracle")
HALF, LEAST, MOST = 0.06, 0.875, 0.96  # parameters of SPO's rho in its authors' code
QUARTERS = 4
WATCHED = ("optimal", "history")

Array = NDArray[np.float64]


class MovedSpo(SpoPrior):
    """SPO's tracker with its variable rho, which depends on how far the policy has moved since the prompt's last visit.

    Attributes:
        moved: D of each prompt of the step. It is 0 for a prompt without a visit, as in the authors' code.
    """

    moved: Array

    def observe(self, prompts: Sequence[str], successes: Array, trials: Array) -> None:
        for g, rho in enumerate(np.clip(2 ** (-self.moved / HALF), LEAST, MOST)):
            self.forgetting = float(rho)
            super().observe(prompts[g : g + 1], successes[g : g + 1], trials[g : g + 1])


TRACKERS = {"spo, rho by D": MovedSpo, "spo, rho 0.96": lambda: SpoPrior(forgetting=MOST)}


class WatchedTrainer(Trainer):
    """A training run on whose rollouts all priors are evaluated.

    Attributes:
        sums: numerator and denominator of each figure, by (quarter, prior, figure).
    """

    def __init__(self, config: RunConfig, directory: Path) -> None:
        super().__init__(config, directory, lambda line: None)
        self.shadows: dict[tuple[str, str], Estimator] = {}
        for method in METHODS:
            for prior in PRIORS:
                self.shadows[method, prior] = self.shadow(method, prior)
            for name, tracker in TRACKERS.items():
                self.shadows[method, name] = replace(self.shadow(method, "spo"), prior=tracker())
        self.last: dict[str, Completion] = {}
        self.collect = self.sampler.collect
        self.sampler.collect = self.collect_and_watch
        self.sums: dict[tuple[int, str, str], Array] = defaultdict(lambda: np.zeros(2))

    def shadow(self, method: str, prior: str) -> Estimator:
        """A new estimator, as in a run of this method with this prior."""
        config = self.config.model_copy(update={"method": method, "prior": prior, "leave_one_out": True})
        assert config.policy.path is not None
        return make_estimator(config, config.policy.path)

    def collect_and_watch(self, count: int) -> RolloutBatch:
        quarter = QUARTERS * self.state.rollouts // self.config.total_rollouts
        batch = self.collect(count)
        self.watch(batch, quarter)
        return batch

    def watch(self, batch: RolloutBatch, quarter: int) -> None:
        """Evaluate all priors on a step's rollouts, one per prompt, of the current policy."""
        texts = [prompt.text for prompt in batch.prompts]
        truth = exact_rates(self, batch.prompts)
        energies = np.array([completion.energy for completion in batch.completions])
        reference = float(((batch.rewards - truth) ** 2 * energies).sum())
        moved = self.moved(batch)
        returned = np.array([text in self.last for text in texts])
        self.add(quarter, "", "moved", moved[returned].sum(), returned.sum())
        self.add(quarter, "", "clipped", (2 ** (-moved[returned] / HALF) <= LEAST).sum(), returned.sum())
        self.add(quarter, "", "rewards", batch.rewards.sum(), len(batch.rewards))
        self.add(quarter, "", "rates", truth.sum(), len(truth))
        for (method, name), shadow in self.shadows.items():
            rates = truth if name == "oracle" else shadow.open(texts)
            tried = replace(batch, priors=rates)
            estimate = estimate_batch(shadow, tried, batch.rewards)
            self.add(quarter, name, method, (estimate.advantages.double().numpy() ** 2 * energies).sum(), reference)
            if method == METHODS[0] and not np.isnan(rates).any():
                self.add(quarter, name, "brier", brier(rates, truth), 1)
                self.add(quarter, name, "auc", auc(rates, truth), 1)
            if isinstance(shadow.prior, MovedSpo):
                shadow.prior.moved = moved
            close_batch(shadow, tried, estimate, self.world)
        self.last.update(zip(texts, batch.completions, strict=True))

    def moved(self, batch: RolloutBatch) -> Array:
        """(G,) mean absolute change of the log-probabilities of each prompt's last completion; 0 for a prompt without one."""
        found = np.zeros(len(batch.prompts))
        known = [g for g, prompt in enumerate(batch.prompts) if prompt.text in self.last]
        if known:
            last = [self.last[batch.prompts[g].text] for g in known]
            with torch.no_grad():
                tokens = [batch.prompt_tokens[g] for g in known]
                now = completion_logprobs(self.learner.sampled, tokens, last, self.tokenizer.pad_token_id).numpy()
            found[known] = [np.abs(row[: len(c.tokens)] - c.logprobs).mean() for row, c in zip(now, last, strict=True)]
        return found

    def add(self, quarter: int, prior: str, figure: str, value: float, weight: float) -> None:
        self.sums[quarter, prior, figure] += value, weight


def exact_rates(trainer: Trainer, prompts: Sequence[Prompt]) -> Array:
    """(P,) probabilities of the reference answers."""
    tokens, answers = [trainer.sampler.tokens_of(prompt) for prompt in prompts], [prompt.answer for prompt in prompts]
    return answer_probability(trainer.learner.sampled, trainer.tokenizer, tokens, answers, trainer.config.policy.max_new_tokens)


def write_task(preset: RunConfig, prompts: int, heldout: int, path: Path) -> None:
    """Write the preset's first distinct prompts of each split to a JSON-lines file, whose task splits them in the same way.

    Prompts with an empty answer are left out, because such a file cannot hold them.
    """
    task = make_task(preset.task)
    with path.open("w") as file:
        for split, count in (("train", prompts), ("heldout", heldout)):
            distinct: dict[str, Prompt] = {}
            for _, prompt in task.prompts(split):
                if prompt.answer:
                    distinct.setdefault(prompt.text, prompt)
                if len(distinct) == count:
                    break
            file.writelines(json.dumps({"prompt": p.text, "answer": p.answer}) + "\n" for p in distinct.values())


def watched(trainer: WatchedTrainer) -> list[dict[str, Any]]:
    """Figures of the priors. Raises RuntimeError if other answers than the reference are rewarded."""
    rewards, rates = (sum(v for (_, _, figure), v in trainer.sums.items() if figure == name) for name in ("rewards", "rates"))
    if abs(rewards[0] - rates[0]) > 4 * np.sqrt(rewards[1]) / 2:
        raise RuntimeError(f"{rewards[0]:.0f} rewards, but {rates[0]:.0f} expected; answers other than the reference are rewarded")
    return [
        {"quarter": quarter + 1, "prior": prior, "figure": figure, "value": value / weight}
        for (quarter, prior, figure), (value, weight) in trainer.sums.items()
        if weight
    ]


def trained(config: RunConfig, watch: bool) -> list[dict[str, Any]]:
    """Figures of one run, and of all priors if it is watched."""
    with tempfile.TemporaryDirectory() as directory:
        trainer = WatchedTrainer(config, Path(directory)) if watch else Trainer(config, Path(directory), lambda line: None)
        task = make_task(config.task)
        size = len(config.task.path.read_text().splitlines())
        of_split = {}
        for name, split in (("trained", "train"), ("heldout", "heldout")):
            drawn = itertools.islice(task.prompts(split), size)
            of_split[name] = list({prompt.text: prompt for _, prompt in drawn}.values())
        before = {name: exact_rates(trainer, prompts).mean() for name, prompts in of_split.items()}
        for _ in trainer.run():
            pass
        after = {name: exact_rates(trainer, prompts).mean() for name, prompts in of_split.items()}
        rows = [
            {"method": config.method, "prior": config.prior, "figure": f"{name} {when}", "value": float(rates[name])}
            for when, rates in (("before", before), ("after", after))
            for name in rates
        ]
        return rows + (watched(trainer) if isinstance(trainer, WatchedTrainer) else [])


def show(rows: list[dict[str, Any]]) -> None:
    """Print tables of the results so far, averaged over seeds."""
    found: dict[tuple[Any, ...], list[float]] = defaultdict(list)
    for row in rows:
        found[row["figure"], row.get("quarter"), row.get("method"), row["prior"]].append(row["value"])
    figures = ("brier", "auc", *METHODS)
    print(f"\n{'prior, by quarters':<16}" + "".join(f"{figure:>32}" for figure in figures))
    for prior in (*PRIORS, *TRACKERS):
        cells = [[np.mean(found.get((f, q, None, prior), [np.nan])) for q in range(1, QUARTERS + 1)] for f in figures]
        print(f"{prior:<16}" + "".join(f"{'  '.join(f'{value:.3f}' for value in cell):>32}" for cell in cells))
    for figure in ("moved", "clipped"):
        print(figure, *(f"{np.mean(found.get((figure, q, None, ''), [np.nan])):.3f}" for q in range(1, QUARTERS + 1)))
    for name in ("trained", "heldout"):
        for method, prior in itertools.product(METHODS, PRIORS):
            after, before = (found.get((f"{name} {when}", None, method, prior), []) for when in ("after", "before"))
            if after:
                seeds = " ".join(f"{value:.3f}" for value in after)
                print(f"{name:<8} {method:<11} {prior:<9} {np.mean(before):.3f} -> {np.mean(after):.3f}  ({seeds})", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", choices=PRESETS, default="symbols", help="the preset of the prompts and the warm start")
    parser.add_argument("--prompts", type=int, default=300, help="number of training prompts")
    parser.add_argument("--heldout", type=int, default=512, help="number of held-out prompts")
    parser.add_argument("--rollouts", type=int, default=8192, help="rollouts per run")
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--watched", action="store_true", help="make only the watched runs")
    parser.add_argument("--csv", type=Path, metavar="FILE", help="write all figures to this file, with the commit and the machine")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    preset = run_config(arguments.preset, "none")
    folder = policy_folder(preset.policy, preset.task, make_task(preset.task), print)
    about = {"device": processor(), "commit": commit(), "versions": versions("torch", "transformers", "numpy")}
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as scratch:
        path = Path(scratch) / "prompts.jsonl"
        write_task(preset, arguments.prompts, arguments.heldout, path)
        runs = itertools.product(range(arguments.seeds), METHODS, PRIORS)
        for seed, method, prior in sorted(runs, key=lambda run: (run[0], run[1:] != WATCHED)):
            watch = (method, prior) == WATCHED
            if arguments.watched and not watch:
                continue
            config = run_config(
                arguments.preset,
                f"{method}@1+{prior}",
                seed=seed,
                task={"kind": "jsonl", "path": path},
                policy={"path": folder, "max_new_tokens": preset.policy.max_new_tokens},
                total_rollouts=arguments.rollouts,
                evaluation={"evaluations": 1, "prompts": 16, "samples": 1, "probe_prompts": 0},
                verifier={"workers": 0},
                checkpoint_seconds=1e6,
            )
            rows += [{"preset": arguments.preset, "seed": seed} | row for row in trained(config, watch)]
            show(rows)
            if arguments.csv:
                with arguments.csv.open("w", newline="") as file:
                    names = ("preset", "seed", "quarter", "method", "prior", "figure", "value")
                    writer = csv.DictWriter(file, [*names, *about], lineterminator="\n")
                    writer.writeheader()
                    writer.writerows(row | {"value": f"{row['value']:.4g}"} | about for row in rows)


if __name__ == "__main__":
    main()
