"""The steps of examples/llm_on_one_gpu.sh around `v05 compare`: it converts a GGUF file and makes tables and a plot."""

from __future__ import annotations

import csv
import hashlib
import json
import os
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import matplotlib
import numpy as np
import torch
import typer
from numpy.typing import NDArray
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint

from v05.methods import METHODS
from v05.tasks import Prompt
from v05.train.compare import Run, load_run
from v05.train.curves import bootstrap_interval
from v05.train.metrics import OUTCOMES
from v05.train.policy import chat_tokens

matplotlib.use("Agg")
from matplotlib import pyplot as plt

SHA256 = {
    "SmolLM2-135M-Instruct.Q4_1.gguf": "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
    "gemma-3-270m-q4_k_m.gguf": "a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
}
ASKED = Prompt("Name the capital of France.", "Paris", None)
LINES = ("-", "--", ":", "-.")  # line styles of the variants of one method

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@app.command()
def convert(
    source: Annotated[Path, typer.Argument(help="Folder that holds, at any depth, NAME.gguf or its parts NAME.gguf.*.")],
    out: Annotated[Path, typer.Argument(help="The folder to write.")],
) -> None:
    """Convert a GGUF file to a Hugging Face folder with the model in float32 and its tokenizer."""
    file = whole_file(source, out.parent)
    of_file: dict[str, Any] = {"gguf_file": file.name, "trust_remote_code": False}
    tokenizer = AutoTokenizer.from_pretrained(file.parent, **of_file)
    model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(file.parent, **of_file), dtype=torch.float32)
    tensors = load_gguf_checkpoint(str(file), return_tensors=True, model_to_load=model)["tensors"]
    loaded = model.load_state_dict(tensors, strict=False)
    if loaded.unexpected_keys or loaded.missing_keys != ["lm_head.weight"]:  # the output layer is tied to the embedding
        raise ValueError(f"{file}: {loaded}; install the version of gguf that the script names")
    model.tie_weights()
    if tokenizer.chat_template is not None:
        asked = torch.tensor([chat_tokens(tokenizer, ASKED)], device="cpu")
        answer = model.generate(asked, max_new_tokens=12, do_sample=False, pad_token_id=tokenizer.eos_token_id)
        print(f"{ASKED.text} {tokenizer.decode(answer[0, asked.shape[1] :])!r}")
    unfinished = out.with_name(f"{out.name}.unfinished")
    model.save_pretrained(unfinished)
    tokenizer.save_pretrained(unfinished)
    os.replace(unfinished, out)


def whole_file(source: Path, out: Path) -> Path:
    """The GGUF file in a folder. A file in parts is joined in `out`.

    Raises ValueError if there is not exactly one file, or if its hash differs from `SHA256`.
    """
    files, parts = list(source.rglob("*.gguf")), sorted(source.rglob("*.gguf.*"), key=lambda part: part.name)
    names = {part.name.partition(".gguf")[0] for part in parts}
    if len(files) + len(names) != 1:
        raise ValueError(f"{source} has {len(files)} files *.gguf and parts of {len(names)} others; exactly one file is needed")
    if files:
        (file,) = files
    else:
        file = out / f"{names.pop()}.gguf"
        file.write_bytes(b"".join(part.read_bytes() for part in parts))
    found = hashlib.sha256(file.read_bytes()).hexdigest()
    if found != SHA256.get(file.name, found):
        raise ValueError(f"{file} has the SHA-256 {found} in place of {SHA256[file.name]}; a part is missing or damaged")
    return file


@dataclass(frozen=True)
class Curves:
    """Held-out success rates of one run.

    Attributes:
        run: the run.
        rates: (E, P) success rates of P prompts at E evaluations.
    """

    run: Run
    rates: NDArray[np.float64]

    def at(self, axis: str, spent: float) -> NDArray[np.float64]:
        """(P,) rates after `spent` "rollouts" or "seconds" (the `axis`), interpolated linearly between evaluations."""
        places, _ = self.run.curve(axis)
        return np.array([np.interp(spent, places, of_prompt) for of_prompt in self.rates.T])


def curves_of(directory: Path, label: str) -> Curves:
    """The curves of a finished run. Raises ValueError if files of the run are missing."""
    run = load_run(label, directory)
    files = sorted((directory / OUTCOMES).glob("*.jsonl"))
    rates = [[(1 + json.loads(line)["score"]) / 2 for line in file.read_text().splitlines()] for file in files]
    if len(rates) != len(run.evaluations):
        raise ValueError(f"{directory / OUTCOMES} has {len(rates)} files for {len(run.evaluations)} evaluations")
    return Curves(run, np.array(rates))


