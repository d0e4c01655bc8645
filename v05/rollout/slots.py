"""A batch whose keys and values stay in place: each rollout has a slot in two tensors of a fixed size.

Column p of a slot holds the key and the value of the rollout's position p, for every layer. A step reads the last token of every
rollout, draws the next one, and writes one column per rollout. Rollouts may differ in length, and may join at any time.

The host decides only how many slots and columns a step covers. On a CUDA device these numbers are rounded to a few sizes, and a
step of each size is captured once as a CUDA graph and replayed, because the host takes longer to launch the kernels than they take
to run.

A graph contains the addresses of the tensors that it uses. They are compared at every call, so weights may be replaced as well as
changed in place (as an optimiser does).
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Hashable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
from torch.nn.functional import scaled_dot_product_attention
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AttentionInterface, DynamicCache, PreTrainedModel
from transformers.cache_utils import Cache, DynamicLayer

from v05.rollout.batch import Batch
from v05.rollout.rows import Rows, read_distinct

LOOK_EVERY = 8  # tokens between checks for finished rollouts on a CUDA device; a finished slot is idle for half as long on average
COLUMNS = 64  # the number of columns of a cache is a multiple of this
FEWEST_SLOTS = 16  # least slots of a graph; fewer would not be faster
# Types of rotary embeddings that depend on the longest sequence of a batch.
OF_THE_LONGEST = ("dynamic", "longrope")


def fits_slots(model: PreTrainedModel) -> bool:
    """Whether `SlotBatch` can sample from a model.

    Its cache must consist of keys and values only, every token must attend to all earlier ones with torch's own attention function,
    and transformers must declare that the model compiles as one graph, so that a step by one token does not depend on the data.
    """
    layers = DynamicCache(config=model.config).layers
    return (
        bool(layers)
        and all(type(layer) is DynamicLayer for layer in layers)
        and model.config.get_text_config(decoder=True)._attn_implementation == "sdpa"
        and getattr(model, "_can_compile_fullgraph", False)
        and not any(getattr(module, "rope_type", None) in OF_THE_LONGEST for module in model.modules())
    )


class SlotBatch(Batch):
    """Keeps keys and values in slots, for models that `fits_slots` accepts.

    The slots stay allocated, so that their addresses are fixed. They hold layers x (width of keys + width of values) x rollouts x
    (longest prompt + length limit) numbers of the model's dtype.
    """

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        device = self._stops.device
        self._cache = _SlotCache()
        self._configs = _configs(self._model)
        self._graphs = _Graphs(device) if device.type == "cuda" else None
        if self._graphs is not None:
            self.look_every = LOOK_EVERY

    def _read(self, prompts: Sequence[tuple[int, ...]]) -> torch.Tensor:
        place = slice(len(self) - len(prompts), len(self))
        distinct = {prompt: row for row, prompt in enumerate(dict.fromkeys(prompts))}
        read = read_distinct(self._model, list(distinct), self._pad)
        row_of = torch.tensor([distinct[prompt] for prompt in prompts], device=self._stops.device)
        columns = int(self._starts.max()) + 1 + self._ends.limit
        self._cache.reserve(read.cache, len(self._draws.done), columns, used=place.start)
        self._cache.write(place, read, row_of)
        return read.logits[row_of]

    def _go_on(self, count: int) -> None:
        slots, columns = len(self), int((self._starts + self._lengths).max()) + count
        if self._graphs is None:
            for _ in range(count):
                self._step(slots, columns)
            return
        slots = min(max(_power_of_two(slots), FEWEST_SLOTS), len(self._draws.done))
        columns = min(max(_power_of_two(columns), COLUMNS), self._cache.columns)
        self._graphs.run((slots, columns), partial(self._step, slots, columns), count, self._addresses())

    def _step(self, slots: int, columns: int) -> None:
        """Read the last token of every rollout and draw the next one, using the first `columns` columns of the first `slots` slots.

        This is captured as a CUDA graph, so it must not wait for the device, and must run the same kernels for all data.
        """
        positions = self._draws.starts[:slots, None] + self._draws.lengths[:slots, None]
        unseen = torch.arange(columns, device=positions.device) > positions
        mask = torch.zeros(slots, columns, dtype=self._cache.keys.dtype, device=positions.device).masked_fill_(unseen, -torch.inf)
        self._cache.go_to(positions.squeeze(1), columns)
        with _grouped_attention(self._configs):
            logits = self._model(
                input_ids=self._draws.last(slots),
                attention_mask=mask[:, None, None],
                position_ids=positions,
                past_key_values=self._cache,
                use_cache=True,
            ).logits
        self._draws.add(slice(slots), logits[:, -1], self._sampler, self._stops)

    def _move(self, source: torch.Tensor, target: torch.Tensor) -> None:
        if len(source):
            self._cache.move(source, target, int((self._starts + self._lengths).max()))

    def _addresses(self) -> Hashable:
        """Addresses and shapes of all tensors that a step reads or writes."""
        tensors = (*self._model.parameters(), *self._model.buffers(), *self._cache.tensors(), *self._draws.tables())
        return tuple((tensor.data_ptr(), tensor.shape) for tensor in tensors)


class _SlotCache(Cache):
    """The cache that a model's layers use in a step. They write to the first slots, at a separate position in each slot.

    Attributes:
        keys: (layers, slots, columns, heads, width of keys).
        values: (layers, slots, columns, heads, width of values).
        columns: number of columns.
    """

    def __init__(self) -> None:
        super().__init__(layers=[])
        self.keys = self.values = torch.zeros(0, 0, 0, 0, 0, device="cpu")

    @property
    def columns(self) -> int:
        return self.keys.shape[2]

    def tensors(self) -> tuple[torch.Tensor, ...]:
        return self.keys, self.values

    def reserve(self, read: DynamicCache, slots: int, columns: int, used: int) -> None:
        """Grow to at least `slots` slots and `columns` columns, with heads and widths of `read`. The first `used` slots keep their
        content."""
        if slots <= self.keys.shape[1] and columns <= self.columns:
            return
        layers: Sequence[Any] = read.layers
        shape = (len(layers), slots, max(-(-columns // COLUMNS) * COLUMNS, self.columns))
        self.keys = _grown(self.keys, layers[0].keys, shape, used)
        self.values = _grown(self.values, layers[0].values, shape, used)

    def write(self, place: slice, read: Rows, row_of: torch.Tensor) -> None:
        """Copy the rows `row_of` of `read`, which are aligned to the right, to the slots `place`."""
        width = read.mask.shape[1]
        first = width - read.mask.sum(-1)[row_of, None]
        # Beyond the end of a row, its last column is repeated.
        columns = (first + torch.arange(width, device=first.device)).clamp(max=width - 1)
        layers: Sequence[Any] = read.cache.layers
        for layer, keys, values in zip(layers, self.keys, self.values, strict=True):
            keys[place, :width] = layer.keys[row_of[:, None], :, columns]
            values[place, :width] = layer.values[row_of[:, None], :, columns]

    def move(self, source: torch.Tensor, target: torch.Tensor, columns: int) -> None:
        """Copy the first `columns` columns of the slots `source` to the slots `target`."""
        for table in self.tensors():
            table[:, target, :columns] = table[:, source, :columns]

    def go_to(self, positions: torch.Tensor, columns: int) -> None:
        """Let layers write at these positions, one for each of the first slots, and read the first `columns` columns."""
        self._positions, self._width = positions, columns
        self._slots = torch.arange(len(positions), device=positions.device)

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, layer_idx: int, *_: Any, **__: Any) -> Any:
        """Write (slots, heads, 1, width) keys and values. Returns those of all columns, (slots, heads, columns, width)."""
        shown = []
        for table, states in ((self.keys[layer_idx], key_states), (self.values[layer_idx], value_states)):
            table[self._slots, self._positions] = states.squeeze(2)
            shown.append(table[: len(states), : self._width].transpose(1, 2))
        return tuple(shown)

    def get_seq_length(self, *_: Any, **__: Any) -> int:
        """Return 0. Models call this, but do not need it, because positions and masks are passed to them."""
        return 0


def _grown(table: torch.Tensor, like: torch.Tensor, shape: tuple[int, int, int], used: int) -> torch.Tensor:
    """Zeros of `shape` followed by heads and width of `like`, with a copy of the first `used` slots of `table`."""
    # Uninitialised memory could hold NaN, and masked columns are multiplied by 0, which does not remove NaN.
    grown = like.new_zeros(*shape, like.shape[1], like.shape[3])
    if used:
        grown[:, :used, : table.shape[2]] = table[:, :used]
    return grown


def _power_of_two(count: int) -> int:
    """The least power of two that is not below `count`."""
    return 1 << (count - 1).bit_length()


def _configs(model: PreTrainedModel) -> list[Any]:
    """The configurations that select the layers' attention function."""
    found = {id(c): c for module in model.modules() if (c := getattr(module, "config", None)) is not None}
    return [config for config in found.values() if getattr(config, "_attn_implementation", None) == "sdpa"]


