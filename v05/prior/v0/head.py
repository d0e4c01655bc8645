"""The in-context head: a small transformer that corrects the base prediction of every row by what it sees in the context.

Rows attend to the context rows and to nothing else, so a context may come in any order and queries do not see each other. The
output layer starts at zero: an untrained head predicts what the regressions predict. `python -m v05.prior.v0.pretrain` trained the
weights that ship with the package, on synthetic policies and on runs of small ones.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from v05.prior.v0.context import Context, Past
from v05.prior.v0.features import COLUMNS, Task, in_context_task

WEIGHTS = Path(__file__).with_name("head.safetensors")
WIDTH, LAYERS, HEADS = 48, 2, 4
LARGEST_CONTEXT = 1024  # rows that the head is made for


class Head(Protocol):
    """An in-context classifier."""

    def infer(self, views: tuple[Tensor, Tensor], context: Context, past: Past, same: NDArray[np.int64]) -> Tensor:
        """(Q,) log-odds of success of the queries; the arguments are those of `in_context_task`."""
        ...


class _Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.query_norm, self.feed_norm = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.query, self.key_value = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, 2 * WIDTH)
        self.out = nn.Linear(WIDTH, WIDTH)
        self.feed = nn.Sequential(nn.Linear(WIDTH, 2 * WIDTH), nn.GELU(), nn.Linear(2 * WIDTH, WIDTH))

    def forward(self, rows: Tensor, count: int) -> Tensor:
        normed = self.query_norm(rows)
        key, value = self.key_value(normed[:count]).chunk(2, -1)
        query, key, value = (x.unflatten(-1, (HEADS, -1)).transpose(0, 1) for x in (self.query(normed), key, value))
        seen = nn.functional.scaled_dot_product_attention(query, key, value)
        rows = rows + self.out(seen.transpose(0, 1).flatten(-2))
        rows = rows + self.feed(self.feed_norm(rows))
        return rows


class InContextHead(nn.Module):
    """The embedded head."""

    def __init__(self) -> None:
        super().__init__()
        self.read = nn.Sequential(nn.Linear(COLUMNS, WIDTH), nn.GELU(), nn.Linear(WIDTH, WIDTH))
        self.label = nn.Linear(2, WIDTH)
        self.blocks = nn.ModuleList(_Block() for _ in range(LAYERS))
        self.norm, self.out = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 1)
        nn.init.zeros_(self.out.weight)
        nn.init.zeros_(self.out.bias)

    def infer(self, views: tuple[Tensor, Tensor], context: Context, past: Past, same: NDArray[np.int64]) -> Tensor:
        logits: Tensor = self(in_context_task(views, context, past, same))[len(context) :]
        return logits

    def forward(self, task: Task) -> Tensor:
        """(N + Q,) float32 log-odds; only those of the Q queries are predictions."""
        count = len(task.labels)
        if not 1 <= count <= LARGEST_CONTEXT:
            raise ValueError(f"context has {count} rows; the head takes 1 to {LARGEST_CONTEXT}, give a larger or smaller one")
        rows = self.read(task.rows)
        rows = torch.cat((rows[:count] + self.label(task.labels), rows[count:]))
        for block in self.blocks:
            rows = block(rows, count)
        logits: Tensor = task.base + self.out(self.norm(rows)).squeeze(-1)
        return logits


def save_head(head: InContextHead, path: Path, made_by: dict[str, str]) -> None:
    """Write the weights, and beside them what made them."""
    save_file(
        {name: value.contiguous() for name, value in head.state_dict().items()}, path, metadata={"made_by": json.dumps(made_by)}
    )


def load_head(path: Path = WEIGHTS) -> InContextHead:
    """The head of a weight file, frozen.

    Raises:
        ValueError: no such file, damaged, or of another shape.
    """
    head = InContextHead()
    try:
        head.load_state_dict(load_file(path))
    except (OSError, SafetensorError, RuntimeError) as error:
        raise ValueError(
            f"head={path} holds no weights of this head ({error}); reinstall v05, or train one: python -m v05.prior.v0.pretrain"
        ) from error
    if not all(value.isfinite().all() for value in head.state_dict().values()):
        raise ValueError(f"head={path} holds weights that are no finite numbers; reinstall v05, or train one anew")
    return head.requires_grad_(False).eval()
