"""The residual query adapter (arXiv 2602.03584): learnt queries that extract features from a prompt's token states.

There are K static queries, the same for every prompt. Each gets an offset that is generated from the prompt and is zero at
initialisation. Multi-head cross-attention over the token states, with padding masked, returns d numbers per query: K d = 1008
features.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save
from torch import Tensor, nn

from v05.prior.v0.backbone import BATCH, Backbone, FeatureCache

QUERIES, WIDTH, HEADS = 168, 6, 3


class Adapter(nn.Module):
    """(G, L, D) token states in, (G, 1008) features out.

    Args:
        states: D, the width of the backbone's token states.
        backbone: the key of the backbone that the adapter belongs to.
    """

    def __init__(self, states: int, backbone: str) -> None:
        super().__init__()
        self.backbone = backbone
        self.norm = nn.LayerNorm(states)
        self.queries = nn.Parameter(torch.randn(QUERIES, WIDTH))
        self.offset = nn.Linear(states, QUERIES * WIDTH)
        self.key, self.value = nn.Linear(states, WIDTH), nn.Linear(states, WIDTH)
        self.out = nn.Linear(WIDTH, WIDTH)
        nn.init.zeros_(self.offset.weight)
        nn.init.zeros_(self.offset.bias)

    def forward(self, states: Tensor, mask: Tensor) -> Tensor:
        """(G, 1008) features of (G, L, D) token states. `mask` (G, L) bool is True for tokens, at least one per prompt."""
        states = self.norm(states)
        kept = mask[..., None].to(states.dtype)
        mean = (states * kept).sum(1) / kept.sum(1)
        queries = self.queries + self.offset(mean).unflatten(-1, (QUERIES, WIDTH))
        query, key, value = (x.unflatten(-1, (HEADS, -1)).transpose(1, 2) for x in (queries, self.key(states), self.value(states)))
        read = nn.functional.scaled_dot_product_attention(query, key, value, attn_mask=mask[:, None, None])
        features: Tensor = self.out(read.transpose(1, 2).flatten(-2)).flatten(1)
        return features


class AdaptedBackbone:
    """A backbone whose features are concatenated with those of a frozen adapter."""

    def __init__(self, backbone: Backbone, adapter: Adapter) -> None:
        self._backbone, self._adapter = backbone, adapter
        self._cache = FeatureCache(None)

    def features(self, prompts: Sequence[str]) -> NDArray[np.float32]:
        """(G, D + 1008) features of G prompts."""
        missing = sorted({prompt for prompt in prompts if prompt not in self._cache}, key=len)
        for start in range(0, len(missing), BATCH):
            part = missing[start : start + BATCH]
            with torch.no_grad():
                read = self._adapter(*self._backbone.token_states(part))
            self._cache.add(part, joined(torch.from_numpy(self._backbone.features(part)), read).numpy())
        return self._cache.get(prompts)


def joined(pooled: Tensor, read: Tensor) -> Tensor:
    """(G, D + 1008) features: the pooled ones, which have unit length, and the adapter's, normalised to unit length."""
    return torch.cat((pooled, nn.functional.normalize(read, dim=-1)), -1)


def save_adapter(adapter: Adapter, path: Path) -> None:
    tensors = {name: value.contiguous() for name, value in adapter.state_dict().items()}
    path.write_bytes(save(tensors, metadata={"backbone": adapter.backbone}))


def load_adapter(path: Path, backbone: Backbone) -> Adapter:
    """Load an adapter from a file and freeze it.

    Raises:
        ValueError: the file is missing or damaged, or the adapter was trained on another backbone.
    """
    adapter = Adapter(backbone.width, backbone.key)
    try:
        with safe_open(path, framework="pt") as file:
            trained_on = (file.metadata() or {}).get("backbone")
        if trained_on != backbone.key:
            raise ValueError(
                f"adapter={path} was trained on backbone {trained_on}, not {backbone.key}; give the folder it was trained on"
            )
        adapter.load_state_dict(load_file(path))
    except (OSError, SafetensorError, RuntimeError) as error:
        raise ValueError(
            f"adapter={path} cannot be read ({error}); train one with v05 fit-prior LOGS.jsonl --adapter FILE"
        ) from error
    if not all(value.isfinite().all() for value in adapter.state_dict().values()):
        raise ValueError(f"adapter={path} holds weights that are not finite; train a new one")
    return adapter.requires_grad_(False).eval()
