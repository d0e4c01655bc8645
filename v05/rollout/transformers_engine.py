"""The embedded engine: continuous batched sampling with a key-value cache from a transformers model in this process.

Finished rollouts leave the batch after every token and waiting ones join it every few, so none waits for the longest. A prompt is
read once for all its rollouts that join together. Random numbers are a function of the rollout's seed and the position in its
completion, so that what a rollout is batched with changes it only through rounding.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import DynamicCache, LogitsProcessorList, PreTrainedModel, TemperatureLogitsWarper, TopPLogitsWarper

from v05.rollout import Completion, Failure, Request, decode, refuse_update_in_flight

# A join costs about what a token does, however few join: prompts are read and caches copied. So there is one every so many tokens
# at most, unless nothing is under way: short completions are then sampled batch by batch, and long ones wait little.
JOIN_EVERY = 16


class TransformersEngine:
    """Samples from `model`, whose weights it reads at every call: a trainer of the same model has nothing to copy.

    Args:
        model: a causal language model.
        tokenizer: its tokenizer, with a pad and an end-of-sequence token.
        max_new_tokens: length limit of a completion, its end-of-sequence token included.
        capacity: rollouts sampled at once.
        temperature: divides the logits; 0 takes the likeliest token.
        top_p: share of the probability that is sampled from, the likeliest tokens first.
    """

    reproducible = True

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: Any,
        *,
        max_new_tokens: int,
        capacity: int = 512,
        temperature: float = 1.0,
        top_p: float = 1.0,
    ) -> None:
        self.capacity = capacity
        self._model = model
        self._tokenizer = tokenizer
        self._max_new_tokens = max_new_tokens
        self._greedy = temperature == 0
        self._warp = LogitsProcessorList()
        if temperature not in (0, 1):
            self._warp.append(TemperatureLogitsWarper(temperature))
        if top_p < 1:
            self._warp.append(TopPLogitsWarper(top_p))
        self._waiting: deque[tuple[int, Request]] = deque()
        self._rows: _Rows | None = None
        self._since_join = 0  # tokens

    def decode(self, completion: Completion) -> str:
        return decode(self._tokenizer, completion)

    def submit(self, keys: Sequence[int], requests: Sequence[Request]) -> None:
        self._waiting.extend(zip(keys, requests, strict=True))

    @torch.no_grad()
    def poll(self, timeout: float | None = None) -> list[tuple[int, Completion | Failure]]:
        was_training = self._model.training
        if was_training:
            self._model.eval()
        finished: list[tuple[int, Completion | Failure]] = []
        while not finished and (self._waiting or self._rows):
            if self._rows:
                self._rows.advance(self._model)
            self._join()
            finished += self._sample()
        if was_training:
            self._model.train()
        return finished

    @torch.no_grad()
    def update_weights(self, state: Iterable[tuple[str, torch.Tensor]]) -> None:
        refuse_update_in_flight(bool(self._rows or self._waiting))
        mine = self._model.state_dict()
        for name, tensor in state:
            if name not in mine or mine[name].shape != tensor.shape:
                raise ValueError(
                    f"update_weights: {name} of shape {tuple(tensor.shape)} does not fit the engine's model; give its own"
                )
            mine[name].copy_(tensor)

    def close(self) -> None:
        pass

    def _join(self) -> None:
        """Let waiting rollouts join the batch, if it is time."""
        self._since_join += 1
        joining = min(len(self._waiting), self.capacity - (len(self._rows) if self._rows else 0))
        if joining == 0 or (self._rows and self._since_join < JOIN_EVERY):
            return
        self._since_join = 0
        keys, requests = zip(*(self._waiting.popleft() for _ in range(joining)), strict=True)
        logits, cache, mask = read_prompts(self._model, [r.prompt for r in requests], self._tokenizer.pad_token_id)
        uniforms = _uniforms(np.array([r.seed for r in requests], dtype=np.uint64), self._max_new_tokens)
        rows = _Rows(
            keys=torch.tensor(keys, device=mask.device),
            uniforms=torch.from_numpy(uniforms).to(mask.device),
            tokens=torch.zeros(uniforms.shape, dtype=torch.int64, device=mask.device),
            logprobs=torch.zeros(uniforms.shape, device=mask.device),
            lengths=torch.zeros(joining, dtype=torch.int64, device=mask.device),
            logits=logits,
            mask=mask,
            cache=cache,
        )
        if self._rows:
            self._rows.append(rows)
        else:
            self._rows = rows

    def _sample(self) -> list[tuple[int, Completion | Failure]]:
        """Draw every rollout's next token; those that end leave the batch."""
        rows = self._rows
        assert rows is not None
        # transformers annotates its arguments as LongTensor and FloatTensor, which no torch function returns.
        logits: torch.Tensor = self._warp(rows.tokens, rows.logits.float())  # type: ignore[arg-type]
        if self._greedy:
            logits = torch.full_like(logits, -torch.inf).scatter_(1, logits.argmax(-1, keepdim=True), 0.0)
        log_p = torch.log_softmax(logits, dim=-1)
        at = rows.lengths[:, None]
        token = _inverse_cdf(log_p, rows.uniforms.gather(1, at).squeeze(1))[:, None]
        rows.tokens.scatter_(1, at, token)
        rows.logprobs.scatter_(1, at, log_p.gather(1, token))
        rows.lengths += 1
        ended = token.squeeze(1) == self._tokenizer.eos_token_id
        leaving = ended | (rows.lengths == self._max_new_tokens)
        if not leaving.any():
            return []
        columns = (rows.keys, rows.tokens, rows.logprobs, rows.lengths, ended)
        keys, tokens, logprobs, lengths, ends = (column[leaving].cpu().numpy() for column in columns)
        self._rows = None if leaving.all() else rows.keep(torch.nonzero(~leaving).squeeze(1))
        return [
            (int(keys[i]), Completion(tokens[i, :n].copy(), logprobs[i, :n].copy(), bool(ends[i]))) for i, n in enumerate(lengths)
        ]


