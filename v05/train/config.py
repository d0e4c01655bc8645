"""The configuration of a training run, as pydantic models.

`RunConfig` describes a whole run. The trainer writes it to the run directory as config.json, and `v05 train --config` runs that
file again. v05.train.presets makes a `RunConfig` from a preset's name and a method.
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
    """A section of a run's configuration. Unknown fields are refused, so that a misspelt setting cannot pass for its default."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class WarmStartConfig(Section):
    """Supervised training of the character-level policy, until it is good enough to learn from its own rollouts.

    Accuracy jumps suddenly from a few percent to most prompts, at a step that differs by seed. Training therefore stops by
    validation accuracy rather than after a fixed number of steps.
    """

    target_accuracy: float = Field(
        default=0.35,
        gt=0,
        lt=1,
        description="held-out accuracy at which the learning rate starts to decay; the decay itself still raises accuracy a lot",
    )
    batch_size: int = Field(default=128, ge=1, description="prompts per step")
    learning_rate: float = Field(
        default=3e-3, gt=0, description="AdamW's learning rate after 100 steps of warm-up; lower it if the warm start diverges"
    )
    max_steps: int = Field(default=8000, ge=1, description="steps after which the warm start gives up with an error")
    decay_steps: int = Field(
        default=100, ge=0, description="steps of linear decay to 0 after the target is reached; fewer end nearer to the target"
    )
    validate_every: int = Field(default=100, ge=1, description="steps between measurements of held-out accuracy")
    validation_prompts: int = Field(
        default=256, ge=1, description="held-out prompts per measurement; evaluations of the run use other prompts"
    )
    seed: int = Field(default=0, description="seed of the initial weights; runs with the same warm start share its cached policy")


class LoraConfig(Section):
    """LoRA (arXiv 2106.09685): only low-rank terms beside the linear layers are trained. They are merged into the weights at the
    end."""

    rank: int = Field(default=16, ge=1, description="rank of the terms; higher can learn more and needs more memory")
    alpha: int = Field(default=32, ge=1, description="the terms are multiplied by alpha / rank")
    target_modules: tuple[str, ...] | None = Field(
        default=None,
        min_length=1,
        description="names of the layers to adapt, in peft's notation; None adapts all linear layers except the output layer",
    )


class PolicyConfig(Section):
    """The policy: a model folder (`path`), or the size of a character-level decoder and the settings of its warm start."""

    path: Path | None = Field(
        default=None, description="Hugging Face model folder to train; None makes a character-level decoder of the sizes below"
    )
    hidden_size: int = Field(default=128, description="width of the decoder that is made; a multiple of heads")
    layers: int = Field(default=3, description="layers of the decoder that is made")
    heads: int = Field(default=4, description="attention heads of the decoder that is made")
    intermediate_size: int = Field(default=384, description="width of its feed-forward layers")
    max_new_tokens: int = Field(
        default=10, ge=1, description="longest completion, in tokens; raise it if many completions are cut off before their answer"
    )
    dtype: Literal["float32", "bfloat16"] = Field(
        default="float32",
        description="dtype of forward and backward passes; bfloat16 halves their memory, and the optimiser still keeps float32 "
        "weights (v05.train.masters)",
    )
    lora: LoraConfig | None = Field(
        default=None, description="train low-rank terms only, which saves memory; needs the extra 'lora'. None trains all weights"
    )
    warm_start: WarmStartConfig = Field(
        default=WarmStartConfig(), description="supervised training of the decoder that is made; unused with path"
    )


class BudgetConfig(Section):
    """How many rollouts each prompt gets: `initial`, then more while `rule` asks for them, up to `maximum`
    (v05.budget.RolloutAllocator)."""

    rule: Literal["uniform", "osla", "calibrated", "variance", "total"] = Field(
        default="uniform",
        description="what asks for more rollouts: 'uniform' never; 'osla', 'calibrated' and 'variance' are the tests of methods "
        "v05, calibrated and optimal; 'total' shares out mean rollouts per prompt where they gain most",
    )
    initial: int = Field(
        default=16, ge=1, description="rollouts of every prompt before its first test; with rule 'uniform' all of them"
    )
    maximum: int = Field(default=16, ge=1, description="most rollouts of a prompt; not used by rule 'uniform'")
    cost: float | None = Field(
        default=None,
        ge=0,
        description="gain below which another rollout is not worth sampling (RolloutAllocator says in which units); higher samples "
        "fewer, None is the rule's own default",
    )
    mean: float | None = Field(default=None, gt=0, description="rollouts per prompt that rule 'total' spends on average")
    chunk: Chunk = Field(
        default=1,
        description="rollouts added per test; 1 is the paper's rule and spends the fewest, 'look' adds as many at once as the rule "
        "is expected to ask for, which takes fewer serial rounds",
    )
    unbiased: bool = Field(
        default=False,
        description="correct the advantages for the bias of stopping early (v05.path_counting); only with the method's own test",
    )

    @field_validator("chunk", mode="plain")
    @classmethod
    def _is_a_chunk(cls, chunk: Any) -> Any:
        RolloutAllocator(chunk=chunk)  # raises ValueError for an invalid chunk
        return chunk


