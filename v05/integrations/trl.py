"""V_0.5 in TRL: `V05Trainer` in place of `GRPOTrainer`. Tested with TRL 1.16.0, on CPU, sampling with transformers.

    trainer = V05Trainer(model=..., reward_funcs=..., train_dataset=..., args=V05Config(num_generations=16, initial_generations=4))

What is replaced is the advantages, and, where sizes are adaptive, the sampling: a prompt starts with `initial_generations`
completions and is tested after every round, up to `num_generations`. The places of completions that were not needed hold padding
rows (the prompt and one token that the loss does not see). Once all is scored they are dropped, but for the few that make the batch
divide into micro-batches. Evaluation is TRL's.
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

EPS = 1e-4  # what GRPOTrainer adds to a deviation
LOSSES_BY_TOKEN = ("dapo", "cispo", "vespo")  # divided by `num_items_in_batch`; the others count rows, and padding rows with them
PRIOR_FILE = "v05_prior.safetensors"


@dataclass
class V05Config(GRPOConfig):  # type: ignore[misc]
    """GRPOConfig and what V_0.5 adds.

    Attributes:
        method: a name of `v05.methods.METHODS`. It says how advantages are scaled; `scale_rewards` is not read.
        reward_range: [lo, hi] that holds all weighted sums of rewards; read by methods with a prior.
        leave_one_out: the baseline of a completion is computed from the prompt's other completions.
        initial_generations: completions of a prompt before its first test, up to `num_generations`; None samples all of them.
        chunk_generations: completions added at a time after that, or "look" (from Python), as many at once as the test is expected
            to ask for.
        unbiased: the advantages of prompts that the test stopped come from counted paths (v05.path_counting), so that the stop does
            not bias the gradient. With adaptive sizes and group_weighting "prompt".
        group_weighting: "prompt" has prompts weigh alike in the loss, however many completions each got: the advantages of a group
            of k are multiplied by initial_generations / k. "rollout" leaves them.

    Raises:
        ValueError: adaptive sizes with a method, a loss or a number of processes that they do not work with; unbiased advantages
            without them.
    """

    method: str = "v05"
    reward_range: list[float] = field(default_factory=lambda: [0.0, 1.0])
    leave_one_out: bool = False
    initial_generations: int | None = 4
    chunk_generations: int | str = 1  # a union that HfArgumentParser reads, as int
    unbiased: bool = False
    group_weighting: GroupWeighting = "rollout"

    def __post_init__(self) -> None:
        super().__post_init__()
        needs_prior = find_method(self.method).needs_prior
        if self.multi_objective_aggregation != "sum_then_normalize":
            raise ValueError(
                f"multi_objective_aggregation={self.multi_objective_aggregation!r}: V_0.5 judges sums of rewards; "
                "choose 'sum_then_normalize'"
            )
        if self.unbiased and not (self.adaptive and self.group_weighting == "prompt"):
            raise ValueError(
                f"unbiased=True with initial_generations={self.initial_generations}, group_weighting={self.group_weighting!r}: it "
                "is for sizes that depend on rewards, with prompts that weigh alike; set initial_generations below num_generations "
                "and group_weighting='prompt', or leave_one_out=True instead"
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
        prior: predicts success rates from prompt texts and learns from the rewards; None is the method's own. Checkpoints hold
            what it learnt, and what the method "calibrated" did.
        args: a V05Config. All other arguments are GRPOTrainer's.

    Raises:
        ValueError: `args` is no V05Config; adaptive sizes with an environment or a rollout function, which sample by themselves.
    """

    def __init__(self, *args: Any, prior: ValuePrior | None = None, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if not isinstance(self.args, V05Config):
            raise ValueError(f"args: {type(self.args).__name__}; give V05Trainer a V05Config")
        if self.args.adaptive and (self.environment_factories is not None or self.rollout_func is not None):
            raise ValueError("initial_generations: environments and rollout functions sample by themselves; give None")
        method = find_method(self.args.method)
        self.prior = prior_of(Settings(method=method.name, prior=method.prior)) if prior is None else prior
        self.calibrator = Calibrator()  # read by methods that have a calibration
        self._batch: list[dict[str, Any]] = []  # the rows that are being sampled
        self._rates = np.zeros(0)  # of their prompts
        self._scored: torch.Tensor | None = None  # (N, functions), of rows that were scored while they were sampled
        self._rewards = torch.zeros(0, device="cpu")  # (N, functions), of all processes' rows
        self._padding: torch.Tensor | None = None  # (N,) rows that stand for completions that were not needed

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
        """What the method weighs the sampled rows of all processes by, or learns of them; None where it asks for neither, or TRL
        has no log-probabilities of them: it has from vLLM, and where a batch is used for several updates."""
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
        """(N, functions) of all processes' rows; remembered, since TRL hands on only what it made of them."""
        if self._scored is None or not self.model.training:
            self._rewards = super()._calculate_rewards(inputs, prompts, completions, completion_ids_list)
        else:
            self._rewards = self._scored
        return self._rewards

    def _generate(self, prompts: list[Any]) -> tuple[Any, ...]:
        """What TRL's method returns, with the completions sampled in rounds and padding rows in the places left over."""
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
        """Whether TRL will train on any token of completions; it may mask those that were cut off."""
        ends = [*self.eos_token_ids, self._tokenizer.pad_token_id]
        whole = [not self.mask_truncated_completions or tokens[-1] in ends for tokens in ids]
        return [ended and any(mask) for ended, mask in zip(whole, tool_mask, strict=True)]

    def _place_logged(self, logged: dict[str, list[Any]], chosen: list[int], count: int) -> None:
        """Move what reward functions logged of a round's rows into columns of all `count` rows, None where nothing was.

        TRL appends it as it comes, and its table wants a value for every row, in the order of rows.
        """
        for column, values in self._pending_extra_logs.items():
            if len(values) != len(chosen):
                raise ValueError(f"log_extra({column!r}, ...): {len(values)} values for {len(chosen)} completions; give each one")
            whole = logged.setdefault(column, [None] * count)
            for row, value in zip(chosen, values, strict=True):
                whole[row] = value
        self._pending_extra_logs.clear()

    def _generate_single_turn(
        self, prompt_ids: Any, images: Any, multimodal_fields: Any, num_generations: int, has_tool_images: bool = False
    ) -> tuple[Any, ...]:
        """vLLM is told how many rows in a row are alike; those of a round are not."""
        alike = 1 if self.model.training and self.args.adaptive else num_generations
        return tuple(super()._generate_single_turn(prompt_ids, images, multimodal_fields, alike, has_tool_images))

    def _without_padding(self, output: dict[str, Any], padding: torch.Tensor) -> dict[str, Any]:
        """The rows of `output` that were sampled, and as many padding rows as make it divide into micro-batches."""
        sampled = torch.nonzero(~padding).flatten()
        fill = torch.nonzero(padding).flatten()[: -len(sampled) % self.args.steps_per_generation]
        rows = torch.cat((sampled, fill))
        return {
            name: value[rows.to(value.device)] if isinstance(value, torch.Tensor) and value.ndim else value
            for name, value in output.items()
        }

    @property
    def estimator(self) -> Estimator:
        """By `args`, with this trainer's prior and calibration."""
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
        """(N,) weighted sums of (N, functions) rewards as GRPOTrainer takes them; NaN where no function gave one."""
        total = (rewards * self.reward_weights.to(rewards.device)).nansum(dim=1)
        return torch.where(rewards.isnan().all(dim=1), torch.nan, total)

    def _learners(self) -> dict[str, ValuePrior | Calibrator]:
        """What learns from the run and is kept in its checkpoints."""
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
