"""`v05 eval`: measure a model's accuracy on benchmarks."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table

from v05.cli.shared import Threads, fail, interrupted, no_exit, print_table, progress_bars, say, set_threads


def evaluate(
    model: Annotated[Path, typer.Argument(metavar="MODEL", help="The Hugging Face model folder to evaluate.")],
    benchmarks: Annotated[str, typer.Option(help="Benchmarks to run, separated by commas; NAME is the file NAME.jsonl in --data.")],
    data: Annotated[Path, typer.Option(help="Folder of the benchmark files, which have one problem per line.")],
    samples: Annotated[
        int,
        typer.Option(
            help="Completions per problem. More narrow the interval and allow pass@k for larger k, at proportional time.", min=1
        ),
    ] = 16,
    engine: Annotated[
        str, typer.Option(help="The engine that samples: transformers, or vllm (faster on a GPU; needs the extra 'vllm').")
    ] = "transformers",
    temperature: Annotated[
        float,
        typer.Option(
            help="Sampling temperature; 0 always takes the likeliest token. 0.6 with top-p 0.95 is what many reasoning models "
            "recommend.",
            min=0.0,
        ),
    ] = 0.6,
    top_p: Annotated[
        float,
        typer.Option(
            help="Sample only from the likeliest tokens that together have this probability; 1 samples from all tokens.",
            min=0.0,
            max=1.0,
        ),
    ] = 0.95,
    max_new_tokens: Annotated[
        int, typer.Option(help="Longest completion, in tokens. Raise it if the table shows many completions cut off.", min=1)
    ] = 8192,
    template: Annotated[
        str | None,
        typer.Option(
            help="The user's message, with {problem} where the problem goes. Default: the problem, then a line "
            "'Please reason step by step, and put your final answer within \\boxed{}.'"
        ),
    ] = None,
    seed: Annotated[int, typer.Option(help="Seed of sampling.", min=0)] = 0,
    sampling_batch: Annotated[
        int, typer.Option(help="Completions sampled at the same time. Lower it if memory runs out.", min=1)
    ] = 128,
    workers: Annotated[int, typer.Option(help="Processes that verify answers.", min=1)] = 2,
    time_limit: Annotated[
        float, typer.Option(help="Seconds that verifying one answer may take; a longer one counts as wrong.", min=0.1)
    ] = 10.0,
    threads: Threads = 1,
    out: Annotated[
        Path | None, typer.Option(help="Directory for samples.jsonl, result.json and outcomes.jsonl. Default: runs/eval/MODEL.")
    ] = None,
    json: Annotated[Path | None, typer.Option(help="Also write the records of result.json to this file.")] = None,
) -> None:
    """Measure how often a model answers right: mean@k and pass@k on local benchmarks, with 95 % bootstrap intervals over problems.

    Each line of NAME.jsonl is a JSON object with the problem under problem, question or prompt, and the answer under answer,
    final_answer or solution (whose last \\boxed{} is the answer). Each problem is asked as a user's message in the tokenizer's
    chat template, and separate processes verify the completions. Call the same command again to resume an interrupted evaluation,
    or with more samples or benchmarks: only missing completions are sampled. Nothing is downloaded.

    Example: v05 eval path/to/model --benchmarks aime24,math500 --data benchmarks --samples 16 --engine vllm
    """
    from v05.benchmarks import TEMPLATE, EvalConfig, Sample, SampleLog, read_benchmark, sample_benchmarks, write_results
    from v05.files import require_model
    from v05.prior.v0.backbone import fingerprint
    from v05.rollout.verifier import VerifierPool
    from v05.tasks.jsonl import AnswerScorer
    from v05.train.metrics import write_json

    out = out or Path("runs/eval") / model.resolve().name
    set_threads(threads)
    try:
        require_model("model", model)
        settings = {
            "model": model.resolve(),
            "weights": fingerprint(model),
            "engine": engine,
            "template": TEMPLATE if template is None else template,
            "temperature": temperature,
            "top_p": top_p,
            "max_new_tokens": max_new_tokens,
            "seed": seed,
        }
        config = EvalConfig.model_validate(settings)
        names = list(dict.fromkeys(name.strip() for name in benchmarks.split(",")))
        problems = {name: read_benchmark(data, name, config.template, say) for name in names}
        log = SampleLog(out, config)
        with progress_bars() as progress:
            bars = {name: progress.add_task(name, total=len(of) * samples, note="") for name, of in problems.items()}
            right = dict.fromkeys(names, 0.0)

            def watch(sample: Sample) -> None:
                name = sample.benchmark
                right[name] += sample.reward
                progress.advance(bars[name])
                progress.update(bars[name], note=f"{right[name]:.0f} right")

            verifier = VerifierPool(AnswerScorer, workers=workers, time_limit=time_limit)
            try:
                no_exit()(sample_benchmarks)(config, problems, samples, log, verifier, capacity=sampling_batch, watch=watch)
            finally:
                verifier.close()
                log.close()
        records = write_results(out, config, problems, samples, log)
        if json is not None:
            write_json(json, records)
    except KeyboardInterrupt:
        interrupted(out)
    except (ValueError, OSError, RuntimeError, ImportError) as error:
        fail(error)
    if verifier.timed_out:
        say(f"{verifier.timed_out} completions took more than {time_limit:g} s to verify and count as wrong")
    if verifier.crashed:
        say(f"{verifier.crashed} completions crashed their verifier process and count as wrong")
    print_table(_benchmark_table(records))
    say(f"samples and records are in {out}")


def _benchmark_table(records: list[dict[str, Any]]) -> Table:
    names = ["mean", *[name for name in records[0] if name.startswith("pass@") and name[5:].isdecimal()][-1:]]
    table = Table(title="share of right answers, with a 95 % bootstrap interval over problems")
    heads = [f"mean@{records[0]['samples']}" if name == "mean" else name for name in names]
    for column in ("benchmark", "problems", *heads, "tokens", "cut off"):
        table.add_column(column, justify="left" if column == "benchmark" else "right", no_wrap=True)
    for r in records:
        table.add_row(
            r["benchmark"],
            str(r["problems"]),
            *(f"{r[name]:.3f} [{r[f'{name}_low']:.3f}, {r[f'{name}_high']:.3f}]" for name in names),
            f"{r['tokens']:.0f}",
            f"{r['cut_off']:.1%}",
        )
    return table