@dataclass
class _Rows:
    """B rollouts under way, T the length limit. A row of the cache and mask, both L wide, is aligned to the right.

    Attributes:
        keys: (B,) int64.
        uniforms: (B, T) float64, what the tokens are drawn with.
        tokens, logprobs: (B, T); lengths (B,): how many of them are drawn.
        logits: (B, V) of the next token.
        mask: (B, L) int64, one where the cache holds a token of the row.
    """

    keys: torch.Tensor
    uniforms: torch.Tensor
    tokens: torch.Tensor
    logprobs: torch.Tensor
    lengths: torch.Tensor
    logits: torch.Tensor
    mask: torch.Tensor
    cache: DynamicCache

    def __len__(self) -> int:
        return len(self.keys)

    def advance(self, model: PreTrainedModel) -> None:
        """Read the last drawn token of every row."""
        self.mask = torch.cat((self.mask, self.mask.new_ones(len(self), 1)), dim=1)
        self.logits = model(
            input_ids=self.tokens.gather(1, self.lengths[:, None] - 1),
            attention_mask=self.mask,
            position_ids=self.mask.sum(-1, keepdim=True) - 1,
            past_key_values=self.cache,
            use_cache=True,
        ).logits[:, -1]

    def keep(self, rows: torch.Tensor) -> _Rows:
        """Only these rows, and only the columns that one of them uses."""
        self.cache.batch_select_indices(rows)
        kept = _Rows(**{f.name: getattr(self, f.name)[rows] for f in fields(self) if f.name != "cache"}, cache=self.cache)
        kept._widen(int(kept.mask.sum(-1).max()))
        return kept

    def append(self, other: _Rows) -> None:
        """Add the rows of `other` below."""
        width = max(self.mask.shape[1], other.mask.shape[1])
        self._widen(width)
        other._widen(width)
        for name in (f.name for f in fields(self) if f.name != "cache"):
            setattr(self, name, torch.cat((getattr(self, name), getattr(other, name))))
        for mine, theirs in zip(_layers(self.cache), _layers(other.cache), strict=True):
            mine.keys = torch.cat((mine.keys, theirs.keys))
            mine.values = torch.cat((mine.values, theirs.values))

    def _widen(self, width: int) -> None:
        """Make cache and mask `width` columns wide, on their left: fill up with zeros, or cut off."""
        more = width - self.mask.shape[1]
        if more == 0:
            return
        pad = torch.nn.functional.pad
        self.mask = pad(self.mask, (more, 0))
        for layer in _layers(self.cache):
            layer.keys = pad(layer.keys, (0, 0, more, 0))
            layer.values = pad(layer.values, (0, 0, more, 0))


def _layers(cache: DynamicCache) -> Sequence[Any]:
    """The layers' `keys` and `values`, (B, heads, L, head size), to read and replace."""
    return cache.layers


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
    cache = DynamicCache()  # without the configuration, layers with a sliding window keep all: rows of other lengths can join
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
    tokens = torch.full((len(prompts), width), pad)
    for row, completion in enumerate(completions):
        tokens[row, : len(completion.tokens)] = torch.tensor(completion.tokens)
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
