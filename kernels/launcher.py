"""Launches without most of what Triton does on the host at every call: it looks at every argument, makes a key of what it finds and
finds the kernel by it, which takes several times as long as the launch itself."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import triton

# NVIDIA's assembler, left alone, spills a few values to fit 40 registers; given a bound above its need it does not.
# AMD's has no such option.
COMPILER_OPTIONS = {"cuda": {"num_warps": 4, "maxnreg": 128}, "hip": {"num_warps": 4}}
_OPTIONS = COMPILER_OPTIONS["hip" if torch.version.hip else "cuda"]
_MOST_INT32 = 2**31 - 1
_CURRENT = nullcontext()
_IS_KNOWN = hasattr(triton, "knobs")  # the way that 3.4 and later take to their launcher; older ones go it themselves


class Launcher:
    """A kernel, whose parameters are pointers (`p_...`), then numbers, then constants; bool is read and written as uint8.

    It is compiled once for all calls that would make one machine code of it: those with one device, one set of dtypes and
    constants, and numbers that are alike 1, multiples of 16 or neither. Triton also tells aligned addresses and 32-bit integers
    from others; calls in which not all are go Triton's own way.
    """

    def __init__(self, kernel: Any) -> None:
        self.kernel = kernel
        self.interpreted = not isinstance(kernel, triton.JITFunction)
        self._compiled: dict[tuple[Any, ...], tuple[Any, ...]] = {}
        numbers = [] if self.interpreted else [p for p in kernel.params if not (p.is_constexpr or p.name.startswith("p_"))]
        integers = [place for place, number in enumerate(numbers) if not number.annotation_type]
        self._specialised = [place for place in integers if not numbers[place].do_not_specialize]
        self._integers = integers

    def __call__(
        self,
        grid: tuple[int, int, int],
        device: torch.device,
        pointers: Sequence[torch.Tensor | None],
        numbers: Sequence[float],
        constants: Sequence[int],
    ) -> None:
        """On the stream of `device` that is current; `device` must be the current one, as `on` makes it. ValueError: CPU tensors
        without the interpreter.
        """
        addresses: list[int | None] = []
        key: list[Any] = [device.index, *constants]
        together = 0
        for tensor in pointers:
            if tensor is None:
                addresses.append(None)
                key.append(None)
            else:
                address = tensor.data_ptr()
                addresses.append(address)
                key.append(tensor.dtype)
                together |= address
        plain = together % 16 == 0 and _IS_KNOWN and not self.interpreted
        for place in self._integers:
            plain = plain and numbers[place] <= _MOST_INT32
        for place in self._specialised:
            key.append(1 if numbers[place] == 1 else -(numbers[place] % 16 == 0))
        if plain and (kept := self._compiled.get(known := tuple(key))) is not None:
            compiled, run, function, metadata = kept
            arguments = (*addresses, *numbers, *constants)
            stream = triton.runtime.driver.active.get_current_stream(device.index)
            enter, leave = triton.knobs.runtime.launch_enter_hook, triton.knobs.runtime.launch_exit_hook
            if _calls(enter) or _calls(leave):  # of a profiler
                told = compiled.launch_metadata(grid, stream, *arguments)
                run(*grid, stream, function, metadata, told, enter, leave, *arguments)
            else:
                run(*grid, stream, function, metadata, None, None, None, *arguments)
            return
        self.refuse_host(device)
        seen = [t.view(torch.uint8) if t is not None and t.dtype == torch.bool else t for t in pointers]
        compiled = self.kernel[grid](*seen, *numbers, *constants, **_OPTIONS)
        if plain:
            self._compiled[known] = (compiled, compiled.run, compiled.function, compiled.packed_metadata)

    def refuse_host(self, device: torch.device) -> None:
        if device.type == "cpu" and not self.interpreted:
            raise ValueError(
                "backend='triton': CPU tensors need Triton's interpreter; set TRITON_INTERPRET=1 before triton is first "
                "imported, or leave backend out to use the C++ core"
            )


def _calls(hook: Any) -> bool:
    """Whether a hook does anything: a chain of none does not."""
    return bool(getattr(hook, "calls", hook))


def on(device: torch.device) -> AbstractContextManager[Any]:
    """A context in which `device` is the current one; free of charge where it is that already, or no GPU."""
    if device.type != "cuda" or device.index == torch.cuda.current_device():
        return _CURRENT
    return torch.cuda.device(device)
