"""A batch of sequences that a model has read, with its cache: sequences can be extended by a token each, removed and added."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from transformers import DynamicCache, PreTrainedModel

from v05.rollout.cache import add_columns, append_rows, cache_argument, has_columns, keeps_only_columns, new_cache, select_rows


@dataclass
class Rows:
    """N sequences. The rows of the mask and of the attention cache are L wide and aligned to the right.

    Attributes:
        logits: (N, V), for the next token.
        mask: (N, L) int64, 1 where the cache holds a token of the row, else 0.
        cache: the model's cache of the N sequences.
    """

    logits: torch.Tensor
    mask: torch.Tensor
    cache: DynamicCache

    def __len__(self) -> int:
        return len(self.mask)

    def advance(self, model: PreTrainedModel, tokens: torch.Tensor) -> None:
        """Read (N, 1) tokens, the next token of every row."""
        self.mask = torch.cat((self.mask, self.mask.new_ones(len(self), 1)), dim=1)
        self.logits = model(
            input_ids=tokens,
            attention_mask=self.mask if has_columns(self.cache) else None,
            position_ids=self.mask.sum(-1, keepdim=True) - 1,
            use_cache=True,
            **{cache_argument(model): self.cache},
        ).logits[:, -1]

    def select(self, rows: torch.Tensor) -> None:
        """Keep these rows in this order, and only the columns that any of them uses. A row may be repeated."""
        select_rows(self.cache, rows)
        self.logits, self.mask = self.logits[rows], self.mask[rows]
        self._widen(int(self.mask.sum(-1).max()))

    def append(self, other: Rows) -> None:
        """Append the rows of `other`, which may be widened."""
        width = max(self.mask.shape[1], other.mask.shape[1])
        self._widen(width)
        other._widen(width)
        append_rows(self.cache, other.cache)
        self.logits, self.mask = torch.cat((self.logits, other.logits)), torch.cat((self.mask, other.mask))

    def _widen(self, width: int) -> None:
        """Make cache and mask `width` columns wide, by adding zeros or removing columns on the left."""
        more = width - self.mask.shape[1]
        if more:
            self.mask = torch.nn.functional.pad(self.mask, (more, 0))
            add_columns(self.cache, more)


def read_prompts(model: PreTrainedModel, prompts: Sequence[tuple[int, ...]], pad: int) -> Rows:
    """The rows of N prompts. Each distinct prompt is read only once.

    All are read in one pass, or, for models with a state that must not see padding, in one pass per length. For models that keep
    only columns, gradients pass through, so that training also reads a prompt once for all its rollouts.
    """
    distinct = list(dict.fromkeys(prompts))
    if keeps_only_columns(model):
        passes = [distinct]
    else:
        passes = [list(alike) for _, alike in itertools.groupby(sorted(distinct, key=len), key=len)]
    rows, *others = (read_distinct(model, alike, pad) for alike in passes)
    for other in others:
        rows.append(other)
    row_of = {prompt: row for row, prompt in enumerate(itertools.chain(*passes))}
    rows.select(torch.tensor([row_of[prompt] for prompt in prompts], device=model.device))
    return rows


def read_distinct(model: PreTrainedModel, prompts: Sequence[tuple[int, ...]], pad: int) -> Rows:
    """The rows of distinct prompts, read in one pass. The model must mask padding, unless all prompts have the same length."""
    longest = max(map(len, prompts))
    ids = torch.full((len(prompts), longest), pad, device="cpu")
    mask = torch.zeros(len(prompts), longest, dtype=torch.int64, device="cpu")
    for row, prompt in enumerate(prompts):
        ids[row, longest - len(prompt) :] = torch.tensor(prompt, device="cpu")
        mask[row, longest - len(prompt) :] = 1
    ids, mask = ids.to(model.device), mask.to(model.device)
    cache = new_cache(model)
    logits = model(
        input_ids=ids,
        attention_mask=mask,
        position_ids=(mask.cumsum(-1) - 1).clamp(min=0),
        use_cache=True,
        logits_to_keep=1,
        **{cache_argument(model): cache},
    ).logits[:, -1]
    return Rows(logits, mask, cache)