@app.command()
def table(
    out: Annotated[Path, typer.Argument(help="Directory of a comparison; rows.csv, summary.csv and curves.png go there.")],
) -> None:
    """Write the rows of every evaluation, a summary of the methods at equal rollouts and at equal seconds, and a plot."""
    records = json.loads((out / "compare.json").read_text())
    of_method: dict[str, list[Curves]] = {}
    for record in records:
        if record["record"] == "run":
            directory = out / f"{record['label']}-seed{record['seed']}"
            of_method.setdefault(record["label"], []).append(curves_of(directory, record["label"]))
    write(out / "rows.csv", [row for label, group in of_method.items() for curves in group for row in rows_of(label, curves)])
    summary = summaries(of_method)
    write(out / "summary.csv", summary)
    writer = csv.DictWriter(sys.stdout, summary[0], lineterminator="\n")
    writer.writeheader()
    writer.writerows(summary)
    draw(of_method, out / "curves.png")


def rows_of(label: str, curves: Curves) -> list[dict[str, Any]]:
    """One row per evaluation of a run."""
    rows = []
    for evaluation, rates in zip(curves.run.evaluations, curves.rates, strict=True):
        row = {"method": label, "seed": curves.run.result["seed"], "rollouts": evaluation["rollouts"]}
        row |= {"tokens": evaluation["generated_tokens"], "seconds": round(evaluation["seconds"], 2), "prompts": len(rates)}
        rows.append(row | {"samples": curves.run.result["heldout_samples"]} | interval("accuracy", [rates]))
    return rows


def summaries(of_method: dict[str, list[Curves]]) -> list[dict[str, Any]]:
    """One row per method. Methods are compared at the rollouts and the seconds of the run that spent least."""
    spent = {axis: min(c.run.curve(axis)[0][-1] for group in of_method.values() for c in group) for axis in ("rollouts", "seconds")}
    rows = []
    for label, group in of_method.items():
        row: dict[str, Any] = {"method": label, "seeds": len(group)} | interval("before", [c.rates[0] for c in group])
        for axis, place in spent.items():
            row |= {axis: round(float(place), 1)} | interval(f"after_{axis}", [c.at(axis, place) for c in group])
        row["seconds_in_all"] = round(float(np.mean([c.run.curve("seconds")[0][-1] for c in group])), 1)
        rows.append(row | {"group_size": round(float(np.mean([s["group_size"] for c in group for s in c.run.steps])), 2)})
    return rows


def interval(name: str, rates: Sequence[NDArray[np.float64]]) -> dict[str, float]:
    """The mean of the seeds' (P,) rates, and its 95 % bootstrap interval over seeds and prompts."""
    low, high = bootstrap_interval(rates)
    return {key: round(float(value), 4) for key, value in ((name, np.mean(rates)), (f"{name}_low", low), (f"{name}_high", high))}


def write(path: Path, rows: list[dict[str, Any]]) -> None:
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0], lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


def draw(of_method: dict[str, list[Curves]], file: Path) -> None:
    """Plot held-out accuracy over rollouts and over seconds."""
    figure, panels = plt.subplots(1, 2, figsize=(12, 4.5), layout="constrained", sharey=True)
    for axes, (axis, name) in zip(panels, (("rollouts", "training rollouts"), ("seconds", "training time (s)")), strict=True):
        seen: Counter[str] = Counter()
        for label, group in of_method.items():
            method = group[0].run.result["method"]
            end = min(c.run.curve(axis)[0][-1] for c in group)
            places = np.unique(np.concatenate([c.run.curve(axis)[0] for c in group]))
            places = places[places <= end]
            found = [interval("y", [c.at(axis, place) for c in group]) for place in places]
            style = {"color": METHODS[method].colour[0], "linestyle": LINES[seen[method] % len(LINES)]}
            axes.plot(places, [f["y"] for f in found], label=label, **style)
            axes.fill_between(places, [f["y_low"] for f in found], [f["y_high"] for f in found], alpha=0.08, color=style["color"])
            seen[method] += 1
        axes.set(xlabel=name)
        axes.grid(alpha=0.3)
    panels[0].set(ylabel="held-out accuracy, with 95 % intervals")
    panels[0].legend()
    figure.savefig(file, dpi=130)


if __name__ == "__main__":
    app()
