"""Operations on the rows of a transformers model's cache: selecting, concatenating and widening. Rows are aligned to the right.

An attention layer keeps keys and values, with one column per token; padding is masked. The recurrent and convolutional layers of
hybrid models (Mamba, the gated delta rule, short convolutions) keep a state without columns, which must not see padding.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from typing import Any

import torch
from transformers import DynamicCache, PreTrainedModel, cache_utils
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

BY_COLUMN = ("keys", "values", "indexer_keys")  # attributes with one column per token, on the second-to-last axis


def keeps_only_columns(model: PreTrainedModel) -> bool:
    """Whether every layer is an attention layer.

    If not, padding is not masked everywhere, and a pass over several tokens may not be able to continue from a cache.
    """
    layers = DynamicCache(config=model.config).layers
    return all(type(layer) in (DynamicLayer, DynamicSlidingWindowLayer) for layer in layers)


def new_cache(model: PreTrainedModel) -> DynamicCache:
    """An empty cache. Layers with a sliding window keep all columns, so that rows of any length can be concatenated."""
    if keeps_only_columns(model):
        return DynamicCache()  # without a configuration, no layer has a window
    cache = DynamicCache(config=model.config)
    cache.layers = [_without_window(layer) for layer in cache.layers]
    return cache


def _without_window(layer: Any) -> Any:
    if not isinstance(layer, DynamicSlidingWindowLayer):
        return layer
    if hasattr(layer, "number_of_states"):  # a layer with both attention and a recurrent state
        return cache_utils.DYNAMIC_LAYER_TYPE_MAPPING["hybrid"](number_of_states=layer.number_of_states)
    return DynamicLayer()


def cache_argument(model: PreTrainedModel) -> str:
    """The name of the model's argument for its cache; Mamba's differs from most."""
    return "cache_params" if "cache_params" in inspect.signature(model.forward).parameters else "past_key_values"


def has_columns(cache: DynamicCache) -> bool:
    """Whether any layer has columns. If none has, there is nothing to mask."""
    return any(name in BY_COLUMN for name, _, _ in _states(cache))


def select_rows(cache: DynamicCache, rows: torch.Tensor) -> None:
    """Keep these rows in this order; a row may be repeated."""
    for _, states, key in _states(cache):
        states[key] = states[key][rows]


def append_rows(cache: DynamicCache, other: DynamicCache) -> None:
    """Append the rows of `other`, which must have the same number of columns."""
    for (_, mine, key), (_, theirs, _) in zip(_states(cache), _states(other), strict=True):
        mine[key] = torch.cat((mine[key], theirs[key]))


def add_columns(cache: DynamicCache, count: int) -> None:
    """Add `count` columns of zeros on the left; a negative `count` removes columns there."""
    for name, states, key in _states(cache):
        if name in BY_COLUMN:
            states[key] = torch.nn.functional.pad(states[key], (0, 0, count, 0))


def _states(cache: DynamicCache) -> Iterator[tuple[str, dict[Any, Any], Any]]:
    """Every tensor of the cache with one row per sequence: (attribute's name, dictionary that holds the tensor, key in it)."""
    for layer in cache.layers:
        for name, value in vars(layer).items():
            if isinstance(value, torch.Tensor) and value.ndim > 1:
                yield name, vars(layer), name
            elif isinstance(value, dict):  # recurrent layers number their states
                yield from ((name, value, key) for key, state in value.items() if isinstance(state, torch.Tensor))
