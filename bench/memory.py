"""Measures the memory of an update on the CPU, and compares it with the estimate of v05.train.memory: `python bench/memory.py`.

Policies have the architectures of SmolLM2-135M and Qwen3-0.6B with random weights; `--layers` makes them shallower. Each case runs
in its own process, which loads the policy and then makes two updates of two backward passes each on artificial rollouts of 512
tokens, of which 64 are the prompt. The figure is the peak memory of the process minus its memory after the same updates of a small
policy. glibc is configured to return freed memory, because it would otherwise keep some.

A case is skipped if its estimate exceeds `--limit` GiB.
"""

from __future__ import annotations

import argparse
import csv
import gc
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from architectures import QWEN3_06B, SMOLLM2_135M
from machine import commit, processor, versions

RESULTS = Path(__file__).parent / "results" / "memory.csv"
PROMPT, WIDTH, ROWS = 64, 512, 1  # tokens of a prompt, tokens of a rollout, rollouts per backward pass
UPDATES, PASSES = 2, 2
WARM, POLICY = "warm", "policy"  # folders: of a policy to warm up on, and of the one that is measured
ARCHITECTURES: dict[str, dict[str, Any]] = {
    "SmolLM2-135M": SMOLLM2_135M,
    "Qwen3-0.6B": QWEN3_06B,
    "tiny": {  # for the test
        "model_type": "llama",
        "hidden_size": 256,
        "num_hidden_layers": 6,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "intermediate_size": 1024,
        "vocab_size": 8192,
        "tie_word_embeddings": True,
    },
}
CASES: dict[str, list[str]] = {
    "float32": [],
    "float32, checkpointing": ["optimizer.gradient_checkpointing=true"],
    "bfloat16": ["policy.dtype=bfloat16"],
    "bfloat16, checkpointing": ["policy.dtype=bfloat16", "optimizer.gradient_checkpointing=true"],
    "float32, LoRA": ["policy.lora={}"],
    "bfloat16, LoRA, checkpointing": ["policy.dtype=bfloat16", "policy.lora={}", "optimizer.gradient_checkpointing=true"],
}
COLUMNS = ["policy", "layers", "case", "expected_gib", "measured_gib", "ratio", "device", "commit", "versions"]
GIB = 1 << 30
# glibc maps blocks of 64 KiB and more separately, and returns them to the system as soon as they are freed.
ALLOCATOR = {"MALLOC_MMAP_THRESHOLD_": str(1 << 16), "MALLOC_TRIM_THRESHOLD_": str(1 << 16), "MALLOC_ARENA_MAX": "1"}


def config_of(name: str, layers: int) -> Any:
    from transformers import AutoConfig

    settings = ARCHITECTURES[name] | {"num_hidden_layers": layers or ARCHITECTURES[name]["num_hidden_layers"]}
    return AutoConfig.for_model(**settings, pad_token_id=0, eos_token_id=1, bos_token_id=None, max_position_embeddings=2048)


def run_of(case: str, folder: str = "nowhere") -> Any:
    """The configuration of the run whose updates are measured."""
    from v05.train.presets import run_config

    sizes = [f"policy.max_new_tokens={WIDTH - PROMPT}", f"optimizer.tokens_per_backward={ROWS * WIDTH}", "sampling_batch=1"]
    sizes += [f"rollouts_per_step={ROWS * PASSES}"]
    return run_config("smoke", "none@1", [*sizes, *CASES[case]], policy={"path": folder})


def expected(name: str, layers: int, case: str) -> float:
    """The estimate of v05.train.memory for the case, in GiB."""
    from v05.train.memory import expected_memory

    found = expected_memory(run_of(case), config_of(name, layers), PROMPT)
    return replace(found, slots=0, sampling=0).peak / GIB  # the case does not sample


def measure(name: str, layers: int, case: str) -> float:
    """The measured memory of the case's updates in its own process, in GiB."""
    with tempfile.TemporaryDirectory() as folder:
        for step in ("make", "update"):
            command = [sys.executable, __file__, "--child", step, folder, name, str(layers), case]
            made = subprocess.run(command, capture_output=True, text=True, env=os.environ | ALLOCATOR, check=False)
            if made.returncode:
                raise RuntimeError(f"{name}, {case}: {made.stderr[-2000:]}")
    return float(json.loads(made.stdout.splitlines()[-1])) / GIB