class LossConfig(Section):
    """The policy-gradient loss (v05.ops.policy_loss). A field that is None takes its value from the row `kind` of the table of
    losses."""

    kind: Loss = Field(default="ppo", description="row of the table of losses (docs/losses.md)")
    clip_low: float | None = Field(default=None, gt=0, le=1, description="probability ratios are clipped below 1 - clip_low")
    clip_high: float | None = Field(
        default=None,
        gt=0,
        description="probability ratios are clipped above 1 + clip_high; raise it to let unlikely tokens gain probability faster",
    )
    aggregation: Aggregation | None = Field(
        default=None,
        description="how tokens are averaged: over all tokens ('token'), first within each rollout ('sequence'), or by a constant "
        "length ('constant')",
    )
    group_weighting: GroupWeighting = Field(
        default="prompt",
        description="'prompt' gives every prompt the same weight, whatever its number of rollouts; 'rollout' gives every rollout "
        "the same weight",
    )
    kl_coefficient: float = Field(
        default=0.0,
        ge=0,
        description="weight of a KL penalty towards the policy that training started from; above 0 keeps a second copy of the "
        "policy in memory",
    )
    importance_cap: float | None = Field(
        default=None,
        gt=0,
        description="largest weight of truncated importance sampling, which corrects for an engine whose probabilities differ from "
        "the trainer's; set it (to 2, for example) for engines with their own weights, None does not correct",
    )
    importance_level: Level = Field(
        default="token", description="whether importance weights are ratios of single tokens or of whole rollouts"
    )


class OptimizerConfig(Section):
    """The AdamW optimiser. Each step's prompts are split into `updates_per_step` parts, with one update on each."""

    # Above 1e30, AdamW's step overflows float32.
    learning_rate: float = Field(
        default=3e-4,
        gt=0,
        le=1e30,
        description="AdamW's learning rate; 3e-4 suits the small policies, about 1e-5 a pretrained model",
    )
    weight_decay: float = Field(default=0.0, ge=0, description="AdamW's weight decay")
    max_grad_norm: float = Field(default=1.0, gt=0, description="gradients with a larger norm are scaled down to it")
    updates_per_step: int = Field(
        default=1, ge=1, description="optimiser updates on each step's rollouts; more than 1 makes the later ones off-policy"
    )
    tokens_per_backward: int = Field(
        default=16_384,
        ge=1,
        description="most tokens, padding included, that a process passes forward and backward at once; lower it if memory runs "
        "out, which changes results by rounding only",
    )
    gradient_checkpointing: bool = Field(
        default=False,
        description="recompute each layer's activations in the backward pass instead of keeping them: less memory, more time",
    )


