"""The backends that read logits: the C++ core on the CPU, Triton on a GPU."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch

from v05.arguments import choice
from v05.ops.token_statistics import cpu
from v05.ops.token_statistics.inputs import Targets, Upstream
from v05.ops.token_statistics.sums import Made, statistics


class Backend(NamedTuple):
    """The functions of a backend. `cpu.py` describes `add_up` and `write_gradient`, `sums.py` describes `statistics`."""

    add_up: Callable[[torch.Tensor, Targets, float, torch.Tensor], None]
    statistics: Callable[[torch.Tensor, torch.Tensor, float], Made]
    write_gradient: Callable[[torch.Tensor, Targets, Upstream, float, torch.Tensor], None]


BACKEND_OF_DEVICE = {"cpu": "cpu", "cuda": "triton"}


def backend_for(name: str | None, device: torch.device) -> Backend:
    """The backend called `name`, or the device's own for None. A ValueError if it cannot run on the device."""
    own = BACKEND_OF_DEVICE.get(device.type)
    if own is None:
        raise ValueError(f"logits: device {device} has no backend; move the tensors to one of {', '.join(BACKEND_OF_DEVICE)}")
    if name is not None and choice("backend", name, BACKEND_OF_DEVICE.values()) == "cpu" != own:
        raise ValueError(f"backend='cpu' needs CPU tensors, got {device}")
    if (name or own) == "cpu":
        return Backend(cpu.add_up, statistics, cpu.write_gradient)
    from v05.kernels.token_statistics import launch  # imports Triton

    return Backend(launch.add_up, launch.statistics, launch.write_gradient)