@contextlib.contextmanager
def _grouped_attention(configs: Sequence[Any]) -> Iterator[None]:
    """Inside the block, layers use `_attend` as their attention function."""
    for config in configs:
        config._attn_implementation = ATTENTION
    try:
        yield
    finally:
        for config in configs:
            config._attn_implementation = "sdpa"


def _attend(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor,
    scaling: float | None = None,
    **_: Any,
) -> tuple[torch.Tensor, None]:
    """Attention for one query per head. Heads that share a key head are treated as several queries of it, so keys need not be
    copied."""
    grouped = query.squeeze(2).unflatten(1, (key.shape[1], -1))
    read = scaled_dot_product_attention(grouped, key, value, attn_mask=attention_mask, scale=scaling)
    return read.flatten(1, 2)[:, None], None


ATTENTION = "v05_slots"
AttentionInterface.register(ATTENTION, _attend)


class Capturable(TorchDispatchMode):
    """Raises RuntimeError if code inside could not be captured as a CUDA graph.

    That is so if it waits for data from the device or copies data between the host and the device.
    """

    WAITING = ("_local_scalar_dense", "nonzero", "masked_select", "equal", "is_nonzero", "_unique2", "unique_dim")

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = func._schema.name.removeprefix("aten::")
        waits = name in self.WAITING
        if name in ("index", "index_put_"):  # the size of the result is unknown if an index is a mask
            waits = any(index is not None and index.dtype == torch.bool for index in args[1])
        elif name == "copy_":
            waits = args[0].device != args[1].device
        elif name == "_to_copy":
            waits = torch.device(kwargs.get("device") or args[0].device).type != args[0].device.type
        if waits:
            raise RuntimeError(f"{name} waits for the device, so no CUDA graph can capture it")
        return func(*args, **kwargs)


