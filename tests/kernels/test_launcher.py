"""Whether a launch runs a kernel that is compiled already, or takes Triton's own path. The kernel and the driver are fakes that
record calls.
"""

from contextlib import contextmanager
from types import SimpleNamespace

import pytest
import torch
import triton

from v05.kernels.launcher import Launcher

pytestmark = pytest.mark.skipif(not hasattr(triton, "knobs"), reason="before Triton 3.4 every launch goes Triton's own way")
GRID = (2, 3, 4)
FIRST, SECOND = torch.device("cuda", 0), torch.device("cuda", 1)
VALUES = torch.zeros(64)
PARAMETERS = {"p_in": "", "p_out": "", "T": "", "most": "", "eps": "fp64", "BLOCK": ""}  # parameters and their annotations


class Kernel:
    """A fake kernel of two pointers, an integer that Triton specializes on, one that it does not, a float, and a constant."""

    def __init__(self) -> None:
        self.params = [
            SimpleNamespace(name=name, annotation_type=kind, do_not_specialize=name == "most", is_constexpr=name == "BLOCK")
            for name, kind in PARAMETERS.items()
        ]
        self.compiled: list[tuple] = []  # arguments of launches on Triton's own path
        self.ran: list[tuple] = []  # arguments of all other launches
        self.current = [0]  # stack of devices; the last is the current one
        self.devices: list[int] = []  # the current device at each launch

    def __getitem__(self, grid):
        return lambda *given, **_: self._compile(grid, *given)

    def _compile(self, *given):
        self._note(self.compiled, *given)
        return SimpleNamespace(run=lambda *given: self._note(self.ran, *given), function="function", packed_metadata="metadata")

    def _note(self, where, *given):
        where.append(given)
        self.devices.append(self.current[-1])

    @contextmanager
    def device(self, index):
        self.current.append(index)
        yield
        self.current.pop()


@pytest.fixture
def kernel(monkeypatch):
    kernel = Kernel()
    monkeypatch.setattr(triton, "JITFunction", Kernel)
    monkeypatch.setattr(
        triton.runtime, "driver", SimpleNamespace(active=SimpleNamespace(get_current_stream=lambda index: f"stream of {index}"))
    )
    monkeypatch.setattr(torch.cuda, "current_device", lambda: kernel.current[-1])
    monkeypatch.setattr(torch.cuda, "device", kernel.device)
    return kernel


def launch(launcher, device=FIRST, p_in=VALUES, p_out=VALUES, T=32, most=7, eps=0.5, block=16):
    launcher(GRID, device, (p_in, p_out), (T, most, eps), (block,))


def test_a_kernel_is_compiled_at_the_first_call_and_run_at_the_next(kernel):
    launcher, other = Launcher(kernel), torch.zeros(64)
    launch(launcher)
    assert (len(kernel.compiled), kernel.ran) == (1, [])
    launch(launcher, p_out=other, T=48, most=3, eps=0.25)
    assert len(kernel.compiled) == 1
    handles = ("stream of 0", "function", "metadata", None, None, None)
    assert kernel.ran == [(*GRID, *handles, VALUES.data_ptr(), other.data_ptr(), 48, 3, 0.25, 16)]


@pytest.mark.parametrize(
    "change",
    [{"p_in": VALUES.double()}, {"p_in": None}, {"T": 1}, {"T": 33}, {"block": 32}, {"device": SECOND}],
    ids=["dtype", "none", "one", "no multiple of 16", "constant", "device"],
)
def test_what_makes_other_machine_code_is_compiled_for_itself(kernel, change):
    launcher = Launcher(kernel)
    for _ in range(2):
        launch(launcher)
        launch(launcher, **change)
    assert (len(kernel.compiled), len(kernel.ran)) == (2, 2)


@pytest.mark.parametrize("change", [{"p_in": VALUES[1:]}, {"T": 2**31}, {"most": 2**31}], ids=["address", "T", "most"])
def test_what_triton_alone_tells_apart_goes_its_own_way_each_time(kernel, change):
    launcher = Launcher(kernel)
    launch(launcher)
    for _ in range(2):
        launch(launcher, **change)
    assert (len(kernel.compiled), kernel.ran) == (3, [])


def test_the_device_of_a_launch_is_the_current_one_meanwhile(kernel):
    launcher = Launcher(kernel)
    for device in (FIRST, SECOND, SECOND, FIRST):
        launch(launcher, device=device)
    assert kernel.devices == [0, 1, 1, 0]
    assert [given[3] for given in kernel.ran] == ["stream of 1", "stream of 0"]
    assert kernel.current == [0]
