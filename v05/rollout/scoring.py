"""Scoring: log-probabilities of given completions under a transformers model in this process, with gradients.

`v05.ops.token_statistics` applies the output layer to a few tokens at a time, so the (N, T, V) logits are never in memory at once.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from v05.ops import TokenStatistics, token_statistics
from v05.rollout import Completion
from v05.rollout.cache import keeps_only_columns
from v05.rollout.rows import read_prompts

PROBED_TOKENS = 4  # of the pass that checks the output layer


def completion_statistics(
    model: PreTrainedModel,
    prompts: Sequence[tuple[int, ...]],
    completions: Sequence[Completion],
    pad: int,
    width: int | None = None,
    checkpointing: bool = False,
) -> TokenStatistics:
    """Statistics of completion tokens under `model`, (N, width) each; 0 beyond the end of a completion.

    Args:
        prompts: N prompts as token ids.
        completions: N completions.
        pad: id of the padding token.
        width: width of the result; by default the longest completion's length, which is the least.
        checkpointing: recompute the layers' activations in the backward pass instead of keeping them. A prompt is then read once
            per completion rather than once.
    """
    width = width or max(len(c.tokens) for c in completions)
    tokens = torch.full((len(prompts), width), pad, device="cpu")
    counted = torch.zeros(len(prompts), width, dtype=torch.bool, device="cpu")
    for row, completion in enumerate(completions):
        tokens[row, : len(completion.tokens)] = torch.tensor(completion.tokens, device="cpu")
        counted[row, : len(completion.tokens)] = True
    place = counted.flatten().nonzero()[:, 0].to(model.device)  # computed on the CPU, because nonzero() on a GPU would wait for it
    tokens = tokens.to(model.device)
    # A recomputed layer must not find its own keys and values in a cache.
    read = _after_prompts if keeps_only_columns(model) and not checkpointing else _of_whole_sequences
    layer = output_layer(model)
    with computed_again(model) if checkpointing else nullcontext():
        given = read(model if layer is None else _Trunk(model), prompts, tokens, pad).flatten(0, 1)[place]
    made = token_statistics(
        given,
        tokens.flatten()[place],
        weight=None if layer is None else layer.weight,
        bias=None if layer is None else layer.bias,
    )

    def spread(statistic: torch.Tensor) -> torch.Tensor:
        return statistic.new_zeros(tokens.numel()).index_copy(0, place, statistic).view(tokens.shape)

    return TokenStatistics(spread(made.logprob), spread(made.entropy), spread(made.sum_pi_squared), made.nonfinite)


def completion_logprobs(
    model: PreTrainedModel,
    prompts: Sequence[tuple[int, ...]],
    completions: Sequence[Completion],
    pad: int,
    width: int | None = None,
    checkpointing: bool = False,
) -> torch.Tensor:
    """The log-probabilities of `completion_statistics`, (N, width) in nats; same arguments."""
    return completion_statistics(model, prompts, completions, pad, width, checkpointing).logprob


def checkpointed_layers(model: PreTrainedModel) -> list[GradientCheckpointingLayer]:
    """The layers whose activations can be recomputed. Raises ValueError if there are none."""
    layers = [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]
    if not layers:
        raise ValueError(
            f"optimizer.gradient_checkpointing=True: transformers cannot checkpoint layers of model_type="
            f"{model.config.model_type!r}; leave it out"
        )
    return layers


@contextmanager
def computed_again(model: PreTrainedModel) -> Iterator[None]:
    """Inside the block, layers keep only their inputs for the backward pass, and recompute the rest.

    transformers' own switch works only in training mode, where dropout would change the results.
    """
    layers = checkpointed_layers(model)
    for layer in layers:
        layer.forward = partial(checkpoint, layer.forward, use_reentrant=False, preserve_rng_state=False)
    try:
        yield
    finally:
        for layer in layers:
            del layer.forward


@dataclass(frozen=True)
class _Read:
    """The part of a model's output that is used here."""

    logits: torch.Tensor


