"""Suites: experiments over several task mixes, with a learning rate tuned for each method, as `v05 compare --suite` runs them.

    v05 compare --suite headline --out runs/headline

First, every method of `Suite.tuned` is tuned on every mix, with one seed, fewer rollouts and other held-out prompts. Then every
method runs with every seed at its best learning rate. Each finished run becomes a row of runs.csv (v05.train.suite_rows), from
which all tables and figures are made (v05.train.suite_summary). A run that has a row is not run again, so an interrupted suite can
be resumed at any time.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace

from v05.methods import METHODS
from v05.train.config import EvaluationConfig, RunConfig
from v05.train.presets import run_config

TUNING_SEED = 1000  # differs from the seeds of counted runs
RIVALS = tuple(method.name for method in METHODS.values() if method.rival)
RunKey = tuple[str, str, str, int, float, int]  # stage, mix, label, seed, learning rate, total rollouts


@dataclass(frozen=True)
class Suite:
    """An experiment.

    Attributes:
        mixes: names of presets.
        tuned: spec that is tuned -> specs that run at its learning rate, as `run_config` reads them.
        ablations: spec that is tuned -> further specs that run at its learning rate, on the first mix only.
        learning_rates: the rates that are tried.
        rollouts, tuning_rollouts: training rollouts of a counted run, and of a tuning run.
        seeds: seeds per method.
        evaluation: the evaluation settings of a counted run.
    """

    mixes: tuple[str, ...]
    tuned: Mapping[str, tuple[str, ...]]
    ablations: Mapping[str, tuple[str, ...]]
    learning_rates: tuple[float, ...]
    rollouts: int
    tuning_rollouts: int
    seeds: int
    evaluation: EvaluationConfig

    @property
    def specs(self) -> tuple[str, ...]:
        """The specs of all counted runs."""
        return tuple(spec for specs in (*self.tuned.values(), *self.ablations.values()) for spec in specs)

    def only(self, specs: Collection[str]) -> Suite:
        """The part of the suite that runs `specs`, with the same tuning. Raises ValueError for a spec that the suite does not
        have."""
        for spec in specs:
            if spec not in self.specs:
                raise ValueError(f"--methods {spec} is not in this suite; choose from {', '.join(self.specs)}")

        def chosen(parts: Mapping[str, tuple[str, ...]]) -> dict[str, tuple[str, ...]]:
            return {tuned: tuple(spec for spec in of if spec in specs) for tuned, of in parts.items()}

        ablations = {tuned: of for tuned, of in chosen(self.ablations).items() if of}
        tuned = {name: of for name, of in chosen(self.tuned).items() if of or name in ablations}
        return replace(self, tuned=tuned, ablations=ablations)


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
            "optimal@1": ("optimal@1", "optimal@2"),
            "batch_energy@1": ("batch_energy@1",),
            "none@1": ("none@1",),
            "batch@1": ("batch@1",),
            "js@2": ("js@2",),
            "otb@4": ("otb@4", "opo@4"),
            "ebpo@4": ("ebpo@4",),
        },
        ablations={
            "v05@4": ("v05@1", "v05@8", "v05@4+noise"),
            "v05@4..16": ("v05@4..16+cost=0.00123", "v05@4..16+cost=0.0123"),  # a factor of 10, around 1/256
            "calibrated@2": ("calibrated@4+noise",),
            "dr_grpo@4": ("rloo@4",),
            "grpo@16": ("grpo@16+clip=10",),
            "dapo@16": ("dapo@16+clip=10",),
        },
        learning_rates=(1e-4, 3e-4),  # 3e-5 and 1e-3 never won where they were tried (docs/headline.md)
        rollouts=24_576,
        tuning_rollouts=8_192,
        seeds=5,
        evaluation=EvaluationConfig(evaluations=4, prompts=1024, samples=2, probe_prompts=16, probe_samples=64),
    ),
    "smoke": Suite(  # takes a minute, to test the pipeline
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
class Planned:
    """A run of a suite: its configuration, and the fields that identify its row."""

    stage: str
    mix: str
    label: str
    config: RunConfig

    @property
    def key(self) -> RunKey:
        config = self.config
        return self.stage, self.mix, self.label, config.seed, config.optimizer.learning_rate, config.total_rollouts

    @property
    def name(self) -> str:
        """The run's directory, relative to the suite's."""
        rate = f"-lr{self.config.optimizer.learning_rate:g}" if self.stage == "tune" else ""
        return f"{self.stage}/{self.mix}/{self.label}{rate}-seed{self.config.seed}"


def tuning_runs(suite: Suite) -> list[Planned]:
    """The runs that decide the learning rates."""
    others = {"skip": suite.evaluation.prompts, "final_samples": 0}  # skips the prompts that counted runs are evaluated on
    evaluation = suite.evaluation.model_copy(update=others)
    return [
        _planned("tune", mix, spec, TUNING_SEED, rate, suite.tuning_rollouts, evaluation)
        for mix in suite.mixes
        for spec in suite.tuned
        for rate in suite.learning_rates
    ]


def counted_runs(suite: Suite, rates: Mapping[tuple[str, str], float], seeds: int) -> list[Planned]:
    """The runs that count, ordered by seed, so that an early stop has compared all methods on some seeds."""
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
