"""The embedded engine: batched sampling with a key-value cache from a transformers model in this process.

Each prompt is read once however many rollouts it gets; finished rollouts leave the batch. Random numbers are a function of the
rollout's seed and the position in its completion, so that what a rollout is batched with changes it only through rounding.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import DynamicCache, PreTrainedModel

from v05.rollout import Completion, Request


class TransformersEngine:
    """Samples from `model`, whose weights it reads at every call: after an optimiser step there is nothing to copy.

    Args:
        model: a causal language model.
        tokenizer: its tokenizer, with a pad and an end-of-sequence token.
        max_new_tokens: length limit of a completion, its end-of-sequence token included.
        batch_size: rollouts sampled at once.
        temperature: of the sampling distribution; log-probabilities are those of the tempered distribution.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: Any,
        *,
        max_new_tokens: int,
        batch_size: int = 512,
        temperature: float = 1.0,
    ) -> None:
        self._model = model
        self._tokenizer = tokenizer
        self._max_new_tokens = max_new_tokens
        self._batch_size = batch_size
        self._temperature = temperature

    def decode(self, completion: Completion) -> str:
        return str(self._tokenizer.decode(completion.tokens, skip_special_tokens=True))

    @torch.no_grad()
    def generate(self, requests: Sequence[Request]) -> list[Completion]:
        was_training = self._model.training
        self._model.eval()
        completions = []
        for start in range(0, len(requests), self._batch_size):
            completions += self._generate_batch(requests[start : start + self._batch_size])
        self._model.train(was_training)
        return completions

    def _generate_batch(self, requests: Sequence[Request]) -> list[Completion]:
        limit = self._max_new_tokens
        device = self._model.device
        uniforms = torch.from_numpy(_uniforms(np.array([r.seed for r in requests], dtype=np.uint64), limit)).to(device)
        logits, cache, mask = read_prompts(self._model, [r.prompt for r in requests], self._tokenizer.pad_token_id)

        tokens = torch.zeros(len(requests), limit, dtype=torch.int64, device=device)
        logprobs = torch.zeros(len(requests), limit, device=device)
        lengths = torch.full((len(requests),), limit, device=device)
        alive = torch.arange(len(requests), device=device)
        ended = torch.zeros(len(requests), dtype=torch.bool, device=device)
        for t in range(limit):
            log_p = torch.log_softmax(logits.float() / self._temperature, dim=-1)
            token = _inverse_cdf(log_p, uniforms[alive, t])
            tokens[alive, t] = token
            logprobs[alive, t] = log_p.gather(-1, token[:, None]).squeeze(-1)
            going = token != self._tokenizer.eos_token_id
            lengths[alive[~going]] = t + 1
            ended[alive[~going]] = True
            if t + 1 == limit or not going.any():
                break
            if not going.all():
                keep = torch.nonzero(going).squeeze(-1)
                cache.batch_select_indices(keep)
                alive, token, mask = alive[keep], token[keep], mask[keep]
            mask = torch.cat((mask, mask.new_ones(len(alive), 1)), dim=1)
            logits = self._model(
                input_ids=token[:, None],
                attention_mask=mask,
                position_ids=mask.sum(-1, keepdim=True) - 1,
                past_key_values=cache,
                use_cache=True,
            ).logits[:, -1]

        return [
            Completion(row[:n].copy(), row_logprobs[:n].copy(), bool(done))
            for row, row_logprobs, n, done in zip(
                tokens.cpu().numpy(), logprobs.cpu().numpy(), lengths.tolist(), ended.tolist(), strict=True
            )
        ]


def read_prompts(
    model: PreTrainedModel, prompts: Sequence[tuple[int, ...]], pad: int
) -> tuple[torch.Tensor, DynamicCache, torch.Tensor]:
    """Next-token logits (N, V), cache and attention mask (N, L) of N prompts after one pass over the distinct ones.

    Differentiable: in training, too, a prompt is read once for all its rollouts.
    """
    slots: dict[tuple[int, ...], int] = {}
    of_row = torch.tensor([slots.setdefault(prompt, len(slots)) for prompt in prompts], device=model.device)
    longest = max(map(len, slots))
    ids = torch.full((len(slots), longest), pad)
    mask = torch.zeros(len(slots), longest, dtype=torch.int64)
    for row, prompt in enumerate(slots):
        ids[row, longest - len(prompt) :] = torch.tensor(prompt)
        mask[row, longest - len(prompt) :] = 1
    ids, mask = ids.to(model.device), mask.to(model.device)
    cache = DynamicCache(config=model.config)
    logits = model(
        input_ids=ids,
        attention_mask=mask,
        position_ids=(mask.cumsum(-1) - 1).clamp(min=0),
        past_key_values=cache,
        use_cache=True,
        logits_to_keep=1,
    ).logits[:, -1]
    cache.batch_select_indices(of_row)
    return logits[of_row], cache, mask[of_row]


def completion_logprobs(
    model: PreTrainedModel, prompts: Sequence[tuple[int, ...]], completions: Sequence[Completion], pad: int, width: int
) -> torch.Tensor:
    """(N, width) log-probabilities of completion tokens under `model`; meaningless beyond a completion's end.

    `width` is the longest completion's length or more.
    """
    tokens = torch.full((len(prompts), width), pad)
    for row, completion in enumerate(completions):
        tokens[row, : len(completion.tokens)] = torch.from_numpy(completion.tokens)
    tokens = tokens.to(model.device)
    first, cache, mask = read_prompts(model, prompts, pad)
    logits = first[:, None]
    if width > 1:  # causal: what follows a completion's end is never seen by what counts
        mask = torch.cat((mask, mask.new_ones(len(prompts), width - 1)), dim=1)
        rest = model(
            input_ids=tokens[:, :-1],
            attention_mask=mask,
            position_ids=(mask.cumsum(-1) - 1)[:, 1 - width :],
            past_key_values=cache,
            use_cache=True,
        ).logits
        logits = torch.cat((logits, rest), dim=1)
    return torch.log_softmax(logits.float(), dim=-1).gather(-1, tokens[..., None]).squeeze(-1)


def _inverse_cdf(log_p: torch.Tensor, uniform: torch.Tensor) -> torch.Tensor:
    """The token whose slice of the unit interval holds `uniform`: (B, V), (B,) -> (B,)."""
    cdf = log_p.double().exp().cumsum(-1)
    # Scaled by the last entry, so that rounding never leaves the interval's end uncovered.
    return torch.searchsorted(cdf, (uniform.double() * cdf[:, -1])[:, None], right=True).squeeze(-1)


def _uniforms(seeds: NDArray[np.uint64], count: int) -> NDArray[np.float64]:
    """(B, count) numbers in [0, 1), a function of seed and position alone."""
    with np.errstate(over="ignore"):
        positions = np.arange(1, count + 1, dtype=np.uint64) * _GOLDEN
        bits = _mix(_mix(seeds + _GOLDEN)[:, None] + positions[None, :])
    uniforms: NDArray[np.float64] = (bits >> np.uint64(11)).astype(np.float64) * 2.0**-53
    return uniforms


_GOLDEN = np.uint64(0x9E3779B97F4A7C15)


def _mix(state: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """splitmix64's finaliser (Steele, Lea & Flood 2014)."""
    state = (state ^ (state >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    state = (state ^ (state >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    mixed: NDArray[np.uint64] = state ^ (state >> np.uint64(31))
    return mixed
