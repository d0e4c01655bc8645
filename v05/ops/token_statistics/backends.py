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


BACKEND_OF_DEVICE = {"cpu": "cpu", "cuda": "triton"}


def backend_for(name: str | None, device: torch.device) -> Backend:
    """The backend of that name, or of the device. ValueError where it cannot run there."""
    own = BACKEND_OF_DEVICE.get(device.type)
    if own is None:
        raise ValueError(f"logits: device {device} has no backend; move the tensors to one of {', '.join(BACKEND_OF_DEVICE)}")
    if name is not None and choice("backend", name, BACKEND_OF_DEVICE.values()) == "cpu" != own:
        raise ValueError(f"backend='cpu' needs CPU tensors, got {device}")
    if (name or own) == "cpu":
        return cpu
    from v05.kernels.token_statistics import launch  # imports Triton, which only this needs

    run: Backend = launch
    return run
