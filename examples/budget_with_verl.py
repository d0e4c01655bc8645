"""A rollout budget in verl: 4 rollouts for every prompt, and up to 16 if the test of V_0.5 asks for more.

    python examples/budget_with_verl.py --model FOLDER            writes data and starts verl, which needs a GPU
    python examples/budget_with_verl.py --model FOLDER --print    writes data and prints the command

FOLDER is the folder of an instruct model. The task is to add two numbers, so only the model has to be downloaded. To train on your
own data, give verl's options after `--`, for example: -- data.train_files=mine.jsonl reward.custom_reward_function.path=mine.py
docs/hosts/verl.md explains the options of v05. examples/paper_qwen3_4b has the settings of a real experiment.
"""

from __future__ import annotations

import argparse
import json
import random
import re
import shlex
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

MINI_BATCH = 16  # prompts per update if each has 16 rollouts
EXPECTED = 6  # approximate mean rollouts per prompt under the test


def compute_score(data_source: str, solution_str: str, ground_truth: str, extra_info: object = None) -> float:
    """The reward: 1 if the last number of the completion is the sum. verl finds this function in this file."""
    numbers = re.findall(r"-?\d+", solution_str.replace(",", ""))
    return float(bool(numbers) and numbers[-1] == ground_truth)


def write_sums(path: Path, count: int, seed: int) -> None:
    """Write prompts in verl's format, one JSON object per line."""
    rng = random.Random(seed)
    with path.open("w") as file:
        for index in range(count):
            a, b = rng.randrange(1000), rng.randrange(1000)
            row = {
                "data_source": "sums",
                "prompt": [{"role": "user", "content": f"What is {a} + {b}? Answer with the number alone."}],
                "reward_model": {"style": "rule", "ground_truth": str(a + b)},
                "extra_info": {"index": index},
            }
            print(json.dumps(row), file=file)


def command(model: Path, out: Path, overrides: list[str]) -> list[str]:
    """The command that starts verl's trainer. The first five options are for v05; the rest are ordinary options of verl."""
    return [
        sys.executable,
        "-m",
        "verl.trainer.main_ppo",
        "algorithm.adv_estimator=v05",
        "+algorithm.v05.reward_range=[0,1]",
        "+algorithm.v05.initial=4",  # rollouts before the first test
        "+algorithm.v05.chunk=look",  # then as many at once as the rule is expected to take: at most 6 rounds
        "+actor_rollout_ref.rollout.agent.agent_loop_manager_class=v05.integrations.verl_rollout.SequentialAgentLoopManager",
        "actor_rollout_ref.rollout.n=16",  # the maximum
        "actor_rollout_ref.rollout.name=vllm",
        f"actor_rollout_ref.model.path={model}",
        # verl multiplies this by rollout.n to get the rollouts of a mini-batch. EXPECTED / 16 of the prompts keeps the number of
        # updates.
        f"actor_rollout_ref.actor.ppo_mini_batch_size={MINI_BATCH * EXPECTED // 16}",
        "actor_rollout_ref.actor.use_dynamic_bsz=true",
        "actor_rollout_ref.actor.optim.lr=1e-6",
        f"data.train_files={out / 'train.jsonl'}",
        f"data.val_files={out / 'validation.jsonl'}",
        "data.train_batch_size=64",
        "data.max_prompt_length=128",
        "data.max_response_length=256",
        f"reward.custom_reward_function.path={Path(__file__).resolve()}",
        "trainer.n_gpus_per_node=1",
        "trainer.total_training_steps=50",
        "trainer.test_freq=10",
        "trainer.logger=[console]",
        f"trainer.default_local_dir={out / 'checkpoints'}",
        *overrides,
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--out", type=Path, default=Path("runs/budget_with_verl"))
    parser.add_argument("--print", action="store_true", help="print the command and start nothing")
    parser.add_argument("overrides", nargs="*", help="options of verl's configuration, after --")
    arguments = parser.parse_args()
    if not (arguments.model / "config.json").is_file():
        raise SystemExit(f"--model {arguments.model}: no config.json there; give a Hugging Face model folder")
    out = arguments.out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    write_sums(out / "train.jsonl", 4096, seed=0)
    write_sums(out / "validation.jsonl", 256, seed=1)
    words = command(arguments.model.resolve(), out, arguments.overrides)
    if arguments.print:
        print(shlex.join(words))
        return
    for package, remedy in {"verl": "pip install '.[verl]'", "vllm": "pip install vllm"}.items():
        if find_spec(package) is None:
            raise SystemExit(f"{package} is not installed here; {remedy}, or give --print to see only the command")
    import torch

    if not torch.cuda.is_available():
        raise SystemExit("verl trains on GPUs, but no GPU was found; give --print to see only the command")
    raise SystemExit(subprocess.run(words, check=False).returncode)


if __name__ == "__main__":
    main()
