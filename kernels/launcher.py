"""`Launcher` launches a compiled Triton kernel with less work on the host.

At every call Triton inspects all arguments and looks up the compiled kernel by them, which takes several times as long as the
launch itself.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import triton

# By default NVIDIA's assembler spills a few values to fit 40 registers. It does not if the bound is above what the kernel needs.
# AMD's assembler has no such option.
COMPILER_OPTIONS = {"cuda": {"num_warps": 4, "maxnreg": 128}, "hip": {"num_warps": 4}}
_OPTIONS = COMPILER_OPTIONS["hip" if torch.version.hip else "cuda"]
_MOST_INT32 = 2**31 - 1
_IS_KNOWN = hasattr(triton, "knobs")  # the launcher of Triton 3.4 and later; older versions use their own way


class Launcher:
    """A kernel with its compiled versions.

    The parameters of the kernel must be pointers (`p_...`), then numbers, then constants. Bool tensors are passed as uint8.

    Calls with equal device, dtypes and constants use the same machine code, as long as each number has the same class: 1, a
    multiple of 16, or neither. Triton also distinguishes aligned addresses and 32-bit integers. A call in which not all addresses
    are aligned or not all integers have 32 bits takes Triton's own path.
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
        """Launch on the current stream of `device`. A ValueError for CPU tensors without the interpreter."""
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
            if _calls(enter) or _calls(leave):  # a profiler is attached
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
    """Whether a hook does anything. An empty chain of hooks does not."""
    return bool(getattr(hook, "calls", hook))