class OverlongConfig(Section):
    """DAPO's soft penalty for long completions: 0 up to max_new_tokens - buffer tokens, then falling linearly to -1 at
    max_new_tokens."""

    buffer: int | None = Field(
        default=None,
        ge=1,
        description="tokens below max_new_tokens at which the penalty starts; None is a sixteenth of max_new_tokens, and at least "
        "1",
    )

    def tokens(self, max_new_tokens: int) -> int:
        """The buffer in tokens for this length limit."""
        return max(1, max_new_tokens // 16) if self.buffer is None else self.buffer


class VerifierConfig(Section):
    """How completions are verified (v05.rollout.verifier)."""

    workers: int | None = Field(
        default=None,
        ge=0,
        description="verifier processes; 0 verifies in the trainer's process, without limits. None is 0 for tasks whose "
        "verification cannot hang, else 2; raise it if verify_seconds is a large part of a step",
    )
    time_limit: float = Field(
        default=10.0,
        gt=0,
        description="seconds that verifying one completion may take before it counts as wrong; only with workers",
    )
    memory_gib: float = Field(default=2.0, gt=0, description="GiB of memory that a verifier process may use; on Linux only")


class EngineConfig(Section):
    """The engine that samples rollouts (v05.rollout): the embedded one, or one that gets a copy of the weights at every step."""

    kind: Engine = Field(
        default="transformers",
        description="'transformers' samples from the trainer's own weights; 'vllm' in this process, 'vllm_server' a running server "
        "and 'ray' actors on a cluster sample from a copy",
    )
    tolerance: float = Field(
        default=1e-3,
        gt=0,
        description="largest difference, in nats, between the engine's and the trainer's log-probabilities after a sync; a larger "
        "one ends the run. Raise it, and set loss.importance_cap, for an engine in bfloat16",
    )
    dtype: Literal["float32", "bfloat16", "float16"] = Field(default="float32", description="dtype of vllm's weights")
    kv_cache_gib: float = Field(
        default=1.0, gt=0, description="GiB of memory for vllm's keys and values; more allow more rollouts at once"
    )
    sleep: Literal[1, 2] | None = Field(
        default=None,
        description="level of the sleep in which vllm gives its GPU memory back while gradients are computed: 1 keeps its weights "
        "in CPU memory, 2 drops them, because every step loads new ones; None: it stays awake",
    )
    url: str = Field(default="http://127.0.0.1:8000", description="address of the vllm_server")
    time_limit: float = Field(
        default=600.0,
        gt=0,
        description="seconds that a rollout may take before it is given up and sampled again; for ray and vllm_server",
    )
    actors: int = Field(default=1, ge=1, description="number of ray actors")
    actor_gpus: float = Field(default=0, ge=0, description="GPUs that each ray actor asks for")
    actor_engine: Literal["transformers", "vllm"] = Field(default="transformers", description="the engine inside each ray actor")


class V0Config(Section):
    """The generalist value model, for prior 'v0' (v05.prior.v0)."""

    backbone: Path | None = Field(
        default=None, description="model folder whose features of prompts are used; None is the policy that training starts from"
    )
    adapter: Path | None = Field(
        default=None, description="adapter file that v05 fit-prior trained on this backbone; None uses the backbone's own features"
    )
    context: int = Field(default=256, ge=1, le=1024, description="most recent prompts of the run from which it infers")
    diverse: bool = Field(default=False, description="let half of the context cover more of the past instead of the latest prompts")


class EvaluationConfig(Section):
    """Measurements during a run: held-out accuracy, and the error of the baseline. Their rollouts do not count as training
    rollouts."""

    evaluations: int = Field(
        default=8, ge=1, description="held-out evaluations after the one before training, evenly spaced over the run"
    )
    prompts: int = Field(
        default=1024, ge=1, description="held-out prompts per evaluation; more give narrower intervals and take longer"
    )
    skip: int = Field(
        default=0, ge=0, description="held-out prompts to pass over first, so that tuning runs use other prompts than final runs"
    )
    samples: int = Field(default=4, ge=1, description="rollouts per held-out prompt")
    final_samples: int = Field(
        default=8,
        ge=0,
        description="rollouts per held-out prompt at the end, for mean@k and pass@k, beside a greedy one; 0 measures none of the "
        "three",
    )
    probe_prompts: int = Field(
        default=32,
        ge=0,
        description="prompts of a step whose true success rate is measured, for the baseline's error; 0 turns this off",
    )
    probe_samples: int = Field(default=128, ge=2, description="rollouts per probed prompt")


class RunConfig(Section):
    """One training run: one method with one seed."""

    method: str = Field(description="how advantages are computed: a name of v05.methods.METHODS")
    seed: int = Field(default=0, ge=0, description="seed of the order of prompts, of sampling and of new LoRA weights")
    task: TaskConfig = Field(description="where prompts come from and how completions are verified")
    policy: PolicyConfig = Field(description="the model to train")
    chat: bool = Field(
        default=False,
        description="send each prompt as a user's message in the chat template of the policy's tokenizer; for instruct models",
    )
    prior: Prior = Field(
        default="history",
        description="where the success rate of a prompt is predicted from (v05 train --help, --prior); only for methods that read "
        "a prior",
    )
    v0: V0Config = Field(default=V0Config(), description="settings of prior 'v0'")
    leave_one_out: bool = Field(default=False, description="leave a rollout's own reward out of its baseline")
    scale: Scale | None = Field(default=None, description="what advantages are divided by; None is the method's own choice")
    budget: BudgetConfig = BudgetConfig()
    max_refills: int = Field(
        default=0,
        ge=0,
        description="DAPO's dynamic sampling: how often a step may draw further prompts to replace groups whose rewards are all "
        "equal",
    )
    overlong: OverlongConfig | None = Field(default=None, description="DAPO's penalty for long completions; None is no penalty")
    loss: LossConfig = LossConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    evaluation: EvaluationConfig = EvaluationConfig()
    engine: EngineConfig = EngineConfig()
    verifier: VerifierConfig = VerifierConfig()
    rollouts_per_step: int = Field(
        default=512,
        ge=1,
        description="rollouts per step, approximately: each step draws as many prompts as are expected to need this many",
    )
    total_rollouts: int = Field(
        default=100_000, ge=1, description="training rollouts of the run, which ends with the step that comes nearest"
    )
    sampling_batch: int = Field(
        default=512, ge=1, description="rollouts that the engine samples at the same time; lower it if memory runs out"
    )
    overlap: bool = Field(
        default=False,
        description="sample the next step's first rollouts while the last groups of this step are tested; faster, but those "
        "rollouts are off-policy by one update",
    )
    checkpoint_seconds: float = Field(
        default=10.0,
        ge=0,
        description="seconds between checkpoints, or longer if writing them would take over 1 % of the time; 0 writes one after "
        "every step",
    )
    distributed: Distributed = Field(
        default="ddp",
        description="how torchrun's processes share the policy: 'ddp' copies it, 'fsdp2' shards it (v05.train.distributed)",
    )

    @model_validator(mode="after")
    def _consistent(self) -> RunConfig:
        if self.chat and self.policy.path is None:
            raise ValueError(
                "policy.path is None, but chat=True (set by presets for language models) asks for a model with a chat template; "
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
                f"budget.rule='variance' needs the energies that only method='optimal' learns, not {self.method!r}; leave it out"
            )
        if budget.unbiased and not (method.counts_paths and budget.rule == method.budget_rule):
            raise ValueError(
                "budget.unbiased works for methods v05, calibrated and optimal with their own rules osla, calibrated and variance, "
                f"not for method={self.method!r} with rule={budget.rule!r}; leave it out"
            )
        if budget.unbiased and (self.scale not in (None, "none") or self.loss.group_weighting != "prompt"):
            raise ValueError(
                f"budget.unbiased with scale={self.scale!r}, loss.group_weighting={self.loss.group_weighting!r}: the gradient is "
                "unbiased with scale='none' and group_weighting='prompt' only; set them, or leave it out"
            )
        if (budget.rule == "total") != (budget.mean is not None):
            raise ValueError(
                f"budget.mean={budget.mean} with budget.rule={budget.rule!r}; rule 'total' needs a mean, and no other rule has one"
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
            raise ValueError(
                f"overlong: its penalty takes rewards out of the [0, 1] that method={self.method!r}'s prior needs; leave it out"
            )
        if self.max_refills and method.needs_prior:
            raise ValueError(
                f"max_refills={self.max_refills}: the prior of method={self.method!r} would only see groups of mixed rewards; "
                "leave it out"
            )
        if self.prior != "history" and not method.needs_prior:
            raise ValueError(f"prior={self.prior!r}: method={self.method!r} has no prior; leave it out")
        if budget.chunk == "look" and budget.rule == "total":
            raise ValueError("budget.chunk='look' with budget.rule='total', which has no cost to look ahead by; give an integer")
        if self.overlap and self.max_refills:
            raise ValueError("overlap=True with max_refills, which may draw prompts at the end of a step; leave one of the two out")
        if self.overlap and self.engine.kind != "transformers" and self.loss.importance_cap is None:
            raise ValueError(
                f"overlap=True with engine.kind={self.engine.kind!r} needs loss.importance_cap, such as 2: with this engine "
                "the loss takes ratios to the trainer's policy, not to the one that sampled the rollouts"
            )
        if self.engine.sleep is not None and self.engine.kind != "vllm":
            raise ValueError(
                f"engine.sleep={self.engine.sleep} with engine.kind={self.engine.kind!r}: only vLLM in the trainer's process "
                "sleeps; set engine.kind=vllm, or leave sleep out"
            )
        if budget.cost is not None and budget.rule in ("uniform", "total"):
            raise ValueError(f"budget.cost={budget.cost} with budget.rule={budget.rule!r}, which has no cost; leave it out")
        if self.rollouts_per_step < self.budget.initial:
            raise ValueError(
                f"rollouts_per_step={self.rollouts_per_step} is less than one prompt's budget.initial={self.budget.initial}"
            )
        return self


def read_config(path: Path, settings: Sequence[str] = ()) -> RunConfig:
    """The run that a config.json describes, with `settings` ("NAME=VALUE") put over it as in `run_config`.

    Raises:
        ValueError: names the file or the setting that is invalid.
        OSError: the file cannot be read.
    """
    try:
        return validated(RunConfig, read_object(path), settings)
    except ValidationError as error:
        raise ValueError(f"--config {path}: {explained_places(error)}") from None
