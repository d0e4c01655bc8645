"""What would adaptive budgets save on your own logs? Write them as JSON lines, and `v05 simulate` replays them.

    python examples/simulate_my_logs.py [--out runs/simulate_my_logs] [OPTION OF v05 simulate ...]

Each line is one rollout with its prompt, its reward and, in a training log, its step. This script makes a log of 200 prompts with
16 rollouts each. Many success rates are near 0 or 1, as for a policy in the middle of its training. `v05 simulate` also reads the
logs of verl, TRL, prime-rl and SkyRL directly, see v05 simulate --help.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path

import numpy as np


def write_log(path: Path, prompts: int = 200, rollouts: int = 16) -> None:
    rng = np.random.default_rng(0)
    with path.open("w") as file:
        for prompt, rate in enumerate(rng.beta(0.5, 0.5, prompts)):
            for reward in rng.binomial(1, rate, rollouts).tolist():
                print(json.dumps({"prompt": f"prompt {prompt}", "reward": reward}), file=file)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--out", type=Path, default=Path("runs/simulate_my_logs"))
    arguments, others = parser.parse_known_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    log = arguments.out / "rollouts.jsonl"
    write_log(log)
    # The prior is the true rate with noise on its logit. Without --prior it is an item-response model of the log's own outcomes.
    command = [sys.executable, "-m", "v05", "simulate", log, "--prior", "0.5", "--plot", arguments.out / "error.png"]
    command += ["--json", arguments.out / "records.json", *others]
    raise SystemExit(subprocess.run(list(map(str, command)), check=False).returncode)


if __name__ == "__main__":
    main()
