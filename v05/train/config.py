"""What a run is made of: pydantic models.

A run is a `RunConfig`, written to its directory as config.json; the same file runs it again. v05.train.presets makes runs of short
names.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from v05.budget import Chunk, RolloutAllocator
from v05.files import read_object
from v05.messages import explained_places
from v05.methods import Scale, find_method
from v05.ops.policy_loss.losses import Aggregation, Level
from v05.tasks import TaskConfig
from v05.train.settings import validated

Loss = Literal["ppo", "grpo", "dapo", "dr_grpo", "dual_clip", "gspo", "cispo"]
GroupWeighting = Literal["prompt", "rollout"]
Distributed = Literal["ddp", "fsdp2"]
Engine = Literal["transformers", "vllm", "vllm_server", "ray"]
Prior = Literal["history", "mean", "spo", "v0", "constant", "oracle", "noise"]


class Section(BaseModel):
    """A part of a run's configuration. Unknown fields are refused: a misspelt setting is an error, not a default."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class WarmStartConfig(Section):
    """Supervised training of the character-level policy, until it is good enough to learn from its own rollouts.

    The jump from a few percent to most prompts solved is sudden and its step differs by seed; hence the stop on validation.
    """

    target_accuracy: float = Field(
        default=0.35, gt=0, lt=1, description="decay once held-out accuracy reaches this; the decay itself adds a lot"
    )
    batch_size: int = Field(default=128, ge=1)
    learning_rate: float = Field(default=3e-3, gt=0)
    max_steps: int = Field(default=8000, ge=1)
    decay_steps: int = Field(default=100, ge=0, description="steps of linear decay after the target is reached")
    validate_every: int = Field(default=100, ge=1)
    validation_prompts: int = Field(default=256, ge=1)
    seed: int = 0


class LoraConfig(Section):
    """LoRA (arXiv 2106.09685): terms of low rank beside linear layers are all that is trained; they are merged at the end."""

    rank: int = Field(default=16, ge=1)
    alpha: int = Field(default=32, ge=1, description="the terms are multiplied by alpha / rank")
    target_modules: tuple[str, ...] | None = Field(
        default=None,
        min_length=1,
        description="names of layers, as peft reads them; None: all linear ones but the output layer",
    )


class PolicyConfig(Section):
    """A model folder (`path`), or the size of a character-level decoder and how to warm-start it."""

    path: Path | None = None
    hidden_size: int = 128
    layers: int = 3
    heads: int = 4
    intermediate_size: int = 384
    max_new_tokens: int = Field(default=10, ge=1)
    dtype: Literal["float32", "bfloat16"] = Field(
        default="float32", description="of the weights that are computed with; the optimiser's are float32 (v05.train.masters)"
    )
    lora: LoraConfig | None = Field(default=None, description="needs the extra 'lora'; None trains all weights")
    warm_start: WarmStartConfig = WarmStartConfig()


class BudgetConfig(Section):
    """How many rollouts a prompt gets: `initial`, then what `rule` asks for up to `maximum` (v05.budget.RolloutAllocator)."""

    rule: Literal["uniform", "osla", "calibrated", "variance", "total"] = "uniform"
    initial: int = Field(default=16, ge=1)
    maximum: int = Field(default=16, ge=1)
    cost: float | None = Field(default=None, ge=0)
    mean: float | None = Field(default=None, gt=0, description="rollouts that rule 'total' has for a prompt, on average")
    chunk: Chunk = Field(
        default=1, description="rollouts added at a time; 'look' adds as many at once as the rule is expected to take"
    )
    unbiased: bool = Field(
        default=False,
        description="of a method's own sequential test: advantages that stopping early does not bias (v05.path_counting)",
    )

    @field_validator("chunk", mode="plain")
    @classmethod
    def _is_a_chunk(cls, chunk: Any) -> Any:
        RolloutAllocator(chunk=chunk)  # raises if it is none
        return chunk


class LossConfig(Section):
    """The policy-gradient loss (v05.ops.policy_loss); what is not given here is that of the row `kind` of its table."""

    kind: Loss = "ppo"
    clip_low: float | None = Field(default=None, gt=0, le=1)
    clip_high: float | None = Field(default=None, gt=0)
    aggregation: Aggregation | None = None
    group_weighting: GroupWeighting = Field(
        default="prompt", description="whether prompts weigh alike, whatever their number of rollouts, or rollouts do"
    )
    kl_coefficient: float = Field(default=0.0, ge=0)
    importance_cap: float | None = Field(
        default=None, gt=0, description="truncated importance sampling of what the engine's policy differs from the trainer's"
    )
    importance_level: Level = Field(default="token", description="whose probability ratio that is, a token's or its rollout's")


