"""Log-probabilities of completions that are there already, under a transformers model in this process; gradients pass through."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from transformers import PreTrainedModel

from v05.rollout import Completion
from v05.rollout.cache import keeps_only_columns
from v05.rollout.rows import read_prompts


def completion_logprobs(
    model: PreTrainedModel,
    prompts: Sequence[tuple[int, ...]],
    completions: Sequence[Completion],
    pad: int,
    width: int | None = None,
) -> torch.Tensor:
    """(N, width) log-probabilities of completion tokens under `model`; meaningless beyond a completion's end.

    `width` is the longest completion's length, or more where it is given.
    """
    width = width or max(len(c.tokens) for c in completions)
    tokens = torch.full((len(prompts), width), pad, device="cpu")
    for row, completion in enumerate(completions):
        tokens[row, : len(completion.tokens)] = torch.tensor(completion.tokens, device="cpu")
    tokens = tokens.to(model.device)
    logits = _logits_after_prompts if keeps_only_columns(model) else _logits_of_whole_sequences
    log_p = torch.log_softmax(logits(model, prompts, tokens, pad).float(), dim=-1)
    return log_p.gather(-1, tokens[..., None]).squeeze(-1)


def _logits_after_prompts(
    model: PreTrainedModel, prompts: Sequence[tuple[int, ...]], tokens: torch.Tensor, pad: int
) -> torch.Tensor:
    """(N, width, V) logits of (N, width) tokens; a prompt is read once for all its completions."""
    read = read_prompts(model, prompts, pad)
    width = tokens.shape[1]
    if width == 1:
        return read.logits[:, None]
    # Causal: what follows a completion's end is never seen by what counts.
    mask = torch.cat((read.mask, read.mask.new_ones(len(prompts), width - 1)), dim=1)
    rest = model(
        input_ids=tokens[:, :-1],
        attention_mask=mask,
        position_ids=(mask.cumsum(-1) - 1)[:, 1 - width :],
        past_key_values=read.cache,
        use_cache=True,
    ).logits
    return torch.cat((read.logits[:, None], rest), dim=1)


def _logits_of_whole_sequences(
    model: PreTrainedModel, prompts: Sequence[tuple[int, ...]], tokens: torch.Tensor, pad: int
) -> torch.Tensor:
    """(N, width, V) logits of (N, width) tokens from one pass without a cache, padded on the right, where no state sees it."""
    width = tokens.shape[1]
    lengths = torch.tensor([len(prompt) for prompt in prompts], device=tokens.device)
    shortest, longest = min(map(len, prompts)), max(map(len, prompts))
    ids = tokens.new_full((len(prompts), longest + width - 1), pad)
    for row, prompt in enumerate(prompts):
        ids[row, : len(prompt)] = torch.tensor(prompt, device="cpu")
        ids[row, len(prompt) : len(prompt) + width - 1] = tokens[row, :-1]
    # The first kept logits are those after the shortest prompt.
    logits: torch.Tensor = model(input_ids=ids, use_cache=False, logits_to_keep=ids.shape[1] - shortest + 1).logits
    at = (lengths - shortest)[:, None] + torch.arange(width, device=tokens.device)
    return logits.gather(1, at[..., None].expand(-1, -1, logits.shape[-1]))
