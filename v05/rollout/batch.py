"""Batches of rollouts under way: drawing their tokens, ending them, and replacing finished rollouts by waiting ones.

The model's cache of a batch is kept by `RowBatch`, for any architecture, in tensors that grow and shrink as rollouts join and
leave; or by `v05.rollout.slots.SlotBatch` in tensors of a fixed size.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, fields

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import PreTrainedModel

from v05.rollout import Completion, NotFiniteError, Request
from v05.rollout.rows import Rows, read_prompts
from v05.rollout.sampling import Sampler, uniforms

ROWS = 64  # the number of rows of the tables is a multiple of this


@dataclass(frozen=True)
class Ends:
    """When a completion ends: after one of the tokens `stops`, or after `limit` tokens."""

    stops: tuple[int, ...]
    limit: int


@dataclass
class Draws:
    """Tables on the device with one row per rollout. S is the number of rows, T the length limit.

    Attributes:
        done: (S,) bool, True for rollouts that have ended and for rows without a rollout. `add` does not change such rows.
        lengths: (S,) int64, number of tokens drawn.
        starts: (S,) int64, position of the prompt's last token.
        greedy: (S,) bool, whether to take the likeliest tokens.
        uniforms: (S, T + 1) float64, the random numbers that tokens are drawn with.
        tokens: (S, T + 1) int64. logprobs, sum_pi_squared: (S, T + 1) float32. In all of them, writes for rows at the length limit
            go to the last column, which is not used.
    """

    done: torch.Tensor
    lengths: torch.Tensor
    starts: torch.Tensor
    greedy: torch.Tensor
    uniforms: torch.Tensor
    tokens: torch.Tensor
    logprobs: torch.Tensor
    sum_pi_squared: torch.Tensor

    @classmethod
    def empty(cls, rows: int, limit: int, device: torch.device) -> Draws:
        return cls(
            done=torch.ones(rows, dtype=torch.bool, device=device),
            lengths=torch.ones(rows, dtype=torch.int64, device=device),  # 1, so that every row has a last token
            starts=torch.zeros(rows, dtype=torch.int64, device=device),
            greedy=torch.zeros(rows, dtype=torch.bool, device=device),
            uniforms=torch.zeros(rows, limit + 1, dtype=torch.float64, device=device),
            tokens=torch.zeros(rows, limit + 1, dtype=torch.int64, device=device),
            logprobs=torch.zeros(rows, limit + 1, device=device),
            sum_pi_squared=torch.zeros(rows, limit + 1, device=device),
        )

    def begin(self, rows: slice, requests: Sequence[Request], limit: int) -> None:
        """Start `requests` in these rows, with no token drawn yet."""
        device = self.done.device
        seeds = np.array([r.seed for r in requests], dtype=np.uint64)
        self.uniforms[rows, :limit] = torch.from_numpy(uniforms(seeds, limit)).to(device)
        self.greedy[rows] = torch.tensor([r.greedy for r in requests], device=device)
        self.starts[rows] = torch.tensor([len(r.prompt) - 1 for r in requests], device=device)
        self.lengths[rows] = 0
        self.done[rows] = False

    def last(self, count: int) -> torch.Tensor:
        """(count, 1) int64, the last token of each of the first `count` rows."""
        return self.tokens[:count].gather(1, self.lengths[:count, None] - 1)

    def add(self, rows: slice, logits: torch.Tensor, sampler: Sampler, stops: torch.Tensor) -> None:
        """Draw the next token of these rows from (N, V) logits. The host neither waits for the device nor reads from it."""
        limit = self.logprobs.shape[1] - 1
        done, lengths, at = self.done[rows], self.lengths[rows], self.lengths[rows, None]
        drawn = sampler.draw(logits, self.uniforms[rows].gather(1, at).squeeze(1), self.greedy[rows])
        token, logprob, sum_pi_squared = (column[:, None] for column in drawn)
        self.tokens[rows].scatter_(1, at, token)
        self.logprobs[rows].scatter_(1, at, logprob)
        self.sum_pi_squared[rows].scatter_(1, at, sum_pi_squared)
        lengths += ~done
        done |= (token == stops).any(1) | ~logprob.squeeze(1).isfinite() | (lengths == limit)

    def tables(self) -> list[torch.Tensor]:
        return [getattr(self, field.name) for field in fields(self)]

    def move(self, source: torch.Tensor, target: torch.Tensor) -> None:
        """Copy the rows `source` to the rows `target`."""
        for table in self.tables():
            table[target] = table[source]


class Batch(ABC):
    """N rollouts under way, which occupy the first N rows of the tables. The model must be in evaluation mode."""

    look_every = 1  # tokens drawn between checks for finished rollouts

    def __init__(self, model: PreTrainedModel, pad: int, ends: Ends, sampler: Sampler) -> None:
        self._model = model
        self._pad = pad
        self._ends = ends
        self._sampler = sampler
        self._stops = torch.tensor(ends.stops, dtype=torch.int64, device=model.device)
        self._draws = Draws.empty(0, ends.limit, model.device)
        # The host's copy for each rollout: its key, and `starts` and `lengths` of the tables.
        self._keys, self._starts, self._lengths = np.zeros((3, 0), dtype=np.int64)

    def __len__(self) -> int:
        return len(self._keys)

    def join(self, keys: Sequence[int], requests: Sequence[Request]) -> None:
        """Add rollouts to the batch: read their prompts and draw their first tokens."""
        joining = slice(len(self), len(self) + len(keys))
        self._keys = np.append(self._keys, np.array(keys, dtype=np.int64))
        self._starts = np.append(self._starts, np.array([len(r.prompt) - 1 for r in requests], dtype=np.int64))
        self._lengths = np.append(self._lengths, np.ones(len(keys), dtype=np.int64))
        if len(self) > len(self._draws.done):
            self._grow(-(-len(self) // ROWS) * ROWS)
        self._draws.begin(joining, requests, self._ends.limit)
        logits = self._read([request.prompt for request in requests])
        self._draws.add(joining, logits, self._sampler, self._stops)

    def step(self) -> list[tuple[int, Completion]]:
        """Draw the next token or tokens of every rollout. Returns the keys and completions of finished rollouts, and removes them.

        Raises NotFiniteError if the log-probability of a drawn token is not finite.
        """
        self._go_on(min(self.look_every, self._ends.limit - int(self._lengths.min())))
        count = len(self)
        seen = torch.stack((self._draws.lengths[:count], self._draws.done[:count].long())).cpu().numpy()
        self._lengths, done = seen[0], seen[1].astype(bool)
        if not done.any():
            return []
        finished = self._completions(np.flatnonzero(done))
        staying = count - len(finished)
        source, target = np.flatnonzero(~done[staying:]) + staying, np.flatnonzero(done[:staying])
        self._keep(staying, source, target)
        return finished

    def _completions(self, rows: NDArray[np.int64]) -> list[tuple[int, Completion]]:
        at, longest = torch.from_numpy(rows).to(self._stops.device), int(self._lengths[rows].max())
        tables = (self._draws.tokens, self._draws.logprobs, self._draws.sum_pi_squared)
        tokens, logprobs, squares = (table[at, :longest].cpu().numpy() for table in tables)
        finished = []
        for i, (key, n) in enumerate(zip(self._keys[rows], self._lengths[rows], strict=True)):
            if not np.isfinite(logprobs[i, n - 1]):
                raise NotFiniteError(
                    f"the policy is not finite: token {n} of a completion has no log-probability; its weights have diverged, are "
                    f"damaged, or overflow in {self._model.dtype}"
                )
            ended = int(tokens[i, n - 1]) in self._ends.stops
            finished.append(
                (int(key), Completion(tokens[i, :n].copy(), logprobs[i, :n].copy(), ended, squares[i, :n].astype(np.float64)))
            )
        return finished

    def _keep(self, staying: int, source: NDArray[np.int64], target: NDArray[np.int64]) -> None:
        """Copy the rows `source` to `target`, then keep only the first `staying` rows."""
        for column in (self._keys, self._starts, self._lengths):
            column[target] = column[source]
        self._keys, self._starts, self._lengths = self._keys[:staying], self._starts[:staying], self._lengths[:staying]
        at, to = (torch.from_numpy(rows).to(self._stops.device) for rows in (source, target))
        if len(source):
            self._draws.move(at, to)
        self._draws.done[staying:] = True
        self._move(at, to)

    def _grow(self, rows: int) -> None:
        grown = Draws.empty(rows, self._ends.limit, self._stops.device)
        for new, old in zip(grown.tables(), self._draws.tables(), strict=True):
            new[: len(old)] = old
        self._draws = grown

    @abstractmethod
    def _read(self, prompts: Sequence[tuple[int, ...]]) -> torch.Tensor:
        """Read the prompts of the last rows. Returns the (n, V) logits of the first token of each completion."""

    @abstractmethod
    def _go_on(self, count: int) -> None:
        """Read the last token of every rollout and draw the next one, `count` times."""

    @abstractmethod
    def _move(self, source: torch.Tensor, target: torch.Tensor) -> None:
        """Copy the cached rows `source` to `target`, and drop all but the first N rows."""


class RowBatch(Batch):
    """Keeps the model's cache in `Rows`. Works for every architecture whose state transformers keeps in a cache."""

    _rows: Rows | None = None

    def _read(self, prompts: Sequence[tuple[int, ...]]) -> torch.Tensor:
        read = read_prompts(self._model, prompts, self._pad)
        logits = read.logits
        if self._rows is None:
            self._rows = read
        else:
            self._rows.append(read)
        return logits

    def _go_on(self, count: int) -> None:
        assert self._rows is not None
        for _ in range(count):
            self._rows.advance(self._model, self._draws.last(len(self)))
            self._draws.add(slice(len(self)), self._rows.logits, self._sampler, self._stops)

    def _move(self, source: torch.Tensor, target: torch.Tensor) -> None:
        assert self._rows is not None
        order = torch.arange(len(self), device=source.device)
        order[target] = source
        if len(self):
            self._rows.select(order)
        else:
            self._rows = None