class OptimizerConfig(Section):
    """AdamW. Each step's rollouts are split by prompt into `updates_per_step` parts, one update each."""

    learning_rate: float = Field(default=3e-4, gt=0, le=1e30)  # beyond, AdamW's step is no float32
    weight_decay: float = Field(default=0.0, ge=0)
    max_grad_norm: float = Field(default=1.0, gt=0)
    updates_per_step: int = Field(default=1, ge=1)
    tokens_per_backward: int = Field(
        default=16_384,
        ge=1,
        description="that a process passes backward at once, padding included; fewer take less memory and change rounding only",
    )
    gradient_checkpointing: bool = Field(
        default=False,
        description="compute the activations of layers again in the backward pass, in place of keeping them",
    )


class OverlongConfig(Section):
    """DAPO's soft overlong punishment: 0 up to max_new_tokens - buffer tokens, then falling linearly to -1 at max_new_tokens."""

    buffer: int | None = Field(default=None, ge=1, description="None is a sixteenth of max_new_tokens, 1 at least")

    def tokens(self, max_new_tokens: int) -> int:
        """The buffer under this limit."""
        return max(1, max_new_tokens // 16) if self.buffer is None else self.buffer


class VerifierConfig(Section):
    """Where completions are verified (v05.rollout.verifier)."""

    workers: int | None = Field(
        default=None,
        ge=0,
        description="processes; 0 verifies in the trainer's, unguarded; None is 0 for tasks that cannot stall, else 2",
    )
    time_limit: float = Field(default=10.0, gt=0, description="seconds an item may take; with workers only")
    memory_gib: float = Field(default=2.0, gt=0, description="that a process may use to verify; on Linux only")


class EngineConfig(Section):
    """What samples rollouts (v05.rollout): the embedded engine, or one with weights of its own, brought up to date every step."""

    kind: Engine = "transformers"
    tolerance: float = Field(
        default=1e-3, gt=0, description="largest difference between its log-probabilities and the trainer's after a sync; nats"
    )
    dtype: Literal["float32", "bfloat16", "float16"] = Field(default="float32", description="of vllm")
    kv_cache_gib: float = Field(default=1.0, gt=0, description="vllm's memory for keys and values")
    url: str = Field(default="http://127.0.0.1:8000", description="of the vllm_server")
    time_limit: float = Field(
        default=600.0, gt=0, description="seconds that a rollout may take before it is sampled elsewhere; of ray and vllm_server"
    )
    actors: int = Field(default=1, ge=1, description="of ray")
    actor_gpus: float = Field(default=0, ge=0, description="that an actor of ray asks for")
    actor_engine: Literal["transformers", "vllm"] = Field(default="transformers", description="inside the actors of ray")


class V0Config(Section):
    """The generalist value model as the prior (v05.prior.v0)."""

    backbone: Path | None = Field(default=None, description="model folder that reads prompts; none is the policy's own warm start")
    adapter: Path | None = Field(default=None, description="adapter that v05 fit-prior trained on that backbone")
    context: int = Field(default=256, ge=1, le=1024, description="prompts of the run's latest that it infers from")
    diverse: bool = Field(default=False, description="half of the context covers more of the past instead")


class EvaluationConfig(Section):
    """Held-out accuracy and the baseline's error against a large-sample truth; neither counts as training rollouts."""

    evaluations: int = Field(default=8, ge=1, description="held-out evaluations after the first step, evenly over the run")
    prompts: int = Field(default=1024, ge=1)
    skip: int = Field(default=0, ge=0, description="held-out prompts to leave for others before the first")
    samples: int = Field(default=4, ge=1, description="rollouts a held-out prompt")
    final_samples: int = Field(
        default=8, ge=0, description="more of them at the end, for mean@k and pass@k, beside a greedy one; 0 leaves all three out"
    )
    probe_prompts: int = Field(default=32, ge=0, description="prompts of the step whose true success rate is measured")
    probe_samples: int = Field(default=128, ge=2)


class RunConfig(Section):
    """One training run: one method, one seed."""

    method: str
    seed: int = Field(default=0, ge=0)
    task: TaskConfig
    policy: PolicyConfig
    chat: bool = Field(default=False, description="prompts are a user's message in the chat template of the policy's tokenizer")
    prior: Prior = "history"
    v0: V0Config = V0Config()
    leave_one_out: bool = False
    scale: Scale | None = None
    budget: BudgetConfig = BudgetConfig()
    max_refills: int = Field(default=0, ge=0, description="DAPO's dynamic sampling: extra draws to replace groups of equal rewards")
    overlong: OverlongConfig | None = None
    loss: LossConfig = LossConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    evaluation: EvaluationConfig = EvaluationConfig()
    engine: EngineConfig = EngineConfig()
    verifier: VerifierConfig = VerifierConfig()
    rollouts_per_step: int = Field(default=512, ge=1, description="prompts of a step are chosen so that about this many are used")
    total_rollouts: int = Field(default=100_000, ge=1, description="training stops at the step that reaches this many")
    sampling_batch: int = Field(default=512, ge=1, description="rollouts that the engine samples at once")
    overlap: bool = Field(
        default=False,
        description="sample a step's first rollouts while the last groups of the step before are tested: off-policy by one update",
    )
    checkpoint_seconds: float = Field(
        default=10.0, ge=0, description="between checkpoints, more where they would cost over 1 % of the time; 0: after every step"
    )
    distributed: Distributed = Field(default="ddp", description="how several processes share the policy (v05.train.distributed)")

    @model_validator(mode="after")
    def _consistent(self) -> RunConfig:
        if self.chat and self.policy.path is None:
            raise ValueError(
                "policy.path is None, but chat=True, as in the presets for language models, asks for a model with a chat template; "
                "give its folder: --policy FOLDER"
            )
        if self.budget.maximum < self.budget.initial:
            raise ValueError(f"budget.maximum={self.budget.maximum} is below budget.initial={self.budget.initial}; raise it")
        budget, method = self.budget, find_method(self.method)
        if budget.rule != "uniform" and method.budget_rule is None:
            raise ValueError(
                f"budget.rule={budget.rule!r} tests a prior, which method={self.method!r} does not have; fix its group size, as in "
                f"--method {self.method}@{budget.initial}, or use rule='uniform'"
            )
        if budget.rule == "calibrated" and not method.is_calibrated:
            raise ValueError(f"budget.rule='calibrated' needs the fit of method='calibrated', not {self.method!r}; use rule='osla'")
        if budget.rule == "variance" and not method.learns_energies:
            raise ValueError(
                f"budget.rule='variance' needs the energies that method='optimal' learns, not {self.method!r}; leave it out"
            )
        if budget.unbiased and not (method.counts_paths and budget.rule == method.budget_rule):
            raise ValueError(
                "budget.unbiased counts paths of methods v05, calibrated and optimal under their own rules osla, calibrated and "
                f"variance, not of method={self.method!r} under rule={budget.rule!r}; leave it out"
            )
        if budget.unbiased and (self.scale not in (None, "none") or self.loss.group_weighting != "prompt"):
            raise ValueError(
                f"budget.unbiased with scale={self.scale!r}, loss.group_weighting={self.loss.group_weighting!r}: the gradient is "
                "unbiased with scale='none' and group_weighting='prompt' only; set them, or leave it out"
            )
        if (budget.rule == "total") != (budget.mean is not None):
            raise ValueError(
                f"budget.mean={budget.mean} with budget.rule={budget.rule!r}; rule 'total' needs it, no other reads it"
            )
        if budget.mean is not None and not budget.initial <= budget.mean <= budget.maximum:
            raise ValueError(
                f"budget.mean={budget.mean} is not between budget.initial={budget.initial} and budget.maximum={budget.maximum}"
            )
        if self.overlong is not None and self.overlong.tokens(self.policy.max_new_tokens) >= self.policy.max_new_tokens:
            raise ValueError(
                f"overlong.buffer={self.overlong.tokens(self.policy.max_new_tokens)} leaves no length unpunished under "
                f"policy.max_new_tokens={self.policy.max_new_tokens}; make it smaller"
            )
        if self.overlong is not None and find_method(self.method).needs_prior:
            raise ValueError(f"overlong: shaped rewards leave the (0, 1) of method={self.method!r}'s prior; leave overlong out")
        if self.max_refills and method.needs_prior:
            raise ValueError(
                f"max_refills={self.max_refills}: the prior of method={self.method!r} would only see groups of mixed rewards; "
                "leave it out"
            )
        if self.prior != "history" and not method.needs_prior:
            raise ValueError(f"prior={self.prior!r}: method={self.method!r} has none; leave it out")
        if budget.chunk == "look" and budget.rule == "total":
            raise ValueError("budget.chunk='look' with budget.rule='total', which has no cost to look ahead to; give an integer")
        if self.overlap and self.max_refills:
            raise ValueError("overlap=True with max_refills, which draws prompts until a step has enough; leave one of the two out")
        if self.overlap and self.engine.kind != "transformers" and self.loss.importance_cap is None:
            raise ValueError(
                f"overlap=True with engine.kind={self.engine.kind!r} needs loss.importance_cap, such as 2: ratios are to the "
                "trainer's policy there, and not to the policy that a rollout was sampled from"
            )
        if budget.cost is not None and budget.rule in ("uniform", "total"):
            raise ValueError(f"budget.cost={budget.cost} with budget.rule={budget.rule!r}, which has no cost; leave it out")
        if self.rollouts_per_step < self.budget.initial:
            raise ValueError(
                f"rollouts_per_step={self.rollouts_per_step} does not hold one prompt of budget.initial={self.budget.initial}"
            )
        return self


def read_config(path: Path, settings: Sequence[str] = ()) -> RunConfig:
    """The run of a config.json, with settings as in `run_config`; ValueError names the file or the setting."""
    try:
        return validated(RunConfig, read_object(path), settings)
    except ValidationError as error:
        raise ValueError(f"--config {path}: {explained_places(error)}") from None