class _Graphs:
    """Runs steps on a CUDA device, each size captured as a CUDA graph.

    The first step of a size runs without capture. This loads kernels and fills torch's workspaces, and `Capturable` checks the
    step, because torch may not recover from a failed capture. The second step of a size is captured. All graphs share one memory
    pool, which is safe because no step leaves data there for another.
    """

    def __init__(self, device: torch.device) -> None:
        self._stream = torch.cuda.Stream(device)
        self._addresses: Hashable = None
        self._graphs: dict[Hashable, torch.cuda.CUDAGraph | None] = {}
        self._pool: Any = None

    def run(self, size: Hashable, step: Callable[[], None], count: int, addresses: Hashable) -> None:
        """Run `step` `count` times, with the graph of this `size`. All graphs are dropped if `addresses` have changed."""
        if addresses != self._addresses:
            self._addresses, self._graphs, self._pool = addresses, {}, torch.cuda.graph_pool_handle()
        for _ in range(count):
            if size not in self._graphs:
                self._stream.wait_stream(torch.cuda.current_stream())
                with torch.cuda.stream(self._stream), Capturable():  # type: ignore[no-untyped-call]
                    step()
                torch.cuda.current_stream().wait_stream(self._stream)
                self._graphs[size] = None
                continue
            graph = self._graphs[size]
            if graph is None:
                graph = self._graphs[size] = torch.cuda.CUDAGraph()
                # The mode "thread_local" allows other threads to allocate memory during the capture.
                with torch.cuda.graph(graph, pool=self._pool, stream=self._stream, capture_error_mode="thread_local"):
                    step()
            graph.replay()
