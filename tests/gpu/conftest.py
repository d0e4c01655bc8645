"""The device of these tests, and calls of the op on it.

`make test-gpu` runs them on a GPU. Elsewhere `make test` runs the same tests on CPU tensors in Triton's interpreter, on fewer and
smaller cases, and skips what only CUDA has.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import pytest
import torch

from helpers.interpreter import patched_once
from v05.kernels.advantage import launch
from v05.ops import AdvantageOutput, AdvantageStats, fused_advantage

ON_GPU = os.environ.get("V05_GPU") == "1"


@pytest.fixture(scope="session")
def device() -> torch.device:
    if not ON_GPU:
        return torch.device("cpu")
    assert torch.cuda.is_available(), "V05_GPU=1, but torch finds no CUDA device"
    return torch.device("cuda", torch.cuda.current_device())


@pytest.fixture(autouse=True, scope="session")
def _patched_once() -> Iterator[None]:
    with nullcontext() if ON_GPU else patched_once():
        yield


@pytest.fixture
def cuda(device: torch.device) -> torch.device:
    if device.type != "cuda":
        pytest.skip("needs a CUDA device: make test-gpu")
    return device


@pytest.fixture
def few_programs(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    """In the interpreter one program handles all rows of a group: each program computes its group's statistics, which is the
    slowest part.
    """
    if device.type != "cuda":
        monkeypatch.setattr(launch, "ENOUGH_PROGRAMS", 4)


@contextmanager
def watch_synchronisation() -> Iterator[None]:
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode(before)


@pytest.fixture
def no_synchronisation(device: torch.device) -> Callable[[], AbstractContextManager[None]]:
    """A context in which torch raises where it would wait for the device. On the CPU it does nothing."""
    return watch_synchronisation if device.type == "cuda" else nullcontext


@pytest.fixture
def call(
    device: torch.device, few_programs: None, no_synchronisation: Callable[[], AbstractContextManager[None]]
) -> Callable[..., AdvantageOutput]:
    """call(rewards, prior, **options): `fused_advantage` on the device, its result on the host.

    Tensors are moved to the device, except those named in `on_host`. The output is a buffer of NaN unless `out` is given, so that
    an unwritten element fails. On a GPU the call is made twice. The first call compiles. The second takes the short path of a known
    launch: it may not synchronise unless a tensor stays on the host, and it must give the same bits.
    """

    def run(
        rewards: torch.Tensor, prior: torch.Tensor | None = None, *, on_host: Sequence[str] = (), **options: Any
    ) -> AdvantageOutput:
        given = {
            name: value.to(device) if isinstance(value, torch.Tensor) and name not in on_host and name != "out" else value
            for name, value in {"rewards": rewards, "prior": prior, **options}.items()
        }
        given["out"] = out = given["out"] if "out" in given else buffer_for(given, device)
        given |= {"nonfinite": "exclude", "backend": "triton"}
        first = on_the_host(fused_advantage(**given))
        if device.type == "cuda":
            if out is not None:
                out.fill_(float("nan"))
            with nullcontext() if on_host else no_synchronisation():
                again = fused_advantage(**given)
            second = on_the_host(again)
            assert torch.equal(first.advantages, second.advantages)
            if first.stats is not None:
                for name in ("count", "mean", "var", "baseline", "nonfinite", "clipped"):
                    torch.testing.assert_close(
                        getattr(first.stats, name), getattr(second.stats, name), rtol=0, atol=0, equal_nan=True
                    )
        return first

    return run


def buffer_for(given: dict[str, Any], device: torch.device) -> torch.Tensor:
    """A buffer of NaN in the shape of the output."""
    if given.get("response_mask") is not None:
        shape = tuple(given["response_mask"].shape)
    elif given.get("cu_seqlens") is not None:
        shape = (int(given["cu_seqlens"][-1]),)
    else:
        shape = (given["rewards"].shape[0],)
    return torch.full(shape, float("nan"), dtype=given.get("dtype", torch.float32), device=device)


def on_the_host(out: AdvantageOutput) -> AdvantageOutput:
    """A copy on the host: the output's buffer is written again by the next call."""
    stats = out.stats
    if stats is not None:
        prior = None if stats.prior is None else stats.prior.cpu()
        stats = AdvantageStats(prior, stats.table.to("cpu", copy=True), stats.method_baseline)
    return AdvantageOutput(out.advantages.to("cpu", copy=True), stats)
