"""V_0.5 in TRL: `V05Trainer` in place of `GRPOTrainer`. Tested with TRL 1.16.0, on CPU, sampling with transformers.

    trainer = V05Trainer(model=..., reward_funcs=..., train_dataset=..., args=V05Config(num_generations=16, initial_generations=4))

`V05Trainer` replaces the advantages and, if group sizes are adaptive, the sampling. A prompt then starts with `initial_generations`
completions and is tested after every round, up to `num_generations`. Padding rows (the prompt and one token outside the loss) take
the places of completions that were not needed. They are dropped once all completions are scored, except for the few that make the
batch divisible into micro-batches. Evaluation is unchanged.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from accelerate.utils import gather_object
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR
from trl import GRPOConfig, GRPOTrainer

from v05.budget import Chunk
from v05.energy import completion_energy
from v05.estimator import Estimator, GroupWeighting
from v05.integrations.groups import prompt_text
from v05.integrations.learnt import keep_learnt, restore_learnt
from v05.integrations.settings import Settings, prior_of
from v05.methods import find_method
from v05.prior import ValuePrior
from v05.prior.calibration import Calibrator

EPS = 1e-4  # GRPOTrainer adds this to the standard deviation
LOSSES_BY_TOKEN = ("dapo", "cispo", "vespo")  # divided by `num_items_in_batch`; other losses divide by rows, padding rows included
PRIOR_FILE = "v05_prior.safetensors"


@dataclass
class V05Config(GRPOConfig):  # type: ignore[misc]
    """GRPOConfig with the settings of V_0.5.

    Attributes:
        method: a name of `v05.methods.METHODS`. The method determines how advantages are scaled; `scale_rewards` is ignored.
        reward_range: [lo, hi], which must contain all weighted sums of rewards. Only methods with a prior read it.
        leave_one_out: whether the baseline of a completion is computed from the prompt's other completions only.
        initial_generations: completions of a prompt before its first test. Sizes are adaptive if this is below `num_generations`.
            None samples all `num_generations` completions at once.
        chunk_generations: completions added at a time after the first test, or "look" (only from Python) to add as many at once as
            the test is expected to ask for.
        unbiased: whether the advantages of prompts that the test stopped come from counted paths (v05.path_counting), so that
            stopping does not bias the gradient. It needs adaptive sizes and group_weighting "prompt".
        group_weighting: "prompt" gives every prompt the same weight in the loss: the advantages of a group of k completions are
            multiplied by initial_generations / k. "rollout" does not change them.

    Raises:
        ValueError: adaptive sizes with a method, a loss or a number of processes that does not support them; `unbiased` without
            adaptive sizes or without group_weighting "prompt".
    """

    method: str = "v05"
    reward_range: list[float] = field(default_factory=lambda: [0.0, 1.0])
    leave_one_out: bool = False
    initial_generations: int | None = 4
    chunk_generations: int | str = 1  # HfArgumentParser reads this union as int
    unbiased: bool = False
    group_weighting: GroupWeighting = "rollout"

    def __post_init__(self) -> None:
        super().__post_init__()
        needs_prior = find_method(self.method).needs_prior
        if self.multi_objective_aggregation != "sum_then_normalize":
            raise ValueError(
                f"multi_objective_aggregation={self.multi_objective_aggregation!r}: V_0.5 works on sums of rewards; "
                "choose 'sum_then_normalize'"
            )
        if self.unbiased and not (self.adaptive and self.group_weighting == "prompt"):
            raise ValueError(
                f"unbiased=True with initial_generations={self.initial_generations}, group_weighting={self.group_weighting!r}: it "
                "needs adaptive sizes and prompts of equal weight; set initial_generations below num_generations and "
                "group_weighting='prompt', or set leave_one_out=True instead"
            )
        if not self.adaptive:
            return
        for problem, found, remedy in (
            (not needs_prior, f"method={self.method!r}", "choose a method with a prior"),
            (self.loss_type not in LOSSES_BY_TOKEN, f"loss_type={self.loss_type!r}", f"choose {' or '.join(LOSSES_BY_TOKEN)}"),
            (self.world_size > 1, f"{self.world_size} processes", "train in one"),
        ):
            if problem:
                raise ValueError(f"initial_generations={self.initial_generations} with {found}; {remedy}, or give None")

    @property
    def adaptive(self) -> bool:
        return self.initial_generations is not None and self.initial_generations < self.num_generations


class V05Trainer(GRPOTrainer):  # type: ignore[misc]
    """GRPOTrainer with V_0.5's advantages and, where `args` asks for it, its sequential budget.

    Args:
        prior: predicts success rates from prompt texts and learns from the rewards. None takes the method's own prior. Checkpoints
            hold the state of the prior and of the calibrator.
        args: a V05Config. All other arguments are GRPOTrainer's.

    Raises:
        ValueError: `args` is not a V05Config; adaptive sizes with an environment or a rollout function, which do their own
            sampling.
    """

    def __init__(self, *args: Any, prior: ValuePrior | None = None, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if not isinstance(self.args, V05Config):
            raise ValueError(f"args: {type(self.args).__name__}; give V05Trainer a V05Config")
        if self.args.adaptive and (self.environment_factories is not None or self.rollout_func is not None):
            raise ValueError("initial_generations: environments and rollout functions do their own sampling; give None")
        method = find_method(self.args.method)
        self.prior = prior_of(Settings(method=method.name, prior=method.prior)) if prior is None else prior
        self.calibrator = Calibrator()  # used by methods that have a calibration
        self._batch: list[dict[str, Any]] = []  # rows that are being sampled
        self._rates = np.zeros(0)  # predicted success rates of their prompts
        self._scored: torch.Tensor | None = None  # (N, functions) rewards of rows that were scored during sampling
        self._rewards = torch.zeros(0, device="cpu")  # (N, functions) rewards of the rows of all processes
        self._padding: torch.Tensor | None = None  # (N,) bool, True for padding rows

    def _generate_and_score_completions(self, inputs: list[dict[str, Any]]) -> dict[str, Any]:
        if not self.model.training:
            return dict(super()._generate_and_score_completions(inputs))
        args, size = self.args, self.num_generations
        prompts = [prompt_text(prompt) for prompt in gather_object([row["prompt"] for row in inputs])[::size]]
        estimator = self.estimator
        self._batch, self._scored, self._padding = inputs, None, None
        self._rates = estimator.open(prompts)
        output: dict[str, Any] = super()._generate_and_score_completions(inputs)

        mask = output["completion_mask"] * output.get("tool_mask", 1)
        trained = self.accelerator.gather((mask != 0).any(dim=1)).cpu()
        sampled = torch.arange(len(trained), device="cpu") if self._padding is None else torch.nonzero(~self._padding).flatten()
        estimate = estimator.advantages(
            self._total(self._rewards).double().cpu()[sampled],
            self._rates,
            group_offsets=np.searchsorted(sampled.numpy(), np.arange(0, len(trained) + 1, size)),
            valid=trained[sampled],
            energy=self._weights(output, mask, sampled),
        )
        estimator.close(prompts, self._rates, *estimator.outcomes(estimate.stats), estimate.energies)
        advantages = torch.zeros(len(trained), device="cpu").index_put((sampled,), estimate.advantages)
        self._logs["advantages"].extend(advantages.tolist())
        self._metrics["train"]["v05/group_size"].append(estimate.stats.count.double().mean().item())
        if estimate.stats.weight is not None:
            self._metrics["train"]["v05/weight"].append(estimate.stats.weight.mean().item())
        if args.unbiased:
            self._metrics["train"]["v05/counted"].append(float(estimate.counted.mean()))
        first = self.accelerator.process_index * len(inputs)
        output["advantages"] = advantages[first : first + len(inputs)].to(self.accelerator.device)
        return output if self._padding is None else self._without_padding(output, self._padding)

    def _weights(self, output: dict[str, Any], mask: torch.Tensor, sampled: torch.Tensor) -> torch.Tensor | None:
        """Lengths or energies of the sampled rows of all processes, whichever the method reads.

        None if the method reads neither, or if it reads energies and TRL has no log-probabilities. TRL has them with vLLM, or if a
        batch is used for several updates.
        """
        logprobs = output.get("sampling_per_token_logps", output.get("old_per_token_logps"))

        def energies() -> torch.Tensor | None:
            if logprobs is None:
                return None
            found = [completion_energy(row[tokens].cpu()) for row, tokens in zip(logprobs, mask != 0, strict=True)]
            return torch.tensor(found, dtype=torch.float64, device=self.accelerator.device)

        mine = self.estimator.of.weights(lambda: (mask != 0).sum(1).double(), energies)
        if mine is None:
            return None
        weights: torch.Tensor = self.accelerator.gather(mine).cpu()
        return weights[sampled]

    def _calculate_rewards(self, inputs: Any, prompts: Any, completions: Any, completion_ids_list: Any) -> torch.Tensor:
        """(N, functions) rewards of the rows of all processes. They are stored because TRL passes on only advantages."""
        if self._scored is None or not self.model.training:
            self._rewards = super()._calculate_rewards(inputs, prompts, completions, completion_ids_list)
        else:
            self._rewards = self._scored
        return self._rewards

    def _generate(self, prompts: list[Any]) -> tuple[Any, ...]:
        """TRL's method, but with completions sampled in rounds, and padding rows in the places of those that were not needed."""
        if not (self.model.training and self.args.adaptive):
            return tuple(super()._generate(prompts))
        size = self.num_generations
        generate, score = super()._generate, super()._calculate_rewards
        allocator = self.estimator.allocator()
        allocator.open(np.arange(len(prompts) // size), self.estimator.in_reward_units(self._rates))
        rows: dict[int, tuple[Any, ...]] = {}  # prompt ids, completion ids, tool mask, completion, log-probabilities
        scored = torch.full((len(prompts), len(self.reward_funcs)), torch.nan, device=self.accelerator.device)
        logged: dict[str, list[Any]] = {}  # columns of the completions table
        while not allocator.done:
            leases = allocator.lease(len(prompts))
            chosen = (np.asarray(leases.group) * size + leases.index).tolist()
            drawn = [prompts[row] for row in chosen]
            prompt_ids, ids, tool_mask, completions, logprobs, extra, images, _ = generate(drawn)
            if extra or images is not None:
                raise ValueError("initial_generations: sampling in rounds takes text prompts only; give None")
            scored[chosen] = score([self._batch[row] for row in chosen], drawn, completions, ids)
            self._place_logged(logged, chosen, len(prompts))
            tool_mask = [[1] * len(tokens) for tokens in ids] if tool_mask is None else tool_mask
            rewards = self._total(scored[chosen]).double().cpu().numpy()
            allocator.report(leases.lease_id, np.where(self._trains(ids, tool_mask), rewards, np.nan))
            logprobs = [None] * len(ids) if logprobs is None else logprobs
            rows.update(zip(chosen, zip(prompt_ids, ids, tool_mask, completions, logprobs, strict=True), strict=True))

        nothing = "" if isinstance(rows[0][3], str) else [{"role": "assistant", "content": ""}]
        padding = [row not in rows for row in range(len(prompts))]
        for row in np.flatnonzero(padding).tolist():
            alike = rows[row - row % size]  # the first completion of the same prompt
            rows[row] = (alike[0], [self.eos_token_ids[0]], [0], nothing, None if alike[4] is None else [0.0])
        self._scored, self._padding = scored, torch.tensor(padding, device="cpu")
        self._pending_extra_logs.update(logged)
        columns = [list(column) for column in zip(*(rows[row] for row in range(len(prompts))), strict=True)]
        return (*columns[:4], None if rows[0][4] is None else columns[4], {}, None, [])

    def _trains(self, ids: list[list[int]], tool_mask: list[list[int]]) -> list[bool]:
        """Whether TRL will train on any token of each completion. TRL may mask truncated completions."""
        ends = [*self.eos_token_ids, self._tokenizer.pad_token_id]
        whole = [not self.mask_truncated_completions or tokens[-1] in ends for tokens in ids]
        return [ended and any(mask) for ended, mask in zip(whole, tool_mask, strict=True)]

    def _place_logged(self, logged: dict[str, list[Any]], chosen: list[int], count: int) -> None:
        """Move the values that reward functions logged for a round's rows into columns of all `count` rows, None where missing.

        TRL appends logged values in the order of calls, but its table needs one value per row, in row order.
        """
        for column, values in self._pending_extra_logs.items():
            if len(values) != len(chosen):
                raise ValueError(
                    f"log_extra({column!r}, ...): {len(values)} values for {len(chosen)} completions; give one for each"
                )
            whole = logged.setdefault(column, [None] * count)
            for row, value in zip(chosen, values, strict=True):
                whole[row] = value
        self._pending_extra_logs.clear()

    def _generate_single_turn(
        self, prompt_ids: Any, images: Any, multimodal_fields: Any, num_generations: int, has_tool_images: bool = False
    ) -> tuple[Any, ...]:
        """TRL's method. It tells vLLM how many consecutive rows share a prompt; in adaptive rounds this number is 1."""
        alike = 1 if self.model.training and self.args.adaptive else num_generations
        return tuple(super()._generate_single_turn(prompt_ids, images, multimodal_fields, alike, has_tool_images))

    def _without_padding(self, output: dict[str, Any], padding: torch.Tensor) -> dict[str, Any]:
        """The sampled rows of `output`, and as many padding rows as make it divisible into micro-batches."""
        sampled = torch.nonzero(~padding).flatten()
        fill = torch.nonzero(padding).flatten()[: -len(sampled) % self.args.steps_per_generation]
        rows = torch.cat((sampled, fill))
        return {
            name: value[rows.to(value.device)] if isinstance(value, torch.Tensor) and value.ndim else value
            for name, value in output.items()
        }

    @property
    def estimator(self) -> Estimator:
        """The estimator of `args`, with this trainer's prior and calibrator."""
        args = self.args
        low, high = args.reward_range
        return Estimator(
            args.method,
            self.prior,
            self.calibrator,
            reward_range=(low, high),
            leave_one_out=args.leave_one_out,
            eps=EPS,
            initial=args.initial_generations or self.num_generations,
            maximum=self.num_generations,
            chunk=cast("Chunk", args.chunk_generations),
            unbiased=args.unbiased,
            group_weighting=args.group_weighting,
        )

    def _total(self, rewards: torch.Tensor) -> torch.Tensor:
        """(N,) weighted sums of (N, functions) rewards, as in GRPOTrainer. NaN for rows that no function has scored."""
        total = (rewards * self.reward_weights.to(rewards.device)).nansum(dim=1)
        return torch.where(rewards.isnan().all(dim=1), torch.nan, total)

    def _learners(self) -> dict[str, ValuePrior | Calibrator]:
        """The learners whose states are kept in checkpoints."""
        return {"prior": self.prior, "calibrator": self.calibrator}

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        super()._save_checkpoint(model, trial)
        if self.args.should_save:
            folder = Path(self._get_output_dir(trial=trial)) / f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
            keep_learnt(folder / PRIOR_FILE, self._learners())

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is not None:
            restore_learnt(Path(checkpoint) / PRIOR_FILE, self._learners())
