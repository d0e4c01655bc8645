"""Prepares the data of examples/paper_qwen3_4b.sh and reports its results."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer
from rich.console import Console
from rich.progress import track
from rich.table import Table

from v05.benchmarks import PLACEHOLDER, TEMPLATE, read_benchmark
from v05.prior.v0.logs import share
from v05.train.curves import bootstrap_interval

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, help=__doc__)
# The text that DAPO-Math-17k puts around a problem. It is removed, so that training asks in the same way as v05 eval.
WRAPPER = re.compile(
    r"Solve the following math problem step by step\..*?\n\n(.*?)\n\nRemember to put your answer on its own line.*", re.S
)
BATCH = 10_000  # rows read at once; the published parquet file repeats its 17 thousand problems a hundred times


def rows_of(path: Path) -> Iterator[dict[str, Any]]:
    """The rows of a parquet or JSON-lines file."""
    if path.suffix == ".parquet":
        import pyarrow.parquet

        for batch in pyarrow.parquet.ParquetFile(path).iter_batches(BATCH):
            yield from batch.to_pylist()
    else:
        with path.open(encoding="utf-8") as file:
            yield from (json.loads(line) for line in file if line.strip())


def problem_of(row: dict[str, Any]) -> tuple[str, str]:
    """The problem and the answer of a row of DAPO-Math-17k, whose `prompt` may be a list of messages or a text.

    Raises ValueError if a column is missing.
    """
    try:
        prompt, answer = row["prompt"], str(row["reward_model"]["ground_truth"])
        text = prompt if isinstance(prompt, str) else prompt[-1]["content"]
    except (KeyError, TypeError, IndexError) as error:
        raise ValueError(
            f"a row lacks {error}; it needs the columns of DAPO-Math-17k, prompt and reward_model.ground_truth"
        ) from None
    wrapped = WRAPPER.fullmatch(text.strip())
    return (wrapped[1] if wrapped else text).strip(), answer.strip()


def for_verl(source: str, text: str, answer: str, index: int) -> dict[str, Any]:
    """A row in the format of verl's data set. verl chooses the scorer by `data_source`."""
    return {
        "data_source": source,
        "prompt": [{"role": "user", "content": text}],
        "ability": "MATH",
        "reward_model": {"style": "rule", "ground_truth": answer},
        "extra_info": {"index": index},
    }


def write_lines(path: Path, rows: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    typer.echo(f"{path}: {len(rows)} rows")


@app.command()
def data(
    source: Annotated[Path, typer.Argument(help="DAPO-Math-17k: the published parquet file, or JSON lines with its columns.")],
    benchmarks: Annotated[Path, typer.Argument(help="Folder with aime24.jsonl, which verl validates on.")],
    out: Annotated[Path, typer.Argument(help="Folder for train.jsonl, validation.jsonl and context.jsonl.")],
    context: Annotated[int, typer.Option(help="How many training problems to sample the start on, for V0's first context.")] = 512,
) -> None:
    """Write the training problems once each, the validation problems, and the problems of V0's first context."""
    problems: dict[str, str] = {}
    for row in track(rows_of(source), "reading", console=Console(stderr=True)):
        problem, answer = problem_of(row)
        problems.setdefault(problem, answer)
    out.mkdir(parents=True, exist_ok=True)
    train = [for_verl("math_dapo", TEMPLATE.replace(PLACEHOLDER, p), answer, i) for i, (p, answer) in enumerate(problems.items())]
    write_lines(out / "train.jsonl", train)
    asked = [problem.prompt for problem in read_benchmark(benchmarks, "aime24", TEMPLATE, print)]
    write_lines(out / "validation.jsonl", [for_verl("aime24", prompt.text, prompt.answer, i) for i, prompt in enumerate(asked)])
    chosen = sorted(problems, key=share)[:context]  # by a hash, because the order of the file may not be random
    write_lines(out / "context.jsonl", [{"problem": problem, "answer": problems[problem]} for problem in chosen])


@app.command()
def report(
    arms: Annotated[
        list[str], typer.Argument(help="NAME=DIR: the folder of an evaluation by v05 eval. Gains are relative to the first.")
    ],
    json_file: Annotated[Path | None, typer.Option("--json", help="Also write the records to this file.")] = None,
) -> None:
    """Print mean@k of each arm and its gain over the first, with 95 % bootstrap intervals over problems."""
    names, directories = zip(*(arm.split("=", 1) for arm in arms), strict=True)
    rates = [rates_of(Path(directory)) for directory in directories]
    records = []
    for benchmark in rates[0]:
        for name, of in zip(names, rates, strict=True):
            if of[benchmark].keys() != rates[0][benchmark].keys():
                raise typer.BadParameter(f"{benchmark}: {name} and {names[0]} were evaluated on different problems")
            values = np.array([of[benchmark][key] for key in sorted(of[benchmark])])
            first = np.array([rates[0][benchmark][key] for key in sorted(of[benchmark])])
            low, high = bootstrap_interval([values])
            gain_low, gain_high = bootstrap_interval([values - first])
            records.append(
                {
                    "benchmark": benchmark,
                    "arm": name,
                    "problems": len(values),
                    "mean": float(values.mean()),
                    "mean_low": low,
                    "mean_high": high,
                    "gain": float((values - first).mean()),
                    "gain_low": gain_low,
                    "gain_high": gain_high,
                }
            )
    table = Table(title="share of right answers, 95 % intervals over problems")
    for column in ("benchmark", "arm", "mean", f"gain over {names[0]}"):
        table.add_column(column, no_wrap=True)
    for r in records:
        gain = "" if r["arm"] == names[0] else f"{r['gain']:+.3f} [{r['gain_low']:+.3f}, {r['gain_high']:+.3f}]"
        table.add_row(r["benchmark"], r["arm"], f"{r['mean']:.3f} [{r['mean_low']:.3f}, {r['mean_high']:.3f}]", gain)
    Console(width=120).print(table)
    if json_file is not None:
        json_file.write_text(json.dumps(records, indent=1) + "\n")


def rates_of(directory: Path) -> dict[str, dict[str, float]]:
    """The share of right samples, by benchmark and problem."""
    rewards: dict[str, dict[str, list[float]]] = {}
    for line in (directory / "samples.jsonl").read_text(encoding="utf-8").splitlines():
        sample = json.loads(line)
        rewards.setdefault(sample["benchmark"], {}).setdefault(sample["problem"], []).append(sample["reward"])
    return {name: {key: float(np.mean(of)) for key, of in problems.items()} for name, problems in rewards.items()}


if __name__ == "__main__":
    app()
