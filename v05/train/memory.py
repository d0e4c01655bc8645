"""Estimate the memory that a run needs, before its first step, and find the setting that would lower it most.

Weights, masters, gradients and AdamW's two means are counted. Activations are measured by a trace: models with one and two layers
of the policy's architecture run forward and backward on fake tensors, which have shapes but no memory. Every further layer is
assumed to need as much as the second. The trace reads whole sequences, of tokens_per_backward tokens in all. It uses the CPU's
kernels, which keep the same tensors as a GPU's, except for the statistics of attention.
"""

from __future__ import annotations

import copy
import os
import weakref
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

from v05.ops.token_statistics.linear import CHUNK_BYTES
from v05.rollout.batch import ROWS
from v05.rollout.scoring import computed_again
from v05.rollout.slots import COLUMNS
from v05.train.config import RunConfig
from v05.train.lora import add_adapter
from v05.train.settings import validated

GIB = 1 << 30
WIDE = 4  # bytes of a float32
# Bytes per rollout and token of the vocabulary: logits, log-softmax, probabilities and a temporary of their size.
SAMPLED = 4 * WIDE


@dataclass(frozen=True)
class Memory:
    """Bytes that one process needs on its device.

    Attributes:
        weights: the policy's weights, including frozen ones and the unsharded copy of a sharded policy.
        reference: the weights of the reference policy of a KL term.
        masters: float32 copies of the trained weights.
        gradients: accumulated gradients.
        optimizer: AdamW's means.
        backward: most activations of a micro-batch, logits of a chunk, and gradients that are not accumulated yet.
        update: temporary memory of AdamW's step.
        slots: keys and values of the rollouts under way, which the embedded engine keeps between steps.
        sampling: temporary memory for drawing the next tokens, and for reading prompts.
        vllm: weights, keys and values of a vLLM engine in this process that stays awake.
        vllm_awake: weights, keys and values of one that sleeps while gradients are computed (engine.sleep).
    """

    weights: int
    reference: int
    masters: int
    gradients: int
    optimizer: int
    backward: int
    update: int
    slots: int
    sampling: int
    vllm: int
    vllm_awake: int

    @property
    def peak(self) -> int:
        """Largest memory in use at one time."""
        held = self.weights + self.reference + self.masters + self.optimizer + self.slots + self.vllm
        return held + max(self.gradients + max(self.backward, self.update), self.sampling + self.vllm_awake)


@dataclass(frozen=True)
class Trace:
    """Sizes of a model with a given number of layers.

    Attributes:
        parameters, trained: numbers of weights.
        kept: bytes held at the end of a forward pass.
        more: most bytes that the backward pass needs in addition, without the gradients of weights.
    """

    parameters: int
    trained: int
    kept: int
    more: int


