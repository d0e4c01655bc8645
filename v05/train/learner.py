"""The learner: the policy in training, its optimiser, and updates by the gradient of a step's loss, in micro-batches.

With several processes (v05.train.distributed), every rank holds the rollouts of the whole step and passes backward through its
share. Without a KL term, a rollout with advantage zero has no gradient, and is left out of the backward pass. This changes nothing.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from math import isfinite
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import PreTrainedModel

from v05.ops import LOSSES, Importance, loss_weights, policy_loss
from v05.rollout import Completion, NotFiniteError
from v05.rollout.scheduler import RolloutBatch
from v05.rollout.scoring import completion_logprobs
from v05.train.config import RunConfig
from v05.train.distributed import (
    Scorer,
    World,
    distribute,
    load_optimizer_state,
    load_parameters,
    whole,
    whole_optimizer_state,
    whole_parameters,
)
from v05.train.lora import adapter_off, add_adapter
from v05.train.masters import MasterWeights
from v05.train.micro_batches import micro_batches
from v05.train.policy import load_policy

Logprobs = Sequence[NDArray[np.float32]]


class Learner:
    """The policy in training, on every rank.

    Attributes:
        model, tokenizer: the policy, loaded from the folder that training starts from.
        sampled: the policy to sample from: `model` itself or, if that is sharded, an unsharded copy that `update` refreshes.
        masters: float32 copies of the trained parameters.
    """

    def __init__(self, config: RunConfig, folder: Path, world: World) -> None:
        self.config = config
        self.world = world
        self.model, self.tokenizer = self._load(folder)
        self.penalised = config.loss.kl_coefficient > 0
        self.reference = self._load(folder)[0] if self.penalised and config.policy.lora is None else None
        self.sharded = world.size > 1 and config.distributed == "fsdp2"
        self.sampled = self._load(folder)[0] if self.sharded else self.model
        scorer = Scorer(self.model, self.tokenizer.pad_token_id, config.optimizer.gradient_checkpointing)
        self.scorer = distribute(scorer, config.distributed, world)
        self.masters = MasterWeights(self.model)
        self.optimizer = torch.optim.AdamW(
            self.masters.parameters.values(),
            lr=config.optimizer.learning_rate,
            weight_decay=config.optimizer.weight_decay,
        )

    def _load(self, folder: Path) -> tuple[PreTrainedModel, Any]:
        """(policy that training starts from, with a new adapter if LoRA is set; tokenizer)."""
        settings = self.config.policy
        model, tokenizer = load_policy(folder, getattr(torch, settings.dtype))
        if settings.lora is not None:
            add_adapter(model, settings.lora, self.config.seed)
        return model, tokenizer

    @torch.no_grad()
    def rescore(self, batch: RolloutBatch) -> list[NDArray[np.float32]]:
        """The completions' log-probabilities under the learner's own policy, before the update. They are divided among ranks."""
        mine = np.arange(len(batch.completions))[self.world.block(len(batch.completions))]
        rescored: dict[int, NDArray[np.float32]] = {}
        for part in self._parts(batch, mine):
            prompts, completions = rollouts_of(batch, part)
            logprobs = completion_logprobs(self.sampled, prompts, completions, self.tokenizer.pad_token_id).cpu().numpy()
            rescored |= {i: row[: len(c.tokens)] for i, row, c in zip(part.tolist(), logprobs, completions, strict=True)}
        return [row for part in self.world.gather([rescored[i] for i in mine.tolist()]) for row in part]

    def update(self, batch: RolloutBatch, advantages: torch.Tensor, rescored: Logprobs | None = None) -> dict[str, float]:
        """Update the policy on the step's rollouts, once per part of its prompts. Every rank must call it.

        Args:
            batch: G groups, N rollouts.
            advantages: (N,); each is used for every token of its rollout.
            rescored: N rows of log-probabilities, the denominators of the probability ratios; None takes the engine's.

        Returns:
            `grad_norm` before clipping, `loss`, `clip_fraction` and `kl`: means over the updates; NaN if no part had a gradient.

        Raises:
            NotFiniteError: the gradient is not finite. That update is not made.
        """
        parts = [p for p in np.array_split(np.arange(len(batch.prompts)), self.config.optimizer.updates_per_step) if len(p)]
        figures = [self._update_on(batch, int(p[0]), int(p[-1]) + 1, advantages, rescored) for p in parts]
        records = [figure for figure in figures if figure is not None]
        means = np.mean(records, axis=0) if records else np.full(4, np.nan)
        self.refresh_sampled()
        return dict(zip(("grad_norm", "loss", "clip_fraction", "kl"), map(float, means), strict=True))

    def _update_on(
        self, batch: RolloutBatch, first: int, end: int, advantages: torch.Tensor, rescored: Logprobs | None
    ) -> tuple[float, float, float, float] | None:
        """One update on groups first .. end - 1. Returns (grad_norm, loss, clip_fraction, kl), or None if no rollout has a
        gradient."""
        settings, world = self.config.loss, self.world
        offsets = torch.from_numpy(batch.offsets[first : end + 1])
        lengths = torch.tensor([len(c.tokens) for c in batch.completions], dtype=torch.int64, device="cpu")
        teaches = ((advantages != 0) & (lengths > 0)) | self.penalised
        rows = torch.arange(int(offsets[0]), int(offsets[-1]), device="cpu")
        if not teaches[rows].any():
            return None
        aggregation = settings.aggregation or LOSSES[settings.kind].aggregation
        weights = torch.zeros(len(lengths), device="cpu")
        weights[rows] = loss_weights(
            lengths[rows],
            aggregation=aggregation,
            group_offsets=offsets - offsets[0] if settings.group_weighting == "prompt" else None,
            length=self.config.policy.max_new_tokens if aggregation == "constant" else None,
        )
        totals = torch.zeros(3, device="cpu")
        for part in self._parts(batch, rows[teaches[rows]].numpy(), world.size):
            share, width = torch.from_numpy(part[world.rank :: world.size]), int(lengths[part].max())
            counted = lengths[share]
            if not len(share):  # all ranks must pass backward equally often: this one takes a rollout with all tokens masked
                share, counted = torch.from_numpy(part[:1]), torch.zeros_like(lengths[:1])
            mask = torch.arange(width, device="cpu") < counted[:, None]
            totals += self._backward(batch, share, advantages[share], weights[share], mask, rescored)
        norm = torch.nn.utils.clip_grad_norm_(self.masters.parameters.values(), self.config.optimizer.max_grad_norm)
        grad_norm = float(whole(norm))
        if not isfinite(grad_norm):
            raise NotFiniteError(f"the policy is not finite: the gradient's norm is {grad_norm}")
        self.optimizer.step()
        self.optimizer.zero_grad()  # now, so that sampling has the memory of the gradients
        self.masters.round_to_model()
        loss, clipped, kl = world.sum(totals).tolist()
        return grad_norm, loss, clipped / int(lengths[rows].sum()), kl

    def _parts(self, batch: RolloutBatch, rows: NDArray[np.int64], ranks: int = 1) -> list[NDArray[np.int64]]:
        """The rollouts `rows`, divided into micro-batches."""
        prompts, completions = rollouts_of(batch, rows)
        parts = micro_batches(
            np.array([len(prompt) for prompt in prompts], dtype=np.int64),
            np.array([len(completion.tokens) for completion in completions], dtype=np.int64),
            self.config.optimizer.tokens_per_backward,
            ranks,
        )
        return [rows[part] for part in parts]

    def _backward(
        self,
        batch: RolloutBatch,
        rows: torch.Tensor,
        advantages: torch.Tensor,
        weights: torch.Tensor,
        mask: torch.Tensor,
        rescored: Logprobs | None,
    ) -> torch.Tensor:
        """Accumulate the gradients of n rollouts.

        Args:
            rows: (n,) numbers of the rollouts in the batch.
            advantages, weights: (n,), for every token of each rollout.
            mask: (n, width), True for the tokens that count.

        Returns:
            (3,) the rollouts' part of loss, number of clipped tokens, and KL.
        """
        device, width = self.model.device, mask.shape[1]
        settings = self.config.loss
        prompts, completions = rollouts_of(batch, rows.numpy())
        reference = self._reference_logprobs(prompts, completions, width) if self.penalised else None
        logprobs = self.scorer(prompts, completions, width)
        engine = padded([c.logprobs for c in completions], width).to(device)
        old = engine if rescored is None else padded([rescored[i] for i in rows.tolist()], width).to(device)
        cap = settings.importance_cap
        loss, figures = policy_loss(
            logprobs,
            old,
            advantages.to(device, torch.float32),
            mask=mask.to(device),
            weights=weights.to(device),
            loss=settings.kind,
            clip_low=settings.clip_low,
            clip_high=settings.clip_high,
            sampler_logprob=None if cap is None else engine,
            importance=None if cap is None else Importance(cap=cap, level=settings.importance_level),
            reference_logprob=reference,
            kl_coefficient=settings.kl_coefficient,
        )
        (loss * self.world.size).backward()  # DDP and FSDP2 average gradients over ranks, where the loss is a sum
        self.masters.take_gradients()
        clipped = (figures.clip_fraction * figures.tokens).nan_to_num()
        return torch.stack((loss.detach().double(), clipped, figures.kl)).float().cpu()

    @torch.no_grad()
    def _reference_logprobs(
        self, prompts: Sequence[tuple[int, ...]], completions: Sequence[Completion], width: int
    ) -> torch.Tensor:
        """(N, width) log-probabilities under the policy that training started from."""
        reference = self.sampled if self.reference is None else self.reference
        with adapter_off(reference):
            return completion_logprobs(reference, prompts, completions, self.tokenizer.pad_token_id, width)

    def refresh_sampled(self) -> None:
        """Copy the present weights to the unsharded copy of a sharded policy."""
        if self.sharded:
            load_parameters(dict(self.sampled.named_parameters()), whole_parameters(self.masters.parameters))

    def state_dict(self) -> dict[str, dict[str, torch.Tensor]]:
        """Unsharded tensors of "policy" (the trained parameters in float32) and "optimizer"; empty except on the rank that writes.

        Every rank must call it.
        """
        trained = self.masters.parameters
        return {
            "policy": self._kept(whole_parameters(trained)),
            "optimizer": self._kept(whole_optimizer_state(trained, self.optimizer)),
        }

    def load_state_dict(self, state: Mapping[str, Mapping[str, torch.Tensor]]) -> None:
        """Restore what `state_dict` of a learner with the same settings returned."""
        trained = self.masters.parameters
        load_parameters(trained, state["policy"].items())
        load_optimizer_state(trained, self.optimizer, state["optimizer"].items())
        self.masters.round_to_model()
        self.refresh_sampled()

    def _kept(self, values: Iterable[tuple[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
        """The values on the rank that writes. Other ranks iterate too, because gathering needs all, and drop the values."""
        return {name: value for name, value in values if self.world.writes}


def rollouts_of(batch: RolloutBatch, rows: NDArray[np.int64]) -> tuple[list[tuple[int, ...]], list[Completion]]:
    """Prompt tokens and completions of the rollouts `rows`."""
    group_of = np.repeat(np.arange(len(batch.prompts)), np.diff(batch.offsets))
    return [batch.prompt_tokens[g] for g in group_of[rows]], [batch.completions[i] for i in rows.tolist()]


def padded(rows: Logprobs, width: int) -> torch.Tensor:
    """The rows as (N, width) float32, with zeros beyond the end of each row."""
    matrix = torch.zeros(len(rows), width, device="cpu")
    for i, row in enumerate(rows):
        matrix[i, : len(row)] = torch.tensor(row, device="cpu")
    return matrix
