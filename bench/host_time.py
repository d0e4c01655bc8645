"""Times the host's work for a call on a GPU, on a machine without a GPU: `python bench/host_time.py [--against PYTHON]`.

Triton's driver is replaced by one that loads and launches nothing, and CPU tensors replace the device's tensors. What remains is
the time that a trainer's Python thread waits for: reading the arguments, choosing the launch, and Triton's path to its launcher.
The kernels are compiled, for sm_90. Memory is allocated on the CPU, which takes longer than from torch's cache on a GPU. With
`out=` only the statistics are allocated.

`--against` names the Python of another environment with another version of v05. The two versions take turns, and the figure is the
ratio of their medians. The case "bare launch" is a Triton kernel with two arguments, the minimum for any such call.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

ROUNDS, CALLS = 40, 100
N, T, GROUP_SIZE = 4096, 64, 16  # the host's time does not depend on T


def pretend_gpu() -> None:
    """Make Triton compile for sm_90 and launch nothing."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.backends.driver import DriverBase

    class Utils:
        def load_binary(self, *_: Any) -> tuple[Any, ...]:
            return object(), 1, 0, 0, 1024  # module, function, registers, spills, threads

        def get_device_properties(self, _: int) -> dict[str, int]:
            return {"max_shared_mem": 1 << 20}

    class Driver(DriverBase):
        utils = Utils()

        def __init__(self) -> None: ...

        @staticmethod
        def is_active() -> bool:
            return True

        def map_python_to_cpp_type(self, ty: str) -> str:
            return ty

        def get_current_target(self) -> GPUTarget:
            return GPUTarget("cuda", 90, 32)

        def get_active_torch_device(self) -> str:
            return "cpu"

        def get_benchmarker(self) -> None: ...

        def get_current_device(self) -> int:
            return 0

        def get_current_stream(self, _: int) -> int:
            return 0

        def launcher_cls(self, source: Any, metadata: Any) -> Callable[..., None]:
            return lambda *_: None

    triton.runtime.driver.set_active(Driver())


def cases() -> dict[str, Callable[[], Any]]:
    import torch
    import triton
    import triton.language as tl

    from v05.ops import fused_advantage

    allow_cpu()

    @triton.jit
    def bare_kernel(p_out, n):
        tl.store(p_out + tl.program_id(0), n)

    generator = torch.Generator().manual_seed(0)
    groups = N // GROUP_SIZE
    rewards = torch.randint(0, 2, (N,), generator=generator).float()
    offsets = torch.arange(0, N + 1, GROUP_SIZE)
    prior = torch.rand(groups, dtype=torch.float64, generator=generator)
    mask = torch.rand(N, T, generator=generator) < 0.5
    out, rows = torch.empty(N, T), torch.empty(N)
    token_rewards, long_mask = torch.zeros(N, T), mask.long()
    padded = {"group_offsets": offsets, "response_mask": mask, "out": out, "backend": "triton"}
    by_token = padded | {"response_mask": long_mask}
    leave = {"method": "calibrated", "leave_one_out": True}
    return {
        "bare launch": lambda: bare_kernel[(1,)](rows, 1),
        "v05 padded": lambda: fused_advantage(rewards, prior, **padded),
        "v05 padded, no statistics": lambda: fused_advantage(rewards, prior, stats=False, **padded),
        "grpo padded": lambda: fused_advantage(rewards, method="grpo", **padded),
        "calibrated leave-one-out padded": lambda: fused_advantage(rewards, prior, **leave, **padded),
        "v05 token rewards, int64 mask": lambda: fused_advantage(token_rewards, prior, **by_token),
        "v05 rollouts": lambda: fused_advantage(rewards, prior, group_offsets=offsets, out=rows, backend="triton"),
    }


def allow_cpu() -> None:
    """Disable the check that refuses CPU tensors for a compiled kernel."""
    import triton

    try:
        from v05.kernels.launcher import Launcher
    except ImportError:  # an older version, in which the launching module checks the kernel's type
        import v05.kernels.advantage as module

        class Unchecked:
            def __getattr__(self, name: str) -> Any:
                return () if name == "JITFunction" else getattr(triton, name)

        module.triton = Unchecked()
    else:
        Launcher.refuse_host = lambda *_: None


def measure() -> dict[str, float]:
    """Microseconds per call by case: the lowest of ROUNDS means of CALLS calls, because other load can only add time."""
    pretend_gpu()
    figures = {}
    for name, call in cases().items():
        call()  # compiles
        times = []
        for _ in range(ROUNDS):
            start = time.perf_counter()
            for _ in range(CALLS):
                call()
            times.append((time.perf_counter() - start) / CALLS * 1e6)
        figures[name] = min(times)
    return figures


def run_in(python: str) -> dict[str, float]:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [python, __file__, "--worker"]
    done = subprocess.run(command, env=environment, check=True, stdout=subprocess.PIPE, text=True)
    figures: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return figures


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--against", metavar="PYTHON", help="Python of an environment with another version of v05")
    parser.add_argument("--turns", type=int, default=3, help="number of processes per version")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker:
        print(json.dumps(measure()))
        return
    pythons = [sys.executable] + ([arguments.against] if arguments.against else [])
    found: dict[str, list[dict[str, float]]] = {python: [] for python in pythons}
    for turn in range(arguments.turns):
        for python in pythons if turn % 2 == 0 else reversed(pythons):
            found[python].append(run_in(python))
    print(f"{'microseconds a call':<34}" + "".join(f"{name:>10}" for name in ("this", "other", "ratio")[: 2 * len(pythons) - 1]))
    for case in found[sys.executable][0]:
        medians = [statistics.median(turn[case] for turn in found[python]) for python in pythons]
        ratio = [f"{medians[0] / medians[1]:10.2f}"] if len(medians) > 1 else []
        print(f"{case:<34}" + "".join(f"{median:10.1f}" for median in medians) + "".join(ratio))


if __name__ == "__main__":
    main()
