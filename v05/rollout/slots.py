"""Rollouts under way whose keys and values stay where they are: a slot each, in two tensors of a fixed size.

Column p of a slot holds the key and the value of the rollout's position p, in every layer. So a step writes one column a rollout,
whatever the others have read, and a rollout may join at any time. A step reads the last token of every rollout and draws the next
one. The host says nothing but how many slots and columns it goes over, and on a CUDA device these are of few sizes: a step of each
size is captured once as a CUDA graph and replayed, since the host takes longer to start its kernels than they take to run.

A graph keeps the addresses of what it reads. They are compared at every call, so that weights may be replaced as well as changed
in place, as an optimiser does.
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

LOOK_EVERY = 8  # tokens, on a CUDA device: the slot of a rollout that has ended stands idle for half as long on average
COLUMNS = 64  # of which a cache has a multiple
FEWEST_SLOTS = 16  # that a graph goes over: fewer take as long
# Rotary embeddings that depend on the longest sequence of a batch.
OF_THE_LONGEST = ("dynamic", "longrope")


def fits_slots(model: PreTrainedModel) -> bool:
    """Whether all that a sequence leaves behind are keys and values, every token attends to all of them by torch's own function,
    and a step by one token does the same whatever the data, as transformers says of the model."""
    layers = DynamicCache(config=model.config).layers
    return (
        bool(layers)
        and all(type(layer) is DynamicLayer for layer in layers)
        and model.config.get_text_config(decoder=True)._attn_implementation == "sdpa"
        and getattr(model, "_can_compile_fullgraph", False)
        and not any(getattr(module, "rope_type", None) in OF_THE_LONGEST for module in model.modules())
    )


class SlotBatch(Batch):
    """Keeps what is read in slots: for models that `fits_slots` is true of.

    The slots stay allocated, so that they have addresses: layers x (width of keys and of values) x rollouts x (longest prompt +
    length limit) numbers of the model's type.
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
        """Read the last token of every rollout and draw the next, from the first `columns` of the first `slots`.

        Nothing here waits for the device, or does another thing for other data: it is captured.
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
        """Of all that a step reads and writes."""
        tensors = (*self._model.parameters(), *self._model.buffers(), *self._cache.tensors(), *self._draws.tables())
        return tuple((tensor.data_ptr(), tensor.shape) for tensor in tensors)


class _SlotCache(Cache):
    """Keys and values as a model's layers ask for them: a step's are written to the first slots, at a position of each slot's own.

    Attributes:
        keys: (layers, slots, columns, heads, width); values: likewise, of a width of their own.
        columns: that there are.
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
        """Make room for so many, with the heads and widths of `read`; the first `used` slots stay as they are."""
        if slots <= self.keys.shape[1] and columns <= self.columns:
            return
        layers: Sequence[Any] = read.layers
        shape = (len(layers), slots, max(-(-columns // COLUMNS) * COLUMNS, self.columns))
        self.keys = _grown(self.keys, layers[0].keys, shape, used)
        self.values = _grown(self.values, layers[0].values, shape, used)

    def write(self, place: slice, read: Rows, row_of: torch.Tensor) -> None:
        """Put the rows `row_of` of `read`, which are aligned to the right, into the slots `place`."""
        width = read.mask.shape[1]
        first = width - read.mask.sum(-1)[row_of, None]
        columns = (first + torch.arange(width, device=first.device)).clamp(max=width - 1)  # the last again, where there are no more
        layers: Sequence[Any] = read.cache.layers
        for layer, keys, values in zip(layers, self.keys, self.values, strict=True):
            keys[place, :width] = layer.keys[row_of[:, None], :, columns]
            values[place, :width] = layer.values[row_of[:, None], :, columns]

    def move(self, source: torch.Tensor, target: torch.Tensor, columns: int) -> None:
        """Copy slots."""
        for table in self.tensors():
            table[:, target, :columns] = table[:, source, :columns]

    def go_to(self, positions: torch.Tensor, columns: int) -> None:
        """From now on layers write at these positions, one for each of the first slots, and read the first `columns`."""
        self._positions, self._width = positions, columns
        self._slots = torch.arange(len(positions), device=positions.device)

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, layer_idx: int, *_: Any, **__: Any) -> Any:
        """Write (slots, heads, 1, width) keys and values; all that a slot has, (slots, heads, columns, width)."""
        shown = []
        for table, states in ((self.keys[layer_idx], key_states), (self.values[layer_idx], value_states)):
            table[self._slots, self._positions] = states.squeeze(2)
            shown.append(table[: len(states), : self._width].transpose(1, 2))
        return tuple(shown)

    def get_seq_length(self, *_: Any, **__: Any) -> int:
        """Models ask; they are told positions and masks."""
        return 0


def _grown(table: torch.Tensor, like: torch.Tensor, shape: tuple[int, int, int], used: int) -> torch.Tensor:
    """Zeros of this shape, then heads and width of `like`; what the first `used` slots hold is copied."""
    # Memory that nobody has written could hold NaN, and what is masked counts 0 times: NaN then, and not 0.
    grown = like.new_zeros(*shape, like.shape[1], like.shape[3])
    if used:
        grown[:, :used, : table.shape[2]] = table[:, :used]
    return grown


def _power_of_two(count: int) -> int:
    """The least that is not below `count`."""
    return 1 << (count - 1).bit_length()


def _configs(model: PreTrainedModel) -> list[Any]:
    """The configurations that say by which function layers attend."""
    found = {id(c): c for module in model.modules() if (c := getattr(module, "config", None)) is not None}
    return [config for config in found.values() if getattr(config, "_attn_implementation", None) == "sdpa"]


@contextlib.contextmanager
def _grouped_attention(configs: Sequence[Any]) -> Iterator[None]:
    """Within, layers attend by `_attend`."""
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
    """One query a head: those of the heads that share a key head are read as the queries of one, so that no key is copied."""
    grouped = query.squeeze(2).unflatten(1, (key.shape[1], -1))
    read = scaled_dot_product_attention(grouped, key, value, attn_mask=attention_mask, scale=scaling)
    return read.flatten(1, 2)[:, None], None


ATTENTION = "v05_slots"
AttentionInterface.register(ATTENTION, _attend)


class Capturable(TorchDispatchMode):
    """Raises RuntimeError where what runs within could not be captured: where it waits for the device, to do as the data says, or
    copies from the host."""

    WAITING = ("_local_scalar_dense", "nonzero", "masked_select", "equal", "is_nonzero", "_unique2", "unique_dim")

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = func._schema.name.removeprefix("aten::")
        waits = name in self.WAITING
        if name in ("index", "index_put_"):  # of unknown size where an index is a mask
            waits = any(index is not None and index.dtype == torch.bool for index in args[1])
        elif name == "copy_":
            waits = args[0].device != args[1].device
        elif name == "_to_copy":
            waits = torch.device(kwargs.get("device") or args[0].device).type != args[0].device.type
        if waits:
            raise RuntimeError(f"{name} waits for the device, so that no CUDA graph can hold it")
        return func(*args, **kwargs)


class _Graphs:
    """Steps on a CUDA device, captured once a size.

    The first step of a size runs as it is, which loads kernels and fills torch's workspaces, and is watched, since torch may not
    recover from a capture that fails. The second is captured. Graphs share their memory: no step leaves anything in it for another.
    """

    def __init__(self, device: torch.device) -> None:
        self._stream = torch.cuda.Stream(device)
        self._addresses: Hashable = None
        self._graphs: dict[Hashable, torch.cuda.CUDAGraph | None] = {}
        self._pool: Any = None

    def run(self, size: Hashable, step: Callable[[], None], count: int, addresses: Hashable) -> None:
        """Run `step` so many times: whether it is captured is known by its `size`, and by the `addresses` of what it uses."""
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
                # Other threads may go on allocating.
                with torch.cuda.graph(graph, pool=self._pool, stream=self._stream, capture_error_mode="thread_local"):
                    step()
            graph.replay()