def expected_memory(config: RunConfig, model: PretrainedConfig, prompt: int, ranks: int = 1, device: str = "cpu") -> Memory:
    """Memory that a run of `config` needs on each of `ranks` devices.

    Args:
        model: the transformers configuration of the policy.
        prompt: length of the longest prompt, in tokens.
        device: "cpu" or "cuda".
    """
    text = model.get_text_config(decoder=True)
    slots, sampling = _sampling(config, text, prompt) if config.engine.kind == "transformers" else (0, 0)
    width = prompt + config.policy.max_new_tokens
    of_update = -(-config.rollouts_per_step // (ranks * config.optimizer.updates_per_step))
    rows = max(min(config.optimizer.tokens_per_backward // width, of_update), 1)
    one, two = (trace(config, model, layers, rows, width) for layers in (1, 2))

    def deep(of_one: int, of_two: int) -> int:
        further: int = text.num_hidden_layers - 1
        return of_one + further * (of_two - of_one)

    parameters, trained = deep(one.parameters, two.parameters), deep(one.trained, two.trained)
    kept = deep(one.kept, two.kept)
    wide, is_whole = config.policy.dtype == "float32", config.policy.lora is None
    size = WIDE if wide else 2
    shards = ranks if config.distributed == "fsdp2" else 1
    output = text.vocab_size * text.hidden_size
    logits = min(CHUNK_BYTES[device], rows * width * text.vocab_size * WIDE)
    # On the CPU, the output layer is converted to float32. Its gradient is float32 on every device.
    layer = output * WIDE * ((device == "cpu" and not wide) + is_whole)
    # With tied weights, the gradients of both uses exist until they are added.
    gradients = is_whole * output * size * (2 if text.tie_word_embeddings else 1) + (0 if wide else trained * size)
    vllm = 0
    if config.engine.kind == "vllm":
        vllm = parameters * (WIDE if config.engine.dtype == "float32" else 2) + int(config.engine.kv_cache_gib * GIB)
    sleeps = config.engine.sleep is not None
    return Memory(
        weights=parameters * size + (parameters * WIDE // shards if shards > 1 else 0),
        reference=parameters * size if config.loss.kl_coefficient > 0 and is_whole else 0,
        masters=0 if wide or shards > 1 else trained * WIDE,
        # DDP holds a second copy in its buckets.
        gradients=trained * WIDE // shards + (trained * size if ranks > 1 and shards == 1 else 0),
        optimizer=2 * trained * WIDE // shards,
        backward=max(kept + max(two.more, logits + layer), gradients),
        update=trained * WIDE // shards if device == "cuda" else 2 * is_whole * output * WIDE,
        slots=slots,
        sampling=sampling,
        vllm=0 if sleeps else vllm,
        vllm_awake=vllm if sleeps else 0,
    )


def _sampling(config: RunConfig, text: PretrainedConfig, prompt: int) -> tuple[int, int]:
    """(bytes of the embedded engine's slots, temporary bytes of one sampling step)."""
    heads = getattr(text, "num_key_value_heads", None) or text.num_attention_heads
    head = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    size = WIDE if config.policy.dtype == "float32" else 2
    column: int = text.num_hidden_layers * 2 * heads * head * size
    width = -(-(prompt + config.policy.max_new_tokens) // COLUMNS) * COLUMNS
    drawn: int = text.vocab_size * (SAMPLED + (0 if size == WIDE else size))
    prompts = -(-config.sampling_batch // config.budget.initial)
    slots = -(-config.sampling_batch // ROWS) * ROWS
    return slots * column * width, config.sampling_batch * drawn + prompts * prompt * column


def trace(config: RunConfig, model: PretrainedConfig, layers: int, rows: int, width: int) -> Trace:
    """Run a policy with this many layers forward and backward over (rows, width) fake tokens, and measure it."""
    shallow = copy.deepcopy(model)
    text = shallow.get_text_config(decoder=True)
    text.num_hidden_layers = layers
    if getattr(text, "layer_types", None):
        text.layer_types = text.layer_types[:layers]
    with torch.device("meta"):
        policy: PreTrainedModel = AutoModelForCausalLM.from_config(shallow, dtype=getattr(torch, config.policy.dtype)).eval()
        if config.policy.lora is not None:
            add_adapter(policy, config.policy.lora, 0)
    sizes = [(parameter.numel(), parameter.requires_grad) for parameter in policy.parameters()]
    with FakeTensorMode():
        _fill_with_fakes(policy, policy.dtype)
        ids = torch.zeros(rows, width, dtype=torch.int64, device="cpu")
        live = _Live(policy)
        with live, computed_again(policy) if config.optimizer.gradient_checkpointing else nullcontext():
            hidden = policy.base_model(input_ids=ids, use_cache=False).last_hidden_state
        kept = live.bytes
        with live:
            hidden.backward(torch.ones_like(hidden))
    return Trace(sum(n for n, _ in sizes), sum(n for n, trained in sizes if trained), kept, max(live.most - kept, 0))


def _fill_with_fakes(model: torch.nn.Module, dtype: torch.dtype) -> None:
    """Replace a model's tensors by fake CPU tensors; parameters have this `dtype` and drop their gradients."""
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            fake = torch.nn.Parameter(torch.empty(parameter.shape, dtype=dtype, device="cpu"), parameter.requires_grad)
            if fake.requires_grad:
                fake.register_post_accumulate_grad_hook(_drop_gradient)
            setattr(module, name, fake)
        for name, buffer in module.named_buffers(recurse=False):
            setattr(module, name, torch.empty(buffer.shape, dtype=buffer.dtype, device="cpu"))


def _drop_gradient(parameter: torch.Tensor) -> None:
    parameter.grad = None


class _Live(TorchDispatchMode):
    """Counts the bytes of the tensors made inside the block that still exist, and the most at one time."""

    def __init__(self, model: torch.nn.Module) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.bytes = self.most = 0
        self._sizes = {tensor.untyped_storage()._cdata: 0 for tensor in (*model.parameters(), *model.buffers())}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(made):
            if isinstance(tensor, torch.Tensor):
                self._count(tensor.untyped_storage())
        return made

    def _count(self, storage: torch.UntypedStorage) -> None:
        if storage._cdata not in self._sizes:
            self._sizes[storage._cdata] = storage.nbytes()
            self.bytes += storage.nbytes()
            self.most = max(self.most, self.bytes)
            weakref.finalize(storage, self._forget, storage._cdata)

    def _forget(self, key: int) -> None:
        self.bytes -= self._sizes.pop(key)


def memory_there_is(device: str, ranks: int) -> int:
    """Total bytes of the GPU, or this rank's share of the machine's memory."""
    if device == "cuda":
        return torch.cuda.mem_get_info()[1]
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // int(os.environ.get("LOCAL_WORLD_SIZE", ranks))


def memory_report(config: RunConfig, model: PretrainedConfig, prompt: int, ranks: int, device: str) -> str:
    """One line with the expected memory and, if it exceeds the memory there is, the setting that would lower it most."""
    try:
        expected, there_is = expected_memory(config, model, prompt, ranks, device), memory_there_is(device, ranks)
    except Exception as error:  # some architectures cannot run on fake tensors; they are trained without an estimate
        return f"memory: cannot be estimated for model_type={model.model_type!r} ({error!r:.200})"
    parts = ", ".join(f"{f.name} {getattr(expected, f.name) / GIB:.2f}" for f in fields(expected) if getattr(expected, f.name))
    line = f"memory: about {expected.peak / GIB:.2f} GiB expected, of {there_is / GIB:.2f} ({parts})"
    if expected.peak <= there_is:
        return line
    peaks = {
        setting: expected_memory(validated(RunConfig, dict(config), [setting]), model, prompt, ranks, device).peak
        for setting in _savings(config, prompt, ranks, device)
    }
    best = min(peaks, key=lambda setting: peaks[setting])
    return f"{line}; --set {best} would lower it most, to {peaks[best] / GIB:.2f} GiB"


def _savings(config: RunConfig, prompt: int, ranks: int, device: str) -> Iterator[str]:
    """Settings, as for --set, that need less memory than those of `config`."""
    if not config.optimizer.gradient_checkpointing:
        yield "optimizer.gradient_checkpointing=true"
    if config.policy.lora is None:
        yield "policy.lora={}"
    if config.policy.dtype == "float32":
        yield "policy.dtype=bfloat16"
    if ranks > 1 and config.distributed == "ddp":
        yield "distributed=fsdp2"
    if config.engine.kind == "vllm" and config.engine.sleep is None and device == "cuda":
        yield "engine.sleep=2"
    yield f"optimizer.tokens_per_backward={prompt + config.policy.max_new_tokens}"
    yield f"sampling_batch={max(config.sampling_batch // 4, 1)}"
