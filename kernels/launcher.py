"""Launches without most of what Triton does on the host at every call: it looks at every argument, makes a key of what it finds and
finds the kernel by it, which takes several times as long as the launch itself."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import triton

# NVIDIA's assembler, left alone, spills a few values to fit 40 registers; given a bound above its need it does not.
# AMD's has no such option.
COMPILER_OPTIONS = {"cuda": {"num_warps": 4, "maxnreg": 128}, "hip": {"num_warps": 4}}
_OPTIONS = COMPILER_OPTIONS["hip" if torch.version.hip else "cuda"]
_MOST_INT32 = 2**31 - 1
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
        self._integers = [(i, not number.do_not_specialize) for i, number in enumerate(numbers) if not number.annotation_type]
        self._keeps = _IS_KNOWN and not self.interpreted

    def __call__(
        self,
        grid: tuple[int, int, int],
        device: torch.device,
        pointers: Sequence[torch.Tensor | None],
        numbers: Sequence[float],
        constants: Sequence[int],
    ) -> None:
        """On the stream of `device` that is current. ValueError: CPU tensors without the interpreter."""
        index = device.index
        if index is not None and index != torch.cuda.current_device():
            with torch.cuda.device(index):
                return self(grid, device, pointers, numbers, constants)
        addresses: list[int | None] = []
        key: list[Any] = [index, *constants]
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
        plain = self._keeps and together % 16 == 0
        for place, is_specialised in self._integers:
            number = numbers[place]
            plain = plain and number <= _MOST_INT32
            if is_specialised:
                key.append(1 if number == 1 else -(number % 16 == 0))
        if plain and (kept := self._compiled.get(known := tuple(key))) is not None:
            compiled, run, function, metadata = kept
            stream = triton.runtime.driver.active.get_current_stream(index)
            enter, leave = triton.knobs.runtime.launch_enter_hook, triton.knobs.runtime.launch_exit_hook
            if _calls(enter) or _calls(leave):  # of a profiler
                told = compiled.launch_metadata(grid, stream, *addresses, *numbers, *constants)
                run(*grid, stream, function, metadata, told, enter, leave, *addresses, *numbers, *constants)
            else:
                run(*grid, stream, function, metadata, None, None, None, *addresses, *numbers, *constants)
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