def make(folder: str, name: str, layers: int) -> None:
    """Write a policy with random weights."""
    import torch
    from transformers import AutoModelForCausalLM

    from v05.train.policy import character_tokenizer

    torch.manual_seed(0)
    for place, config in {WARM: config_of("tiny", 1), POLICY: config_of(name, layers)}.items():
        AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(Path(folder, place))
        character_tokenizer().save_pretrained(Path(folder, place))


def update(folder: str, case: str) -> int:
    """The peak bytes of the case's updates, beyond the process's memory after the same updates of a small policy."""
    train(Path(folder, WARM), case)
    gc.collect()
    before = resident("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # resets the peak
    train(Path(folder, POLICY), case)
    return resident("VmHWM") - before


def train(folder: Path, case: str) -> None:
    """Load the policy and update it on artificial rollouts."""
    import numpy as np
    import torch

    from v05.rollout import Completion
    from v05.rollout.scheduler import RolloutBatch
    from v05.train.distributed import World
    from v05.train.learner import Learner

    torch.manual_seed(0)
    learner = Learner(run_of(case, str(folder)), folder, World())
    random, count, new = np.random.default_rng(0), ROWS * PASSES, WIDTH - PROMPT
    completions = [Completion(random.integers(3, 90, size=new), np.full(new, -1.0, dtype=np.float32), False) for _ in range(count)]
    batch = RolloutBatch(
        prompts=[None] * count,  # type: ignore[list-item]
        prompt_tokens=[tuple(random.integers(3, 90, size=PROMPT).tolist()) for _ in range(count)],
        priors=np.full(count, np.nan),
        offsets=np.arange(count + 1),
        rewards=np.zeros(count),
        completions=completions,
        invalid=0,
        failures=[],
        in_flight=1.0,
        generate_seconds=0.0,
        verify_seconds=0.0,
    )
    for _ in range(UPDATES):
        learner.update(batch, torch.linspace(-1, -0.5, count))


def resident(which: str) -> int:
    """This process's resident memory in bytes: now (VmRSS) or at its peak (VmHWM)."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{which}:"))


def rows(names: list[str], layers: int, cases: list[str], limit: float) -> Iterator[dict[str, Any]]:
    about = {"device": processor(), "commit": commit(), "versions": versions("torch", "transformers", "peft")}
    for name in names:
        depth = layers or ARCHITECTURES[name]["num_hidden_layers"]
        for case in cases:
            wanted = expected(name, depth, case)
            if wanted > limit:
                print(f"{name}, {depth} layers, {case}: {wanted:.2f} GiB expected, left out", flush=True)
                continue
            found = measure(name, depth, case)
            print(
                f"{name}, {depth} layers, {case}: {wanted:.2f} GiB expected, {found:.2f} measured, {wanted / found:.3f}", flush=True
            )
            figures = {"expected_gib": f"{wanted:.3f}", "measured_gib": f"{found:.3f}", "ratio": f"{wanted / found:.3f}"}
            yield {"policy": name, "layers": depth, "case": case, **figures, **about}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--policies", nargs="+", choices=ARCHITECTURES, default=["SmolLM2-135M", "Qwen3-0.6B"])
    parser.add_argument("--layers", type=int, default=0, help="layers of the policies; 0 means those of the architecture")
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--limit", type=float, default=9.0, help="largest estimate in GiB of a case that is measured")
    parser.add_argument("--write", action="store_true", help=f"add the rows to {RESULTS.name}")
    parser.add_argument("--child", nargs=5, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        step, folder, name, layers, case = arguments.child
        if step == "make":
            make(folder, name, int(layers))
        else:
            print(update(folder, case))
        return
    made = list(rows(arguments.policies, arguments.layers, arguments.cases, arguments.limit))
    if arguments.write:
        is_new = not RESULTS.exists()
        with RESULTS.open("a", newline="") as file:
            writer = csv.DictWriter(file, COLUMNS)
            if is_new:
                writer.writeheader()
            writer.writerows(made)


if __name__ == "__main__":
    main()
