"""Times `fused_advantage` on a GPU: `make bench-gpu`, or `python bench/gpu_advantage.py --write docs/speed.md`.

A case whose result differs from the reference is not timed, and the exit status is then 1. There are three figures per call. The
first is microseconds on the device, measured with a CUDA graph that replays calls on buffers which together exceed the L2 cache.
The second is microseconds on the host, which does not wait for the device. The third is the bytes that the call must move divided
by its device time, as a share of the bandwidth that a copy of the padded shape reached in the same run.
bench/results/gpu_advantage.csv has all figures. The script prints which targets are met. Without a GPU it says so and times
nothing.

If this tree is not installed, `packaging/in_place.py` builds its core first. With a wheel of verl (--verl or the variable
VERL_WHEEL: the file, or a folder that holds it) verl's own functions are timed too, unchanged, on tensors as its trainer holds
them. In a copy of the tree without git history, the commit comes from the variable V05_COMMIT.

A run ends within --seconds: if time is short, cases get fewer rounds.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from pathlib import Path

SECONDS = 225  # time limit of a run; it may be exceeded a little but stays under four minutes
PACKAGING = Path(__file__).parents[1] / "packaging"


def main() -> None:
    until = time.monotonic()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--verl", type=Path, metavar="WHEEL", default=os.environ.get("VERL_WHEEL") or None)
    parser.add_argument("--write", type=Path, metavar="PAGE", help="put the table into this page")
    parser.add_argument("--seconds", type=float, default=SECONDS, help="time limit of the run")
    options = parser.parse_args()
    until += options.seconds

    import torch

    if not torch.cuda.is_available():
        print("no GPU: nothing was timed")
        return
    os.environ.pop("TRITON_INTERPRET", None)  # kernels are compiled here
    sys.path.append(str(PACKAGING))
    import in_place

    if (tree := in_place.folder()) is not None:
        sys.path.insert(0, str(tree))

    from on_gpu import results
    from on_gpu.clock import Clock
    from on_gpu.run import measure_all, plan_of
    from on_gpu.targets import verdicts

    plan = plan_of(options.verl, lambda function: torch.compile(function, dynamic=False))
    clock = Clock(until, sum(len(cases) for _, cases in plan))
    rows, failures = measure_all(plan, clock, torch.cuda.get_device_name())
    if rows:
        results.write(rows)
        rows = results.read()  # with the rounded figures of the file
        if options.write is not None:
            options.write.write_text(results.replaced(options.write.read_text(), rows))
        print(results.table(rows))
        print("\n".join(line for _, line in verdicts(rows)))
    if failures:
        sys.exit("\n".join(("these cases were not timed:", *failures)))


if __name__ == "__main__":
    main()
