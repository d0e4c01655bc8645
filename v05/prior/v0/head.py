"""The in-context head is a small transformer that corrects each row's base prediction from the context.

Rows attend only to context rows, so the order of the context does not matter and queries do not see each other. The output layer
is zero at initialisation, so an untrained head returns the base prediction. The weights that ship with the package were trained by
`python -m v05.prior.v0.pretrain`, on synthetic policies and on runs of small policies.
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
LARGEST_CONTEXT = 1024  # most context rows that the head accepts


class Head(Protocol):
    """An in-context classifier."""

    def infer(self, views: tuple[Tensor, Tensor], context: Context, past: Past, same: NDArray[np.int64]) -> Tensor:
        """(Q,) log-odds of success of the queries. The arguments are those of `in_context_task`."""
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
    """The head whose weights ship with the package."""

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
        """(N + Q,) float32 log-odds. Only the last Q, those of the queries, are predictions."""
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
    """Write the weights, with the settings they were trained with as metadata."""
    save_file(
        {name: value.contiguous() for name, value in head.state_dict().items()}, path, metadata={"made_by": json.dumps(made_by)}
    )


def load_head(path: Path = WEIGHTS) -> InContextHead:
    """Load the head from a weight file and freeze it.

    Raises:
        ValueError: the file is missing or damaged, or has tensors of other shapes.
    """
    head = InContextHead()
    try:
        head.load_state_dict(load_file(path))
    except (OSError, SafetensorError, RuntimeError) as error:
        raise ValueError(
            f"head={path} holds no weights of this head ({error}); reinstall v05, or train one: python -m v05.prior.v0.pretrain"
        ) from error
    if not all(value.isfinite().all() for value in head.state_dict().values()):
        raise ValueError(f"head={path} holds weights that are not finite; reinstall v05, or train a new one")
    return head.requires_grad_(False).eval()
