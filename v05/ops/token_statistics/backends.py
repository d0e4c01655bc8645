"""What passes over logits: torch on the CPU, Triton on a GPU. Both have the two functions of `cpu.py`."""

from __future__ import annotations

from typing import Protocol

import torch

from v05.arguments import choice
from v05.ops.token_statistics import cpu
from v05.ops.token_statistics.inputs import Targets, Upstream


class Backend(Protocol):
    """A module with the functions of `cpu.py`, which says what they do."""

    def add_up(self, logits: torch.Tensor, targets: Targets, temperature: float, out: torch.Tensor) -> None: ...

    def write_gradient(
        self, logits: torch.Tensor, targets: Targets, upstream: Upstream, temperature: float, out: torch.Tensor
    ) -> None: ...


BACKENDS = ("cpu",)


def backend_for(name: str | None, device: torch.device) -> Backend:
    """The backend of that name, or of the device. ValueError where it cannot run there."""
    if name is not None:
        choice("backend", name, BACKENDS)
    return cpu
