"""The true prior, for comparison: the probability that the policy samples the reference answer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import PreTrainedModel

from v05.rollout import Completion
from v05.rollout.limits import stop_tokens
from v05.rollout.scoring import completion_logprobs

BLOCK = 512  # answers per forward pass


@torch.no_grad()
def answer_probability(
    model: PreTrainedModel,
    tokenizer: Any,
    prompts: Sequence[tuple[int, ...]],
    answers: Sequence[str],
    max_new_tokens: int,
) -> NDArray[np.float64]:
    """(P,) probability that the policy samples the reference answer: the true success rate if no other answer is right.

    Args:
        prompts: token ids of P prompts.
        answers: their reference answers.
        max_new_tokens: longest completion; a longer answer has probability 0.
    """
    stops = stop_tokens(tokenizer, model.generation_config)
    parts = [np.zeros(0)]
    for start in range(0, len(prompts), BLOCK):
        block = prompts[start : start + BLOCK]
        tokens = [tokenizer(answer, add_special_tokens=False)["input_ids"] for answer in answers[start : start + BLOCK]]
        chances = [_chances(model, tokenizer.pad_token_id, block, [(*t, stop) for t in tokens], max_new_tokens) for stop in stops]
        parts.append(np.sum(chances, axis=0))
    return np.concatenate(parts)


def _chances(
    model: PreTrainedModel,
    pad: int,
    prompts: Sequence[tuple[int, ...]],
    answers: Sequence[tuple[int, ...]],
    max_new_tokens: int,
) -> NDArray[np.float64]:
    """(P,) probability that the policy samples exactly these tokens; 0 for more than `max_new_tokens`."""
    completions = [Completion(np.array(tokens), np.zeros(len(tokens), dtype=np.float32), True) for tokens in answers]
    logprobs = completion_logprobs(model, prompts, completions, pad)
    lengths = torch.tensor([len(tokens) for tokens in answers], device=logprobs.device)
    within = torch.arange(logprobs.shape[1], device=logprobs.device) < lengths[:, None]
    chance = torch.where(within, logprobs, 0.0).sum(-1).exp()
    return torch.where(lengths <= max_new_tokens, chance, 0.0).double().cpu().numpy()
