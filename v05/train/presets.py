"""Short names for runs. A preset is a task with a policy of a certain size; a spec is a method with its group size ("v05@4..16").

A method's recipe is the set of fields that its paper prescribes besides the advantage, such as the loss (v05.methods).
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from v05.arguments import unknown
from v05.methods import find_method
from v05.tasks import ReasoningGymConfig, Source
from v05.train.config import EvaluationConfig, LossConfig, OptimizerConfig, PolicyConfig, RunConfig, WarmStartConfig
from v05.train.settings import validated


def _sums(low: int, high: int, weight: float) -> Source:
    return Source(dataset="chain_sum", weight=weight, settings=dict(min_terms=2, max_terms=2, min_digits=low, max_digits=high))


def _products(low: int, high: int, weight: float) -> Source:
    return Source(dataset="products", weight=weight, settings=dict(min_terms=2, max_terms=2, min_digits=low, max_digits=high))


def _programs(length: int) -> Source:
    return Source(dataset="ab", settings=dict(length=length))


def _words(low: int, high: int) -> Source:
    return Source(dataset="spell_backward", weight=3, settings=dict(min_word_len=low, max_word_len=high))


# A short decay and frequent validation end the warm start near its target, although accuracy jumps suddenly.
EARLY: dict[str, Any] = {"target_accuracy": 0.35, "decay_steps": 20, "validate_every": 20}

SYMBOLS: dict[str, Any] = {
    "task": ReasoningGymConfig(surface="terse", mix=(*(_programs(n) for n in (8, 10, 12)), _words(4, 10))),
    "policy": PolicyConfig(
        hidden_size=160, layers=3, intermediate_size=480, max_new_tokens=13, warm_start=WarmStartConfig(**EARLY)
    ),
}


# For a pretrained model of 0.1 to 0.6 billion parameters, on any task.
PRETRAINED: dict[str, Any] = {
    "optimizer": OptimizerConfig(learning_rate=1e-5),
    "evaluation": EvaluationConfig(evaluations=4, prompts=256, samples=2, final_samples=4, probe_prompts=0),
    "rollouts_per_step": 128,
    "total_rollouts": 4096,
}


def _for_language_models(task: ReasoningGymConfig, max_new_tokens: int, learning_rate: float, **others: Any) -> dict[str, Any]:
    """A preset for an instruct model that the user gives with --policy."""
    return {
        **PRETRAINED,
        "task": task,
        "policy": PolicyConfig(max_new_tokens=max_new_tokens),
        "chat": True,
        "optimizer": OptimizerConfig(learning_rate=learning_rate),
        **others,
    }


def _one_number(dataset: str, **settings: int) -> dict[str, Any]:
    """A preset of 256 recurring prompts whose answer is a number, to be given without any other text."""
    task = ReasoningGymConfig(
        mix=(Source(dataset=dataset, settings=settings),), surface="instruct", instruction="Answer with the number only.", size=256
    )
    return _for_language_models(task, max_new_tokens=24, learning_rate=2e-5)


PRESETS: dict[str, dict[str, Any]] = {
    # 0.6 million parameters; minutes on one core.
    "tiny": {
        "task": ReasoningGymConfig(surface="terse", operand_width=3, mix=(_sums(2, 3, 3), _products(1, 2, 1))),
        "policy": PolicyConfig(hidden_size=128, layers=3, intermediate_size=384, max_new_tokens=8),
        "total_rollouts": 80_000,
    },
    # 1 million parameters, sums and products of up to two digits.
    "arithmetic": {
        "task": ReasoningGymConfig(surface="terse", operand_width=2, mix=(_sums(1, 2, 3), _products(1, 2, 1))),
        "policy": PolicyConfig(
            hidden_size=160, layers=3, intermediate_size=480, max_new_tokens=6, warm_start=WarmStartConfig(**EARLY)
        ),
        "rollouts_per_step": 256,
        "total_rollouts": 50_000,
    },
    # 1 million parameters, programs of the A::B system to run and words to spell backwards.
    "symbols": {
        **SYMBOLS,
        "rollouts_per_step": 256,
        "total_rollouts": 50_000,
    },
    # 1 million parameters, sums, programs and words together; starts below 0.2.
    "hard": {
        "task": ReasoningGymConfig(
            surface="terse", operand_width=3, mix=(_sums(3, 3, 2), *(_programs(n) for n in (10, 12)), _words(7, 10))
        ),
        "policy": PolicyConfig(
            hidden_size=160,
            layers=3,
            intermediate_size=480,
            max_new_tokens=13,
            warm_start=WarmStartConfig(**EARLY | {"target_accuracy": 0.1, "decay_steps": 5}),
        ),
        "rollouts_per_step": 256,
        "total_rollouts": 50_000,
    },
    # `symbols`, shortened to the least that shows differences between methods, in a few minutes.
    "demo": {
        **SYMBOLS,
        "evaluation": EvaluationConfig(evaluations=4, prompts=512, samples=2, final_samples=4, probe_prompts=8, probe_samples=32),
        "optimizer": OptimizerConfig(learning_rate=1e-4),  # at 3e-4, GRPO with 16 rollouts per prompt loses accuracy
        "rollouts_per_step": 256,
        "total_rollouts": 8_192,
    },
    # A few seconds, to test the pipeline. It learns nothing.
    "smoke": {
        "task": ReasoningGymConfig(surface="terse", operand_width=1, mix=(_sums(1, 1, 1),)),
        "policy": PolicyConfig(
            hidden_size=48,
            layers=2,
            heads=2,
            intermediate_size=96,
            max_new_tokens=4,
            warm_start=WarmStartConfig(target_accuracy=0.1, batch_size=64, decay_steps=0, validate_every=25),
        ),
        "evaluation": EvaluationConfig(evaluations=2, prompts=16, samples=2, probe_prompts=4, probe_samples=16),
        "rollouts_per_step": 64,
        "total_rollouts": 256,
    },
    # Word problems: templates of GSM-Symbolic with new names and numbers.
    "gsm": _for_language_models(
        ReasoningGymConfig(mix=(Source(dataset="gsm_symbolic"),), surface="instruct", size=1024),
        max_new_tokens=256,
        learning_rate=1e-5,
        total_rollouts=16_384,
    ),
    "sums": _one_number("chain_sum", min_terms=2, max_terms=2, min_digits=1, max_digits=2),
    "products": _one_number("products", min_terms=2, max_terms=3, min_digits=1, max_digits=1),
    "multiples": _one_number("lcm", min_value=1, max_value=30),
}


MAX_NEW_TOKENS = 256  # default for a policy that the user gives, if the preset is not for language models


def given_policy(preset: str, path: Path, max_new_tokens: int | None = None) -> PolicyConfig:
    """The configuration of the model folder `path`. `max_new_tokens` defaults to the preset's limit if it is for language models,
    else to 256."""
    fields = PRESETS.get(preset, {})
    limit = fields["policy"].max_new_tokens if fields.get("chat") else MAX_NEW_TOKENS
    return PolicyConfig(path=path, max_new_tokens=max_new_tokens or limit)


SPEC = re.compile(
    r"(?P<method>\w+)(@(?P<initial>\d+)(\.\.(?P<maximum>\d+)(~(?P<mean>\d+(\.\d+)?))?)?)?"
    r"(\+(?P<prior>[a-z]\w*))?(\+cost=(?P<cost>[\d.e-]+))?(\+weighting=(?P<weighting>\w+))?(\+clip=(?P<clip>[\d.]+))?"
)


def run_config(preset: str, spec: str, settings: Sequence[str] = (), **overrides: Any) -> RunConfig:
    """The run of a method, with its recipe, on a preset.

    Args:
        preset: a name of `PRESETS`.
        spec: the method and its budget. "v05" takes the recipe's budget; "v05@4" samples exactly 4 rollouts per prompt;
            "v05@4..16" samples 4, then up to 16 by the method's sequential test; "v05@4..16~6" samples between 4 and 16, and 6 on
            average, where they gain most. Four options may follow, in this order: a prior, the cost of a rollout in the test,
            loss.group_weighting and optimizer.max_grad_norm. Examples: "v05@4..16+oracle", "v05@4..16+cost=0.01",
            "v05@4..16+weighting=rollout", "grpo@16+clip=10".
        settings: single fields of the run, such as "loss.clip_high=0.28" (v05.train.settings). They are applied last.
        overrides: values that replace top-level fields of the run.

    Raises:
        ValueError: the preset or method is unknown (the message lists the known ones), or a spec or setting is malformed.
    """
    if preset not in PRESETS:
        raise ValueError(unknown(f"preset={preset!r}", preset, PRESETS))
    parts = SPEC.fullmatch(spec)
    if parts is None:
        raise ValueError(
            f"method={spec!r} is malformed; write a method, method@4, method@4..16 or method@4..16~6, "
            "optionally followed by +PRIOR, +cost=NUMBER, +weighting=NAME and +clip=NUMBER, in this order"
        )
    rule = find_method(parts["method"])
    fields = {**PRESETS[preset], **rule.recipe, "method": rule.name, **overrides}
    if parts["initial"]:
        initial, maximum = int(parts["initial"]), int(parts["maximum"] or parts["initial"])
        test = rule.budget_rule or "osla"  # for a method without a prior, RunConfig then refuses rule osla
        budget_rule = "total" if parts["mean"] else test if parts["maximum"] else "uniform"
        fields["budget"] = {"rule": budget_rule, "initial": initial, "maximum": maximum, "mean": parts["mean"]}
        fields["budget"]["unbiased"] = budget_rule in ("calibrated", "variance")  # osla's bias is small
    if parts["prior"]:
        if overrides.get("prior", parts["prior"]) != parts["prior"]:
            raise ValueError(f"prior={overrides['prior']!r} contradicts method={spec!r}; leave one of the two out")
        fields["prior"] = parts["prior"]
    if parts["cost"]:
        fields["budget"] = {**fields["budget"], "cost": parts["cost"]}
    if parts["weighting"]:
        fields["loss"] = {**fields.get("loss", {}), "group_weighting": parts["weighting"]}
    if parts["clip"]:
        fields["optimizer"] = {**fields.get("optimizer", {}), "max_grad_norm": parts["clip"]}
    return validated(RunConfig, fields, settings)


def label_of(config: RunConfig) -> str:
    """The spec of a run, as `run_config` reads it, such as "v05@4..16+oracle". Options at their default are left out."""
    budget = config.budget
    maximum = "" if budget.rule == "uniform" else f"..{budget.maximum}"
    mean = "" if budget.mean is None else f"~{budget.mean:g}"
    prior = "" if config.prior == find_method(config.method).prior else f"+{config.prior}"
    cost = "" if budget.cost is None else f"+cost={budget.cost:g}"
    weighting, clip = config.loss.group_weighting, config.optimizer.max_grad_norm
    weighting_part = "" if weighting == LossConfig().group_weighting else f"+weighting={weighting}"
    clip_part = "" if clip == OptimizerConfig().max_grad_norm else f"+clip={clip:g}"
    return f"{config.method}@{budget.initial}{maximum}{mean}{prior}{cost}{weighting_part}{clip_part}"
