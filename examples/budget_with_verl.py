"""A rollout budget in verl: 4 rollouts for every prompt, and up to 16 where the test of V_0.5 asks for them.

    python examples/budget_with_verl.py --model FOLDER            writes data and starts verl, which needs a GPU
    python examples/budget_with_verl.py --model FOLDER --print    writes data and prints the command

The task is adding two numbers, so that nothing has to be downloaded but the model: FOLDER is one of an instruct model. Set your own
data with verl's options after `--`, for example: -- data.train_files=mine.jsonl reward.custom_reward_function.path=mine.py
What the options of v05 mean is in docs/hosts/verl.md; the settings for a real experiment are in examples/paper_qwen3_4b.
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

MINI_BATCH = 16  # prompts, in a trainer where each has 16 rollouts
EXPECTED = 6  # rollouts a prompt that the test comes to, about


def compute_score(data_source: str, solution_str: str, ground_truth: str, extra_info: object = None) -> float:
    """The reward: 1 if the last number of the completion is the sum. verl finds this function in this file."""
    numbers = re.findall(r"-?\d+", solution_str.replace(",", ""))
    return float(bool(numbers) and numbers[-1] == ground_truth)


def write_sums(path: Path, count: int, seed: int) -> None:
    """Prompts as verl reads them, a JSON object a line."""
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
    """What starts verl's trainer. The first five options are v05's; the rest is verl's own."""
    return [
        sys.executable,
        "-m",
        "verl.trainer.main_ppo",
        "algorithm.adv_estimator=v05",
        "+algorithm.v05.reward_range=[0,1]",
        "+algorithm.v05.initial=4",  # rollouts before the first test
        "+algorithm.v05.chunk=look",  # at once after it, what the rule would take: 6 rounds at most
        "+actor_rollout_ref.rollout.agent.agent_loop_manager_class=v05.integrations.verl_rollout.SequentialAgentLoopManager",
        "actor_rollout_ref.rollout.n=16",  # at most
        "actor_rollout_ref.rollout.name=vllm",
        f"actor_rollout_ref.model.path={model}",
        # verl counts a mini-batch as this times rollout.n rollouts, so fewer prompts keep the number of updates.
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
    parser.add_argument("overrides", nargs="*", help="of verl's configuration, after --")
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
            raise SystemExit(f"{package} is not installed here; {remedy}, or see the command alone with --print")
    import torch

    if not torch.cuda.is_available():
        raise SystemExit("verl trains on GPUs, and none is found here; see the command alone with --print")
    raise SystemExit(subprocess.run(words, check=False).returncode)


if __name__ == "__main__":
    main()