class _Trunk:
    """A model without its output layer, called like the whole model. It returns the last hidden states in place of logits."""

    def __init__(self, model: PreTrainedModel) -> None:
        self.config, self.device, self.forward = model.config, model.device, model.base_model.forward
        self._read = model.base_model

    def __call__(self, logits_to_keep: int = 0, **inputs: Any) -> _Read:
        hidden = self._read(**inputs).last_hidden_state
        return _Read(hidden[:, -logits_to_keep:] if logits_to_keep else hidden)


_OUTPUT_LAYERS: WeakKeyDictionary[PreTrainedModel, torch.nn.Linear | None] = WeakKeyDictionary()


def output_layer(model: PreTrainedModel) -> torch.nn.Linear | None:
    """The layer that turns the trunk's hidden states into the model's logits.

    None if the model does more than that, such as scaling or a soft cap. A short pass checks this, and the answer is cached.
    """
    if model not in _OUTPUT_LAYERS:
        layer = model.get_output_embeddings()
        is_all = isinstance(layer, torch.nn.Linear) and model.base_model is not model and _makes_logits(model, layer)
        _OUTPUT_LAYERS[model] = layer if is_all else None
    return _OUTPUT_LAYERS[model]


@torch.no_grad()
def _makes_logits(model: PreTrainedModel, layer: torch.nn.Linear) -> bool:
    """Whether the layer gives the model's logits bit for bit. A tolerance would miss a soft cap, which hardly changes the small
    logits of an untrained model."""
    ids = torch.arange(PROBED_TOKENS, device=model.device)[None] % layer.out_features
    given: dict[str, Any] = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "use_cache": False}
    made = layer(_Trunk(model)(**given).logits.to(layer.weight.dtype))
    return torch.equal(made, model(**given).logits.to(made.dtype))


def _after_prompts(model: Any, prompts: Sequence[tuple[int, ...]], tokens: torch.Tensor, pad: int) -> torch.Tensor:
    """(N, width, ...) logits, or hidden states, that predict (N, width) tokens. A prompt is read once for all its completions."""
    read = read_prompts(model, prompts, pad)
    width = tokens.shape[1]
    if width == 1:
        return read.logits[:, None]
    # Attention is causal, so tokens that count never see the padding after a completion's end.
    mask = torch.cat((read.mask, read.mask.new_ones(len(prompts), width - 1)), dim=1)
    rest = model(
        input_ids=tokens[:, :-1],
        attention_mask=mask,
        position_ids=(mask.cumsum(-1) - 1)[:, 1 - width :],
        past_key_values=read.cache,
        use_cache=True,
    ).logits
    return torch.cat((read.logits[:, None], rest), dim=1)


def _of_whole_sequences(model: Any, prompts: Sequence[tuple[int, ...]], tokens: torch.Tensor, pad: int) -> torch.Tensor:
    """As `_after_prompts`, but in one pass without a cache. Padding is on the right, where it enters no state that counts."""
    width = tokens.shape[1]
    lengths = torch.tensor([len(prompt) for prompt in prompts], device=tokens.device)
    shortest, longest = min(map(len, prompts)), max(map(len, prompts))
    ids = tokens.new_full((len(prompts), longest + width - 1), pad)
    for row, prompt in enumerate(prompts):
        ids[row, : len(prompt)] = torch.tensor(prompt, device="cpu")
        ids[row, len(prompt) : len(prompt) + width - 1] = tokens[row, :-1]
    # The first logits that are kept follow the shortest prompt.
    logits: torch.Tensor = model(input_ids=ids, use_cache=False, logits_to_keep=ids.shape[1] - shortest + 1).logits
    at = (lengths - shortest)[:, None] + torch.arange(width, device=tokens.device)
    return logits.gather(1, at[..., None].expand(-1, -1, logits.shape[-1]))
