"""LoRA (arXiv 2106.09685): peft puts terms of low rank beside the linear layers of a policy, which alone are trained.

peft changes these layers in place. The policy stays the transformers model that it was, for the engine and the loss alike.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from transformers import PreTrainedModel

from v05.train.config import LoraConfig

ADAPTER = "default"  # peft's name of the only one


def add_adapter(model: PreTrainedModel, config: LoraConfig, seed: int) -> None:
    """Put fresh terms, which change nothing yet, beside the layers of `model`, and freeze all else.

    Raises:
        ImportError: peft is not installed.
        ValueError: `config.target_modules` name no layer of this model.
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
    """Within, the policy is the one that training started from."""
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
    """The state of `model` under the names that it has without an adapter, whose terms are added to the weights in float32."""
    layers = _adapted(model)
    for name, value in model.state_dict().items():
        path, _, kind = name.partition(".base_layer.")
        if kind == "weight":
            value = (value.float() + layers[path].get_delta_weight(ADAPTER)).to(value.dtype)
        if ".lora_" not in name:
            yield name.replace(".base_layer.", "."), value


def _adapted(model: PreTrainedModel) -> dict[str, Any]:
    """The layers beside which peft has put terms, by name."""
    return {name: layer for name, layer in model.named_modules() if hasattr(layer, "base_layer")}
