"""LoRA (arXiv 2106.09685): peft adds low-rank terms beside the linear layers of a policy, and only these terms are trained.

peft changes the layers in place. The policy remains a transformers model, so the engine and the loss use it as before.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from transformers import PreTrainedModel

from v05.train.config import LoraConfig

ADAPTER = "default"  # peft's name of the only adapter


def add_adapter(model: PreTrainedModel, config: LoraConfig, seed: int) -> None:
    """Add new low-rank terms, which start at zero, beside the layers of `model`, and freeze all other weights.

    Raises:
        ImportError: peft is not installed.
        ValueError: `config.target_modules` match no layer of this model.
    """
    try:
        import peft
    except ImportError as error:
        raise ImportError("policy.lora needs the package 'peft'; install it with: pip install 'v05[lora]'") from error
    targets = config.target_modules
    settings = peft.LoraConfig(
        r=config.rank,
        lora_alpha=config.alpha,
        target_modules="all-linear" if targets is None else list(targets),
        task_type="CAUSAL_LM",
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        try:
            peft.inject_adapter_in_model(settings, model, ADAPTER)
        except ValueError as error:
            raise ValueError(f"policy.lora.target_modules={targets}: {error}") from error


@contextmanager
def adapter_off(model: PreTrainedModel) -> Iterator[None]:
    """Switch the adapter off inside the block: the policy is then the one that training started from."""
    layers = _adapted(model).values()
    for layer in layers:
        layer.enable_adapters(False)
    try:
        yield
    finally:
        for layer in layers:
            layer.enable_adapters(True)


@torch.no_grad()
def merged_weights(model: PreTrainedModel) -> Iterator[tuple[str, torch.Tensor]]:
    """The state of `model` with the adapter merged into the weights (in float32), under the names of a model without an adapter."""
    layers = _adapted(model)
    for name, value in model.state_dict().items():
        path, _, kind = name.partition(".base_layer.")
        if kind == "weight":
            value = (value.float() + layers[path].get_delta_weight(ADAPTER)).to(value.dtype)
        if ".lora_" not in name:
            yield name.replace(".base_layer.", "."), value


def _adapted(model: PreTrainedModel) -> dict[str, Any]:
    """The layers that have an adapter, by name."""
    return {name: layer for name, layer in model.named_modules() if hasattr(layer, "base_layer")}
