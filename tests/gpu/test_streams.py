"""Every call of every_launch.py with what only CUDA has: graphs, streams, torch.compile for the device, and NVIDIA's memory
checker.
"""

import math
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from gpu.every_launch import calls, make_inputs

from v05 import reference
from v05.ops import fused_advantage

pytestmark = pytest.mark.gpu
CALLS = list(calls(make_inputs(torch.device("cpu"))))
IN_THE_INTERPRETER = ("contiguous", "every option", "token rewards, int64 mask", "misaligned")
ON_GPU = os.environ.get("V05_GPU") == "1"
SANITIZER = shutil.which("compute-sanitizer") or shutil.which("/usr/local/cuda/bin/compute-sanitizer")


@pytest.mark.parametrize("name", CALLS if ON_GPU else IN_THE_INTERPRETER)
def test_what_is_called_here_agrees_with_the_core(name, device, few_programs):
    on_cpu = calls(make_inputs(torch.device("cpu")), "cpp")[name]()
    seen = calls(make_inputs(device), "triton")[name]()
    rtol = 2**-7 if name == "bfloat16" else 1e-6
    torch.testing.assert_close(seen.advantages.cpu(), on_cpu.advantages, rtol=rtol, atol=1e-9)
    if on_cpu.stats is not None:
        torch.testing.assert_close(seen.stats.baseline.cpu(), on_cpu.stats.baseline, rtol=1e-9, atol=1e-12, equal_nan=True)


@pytest.mark.parametrize("name", CALLS)
def test_a_call_in_a_cuda_graph_reads_what_is_there_when_it_is_replayed(name, cuda):
    given = make_inputs(cuda)
    call = calls(given)[name]
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        before = call().advantages.clone()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = call()
    given.change()
    captured.advantages.fill_(math.nan)
    graph.replay()
    torch.cuda.synchronize()
    replayed = captured.advantages.clone()
    again = call()
    assert torch.equal(replayed, again.advantages)
    assert not torch.equal(replayed, before)
    if captured.stats is not None:
        assert torch.equal(captured.stats.mean.nan_to_num(), again.stats.mean.nan_to_num())


@pytest.mark.parametrize("name", CALLS)
def test_a_call_does_not_wait_for_the_device(name, cuda, no_synchronisation):
    call = calls(make_inputs(cuda))[name]
    with no_synchronisation():
        first = call().advantages.clone()  # the first call compiles
        second = call().advantages
    assert torch.equal(first, second)


def test_waiting_for_the_device_is_noticed(cuda, no_synchronisation):
    value = torch.ones(1, device=cuda)
    with pytest.raises(RuntimeError, match="synchroniz"), no_synchronisation():
        value.item()


@pytest.mark.parametrize("name", CALLS)
def test_a_call_is_made_on_the_current_stream(name, cuda):
    """The stream is busy when it changes the rewards, so that a call on another stream would read the old ones."""
    given = make_inputs(cuda)
    call = calls(given)[name]
    before = call().advantages.clone()
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(100_000_000)
        given.change()
        seen = call().advantages.clone()
    stream.synchronize()
    after = call().advantages
    assert torch.equal(seen, after)
    assert not torch.equal(seen, before)


@pytest.mark.filterwarnings("ignore")  # warnings of the compiler itself
def test_torch_compile_takes_the_call_whole(cuda):
    given = make_inputs(cuda)

    def doubled(rewards, prior, ids, mask):
        return 2 * fused_advantage(rewards, prior, group_ids=ids, num_groups=len(given.prior), response_mask=mask).advantages

    inputs = (given.rewards, given.prior, given.ids, given.mask)
    rows = reference.advantages(given.rewards.cpu().numpy(), given.ids.cpu().numpy(), given.prior.cpu().numpy())[0]
    wanted = 2 * torch.from_numpy(rows).to(cuda)[:, None] * given.mask
    compiled = torch.compile(doubled, fullgraph=True)
    torch.testing.assert_close(compiled(*inputs).double(), wanted, rtol=1e-6, atol=1e-9)


def test_memcheck_finds_nothing(cuda):
    """Every buffer is an allocation of its own, so that an access beyond its end is noticed."""
    if SANITIZER is None:
        pytest.skip("no compute-sanitizer on this machine")
    script = Path(__file__).with_name("every_launch.py")
    environment = os.environ | {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    command = [SANITIZER, "--tool", "memcheck", "--error-exitcode", "9", sys.executable, str(script)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=400)
    if "Device not supported" in done.stdout + done.stderr:
        pytest.skip("compute-sanitizer does not support this device")
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    assert [line for line in done.stdout.splitlines() if line.startswith("made:")] == [f"made: {name}" for name in CALLS]
    assert "ERROR SUMMARY: 0 errors" in done.stdout
