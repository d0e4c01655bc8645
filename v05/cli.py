"""The command line, `v05 COMMAND`. Each command teaches in its --help; the work is done elsewhere."""

from __future__ import annotations

import os
import shutil
import sys
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from math import isnan
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

try:
    import typer
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
    from rich.table import Table
    from rich.text import Text
except ImportError as error:
    if sys.argv[1:2] == ["doctor"]:  # which says what is missing, and what works without it
        from v05.doctor import main as examine

        sys.exit(examine(sys.argv[2:]))
    sys.exit(f"v05: the command line needs the package {error.name!r}; install it with: pip install 'v05[train]'")

from v05.machine import cache_root, usable_cores
from v05.messages import explained_places, printable

if TYPE_CHECKING:  # heavy imports wait until a command runs, so that --help is quick
    import numpy as np

    from v05.simulate.outcomes import Outcomes
    from v05.train.config import RunConfig

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="Better policy gradients from fewer rollouts: V_0.5 (arXiv 2603.10848) and its rivals, on your machine.",
)


class Terminal(Console):
    """A console whose plain lines may quote anybody: what would drive the terminal is shown as text."""

    def out(self, *objects: Any, **options: Any) -> None:
        super().out(*(printable(str(each)) for each in objects), **options)


console = Terminal(stderr=True)

READ_AT_ONCE = 128  # prompts
INTERRUPTED = 130  # exit status after Ctrl-C
MAX_NEW_TOKENS = 256  # of a policy that is given
DEFAULT_METHODS = "grpo,dr_grpo,dapo,v05,calibrated"
MOST_FAULTS = 20  # of a task's rows that are shown
MOST_BARS = 24  # of a progress display; of more runs, only those under way have one

Preset = Annotated[
    str,
    typer.Option(help="Task and policy: tiny (0.6M parameters); arithmetic, symbols or hard (1M); smoke (a test)."),
]
Rollouts = Annotated[int | None, typer.Option(help="Training rollouts of a run; evaluation is not counted.", min=1)]
LearningRate = Annotated[float | None, typer.Option(help="AdamW's learning rate.")]
Threads = Annotated[int, typer.Option(help="Threads a run; 1 is fastest for small policies.", min=1)]


@app.command()
def train(
    context: typer.Context,
    out: Annotated[
        Path, typer.Option(help="Run directory: config.json, metrics.jsonl, outcomes/, tensorboard/, result.json, policy/.")
    ],
    preset: Preset = "tiny",
    method: Annotated[
        str,
        typer.Option(
            help="calibrated, v05, grpo, dr_grpo, rloo, prior or dapo; v05@4 fixes the group size, v05@4..16 tests up to 16, "
            "v05@4..16~6 spends 6 on average where they gain most; +PRIOR and +cost=0.01 may follow."
        ),
    ] = "v05",
    seed: Annotated[int, typer.Option(min=0)] = 0,
    rollouts: Rollouts = None,
    learning_rate: LearningRate = None,
    jsonl: Annotated[
        Path | None, typer.Option(help='Prompts instead of the preset\'s: a {"prompt": ..., "answer": ...} object a line.')
    ] = None,
    policy: Annotated[Path | None, typer.Option(help="Policy instead of the preset's: a Hugging Face model folder.")] = None,
    max_new_tokens: Annotated[int, typer.Option(help="Length limit of a completion; with --policy.", min=1)] = MAX_NEW_TOKENS,
    chat: Annotated[
        bool, typer.Option("--chat", help="Put prompts into the policy's chat template, as an instruct model expects them.")
    ] = False,
    engine: Annotated[
        str | None, typer.Option(help="What samples rollouts: transformers (in this process), vllm, vllm_server or ray.")
    ] = None,
    prior: Annotated[
        str,
        typer.Option(
            help="Learnt in the run: history; the generalist value model, inferring in context: v0. For comparison: constant; "
            "noise; oracle, the policy's own chance of the reference answer."
        ),
    ] = "history",
    config: Annotated[
        Path | None,
        typer.Option(help="Run exactly this config.json; leave the other options of a run out."),
    ] = None,
    distributed: Annotated[str, typer.Option(help="Under torchrun: ddp replicates the policy, fsdp2 shards it.")] = "ddp",
    wandb: Annotated[str | None, typer.Option(help="Show the figures in this project of Weights & Biases, too.")] = None,
    threads: Threads = 1,
) -> None:
    """Train one policy with one method. A run that was interrupted goes on where it stopped when called again.

    The first run on a preset warm-starts its policy by supervised training (about two minutes for tiny) and keeps it in
    $V05_CACHE or ~/.cache/v05. Under torchrun several processes train the one policy. `v05 report` draws the run, also while it
    lasts; tensorboard --logdir shows its figures.

    Example: v05 train --preset tiny --method v05 --seed 0 --out runs/one
    """
    from v05.train.config import label_of, run_config
    from v05.train.metrics import RESULT, refuse_to_overwrite

    try:
        overrides = _overrides(rollouts, learning_rate)
        if distributed != "ddp":
            overrides["distributed"] = distributed
        if jsonl is not None:
            overrides["task"] = {"kind": "jsonl", "path": jsonl}
        if policy is not None:
            overrides["policy"] = {"path": policy, "max_new_tokens": max_new_tokens}
        if chat:
            overrides["chat"] = True
        if engine is not None:
            overrides["engine"] = {"kind": engine}
        sources = {name: context.get_parameter_source(name) for name in context.params}
        given = {name for name, source in sources.items() if source is not None and source.name == "COMMANDLINE"}
        if "prior" in given:
            overrides["prior"] = prior
        if policy is None and max_new_tokens != MAX_NEW_TOKENS:
            raise ValueError(
                f"--max-new-tokens {max_new_tokens} belongs to --policy; a preset has its own, under policy in config.json"
            )
        beside = sorted(given - {"out", "config", "wandb", "threads"})
        if config is not None and beside:
            raise ValueError(f"--config is complete, so {', '.join(beside)} cannot be set beside it; edit the file instead")
        run = run_config(preset, method, seed=seed, **overrides) if config is None else _read_config(config)
        refuse_to_overwrite(run, out)
        _set_threads(threads)
        from v05.train.live import LiveView
        from v05.train.sinks import Sink, TensorBoard, WeightsAndBiases
        from v05.train.trainer import Trainer

        sinks: list[Sink] = [TensorBoard(out)]
        if wandb is not None:
            sinks.append(WeightsAndBiases(out, wandb, run))
        with _no_exit():
            trainer = Trainer(run, out, _say, sinks)
    except KeyboardInterrupt:
        console.out("interrupted before the first step; a warm start begins anew when the command is called again")
        raise typer.Exit(INTERRUPTED) from None
    except (ValueError, OSError, RuntimeError, ImportError) as error:
        _fail(error)
    try:
        with _no_exit(), LiveView(f"{label_of(run)}, seed {run.seed}", Console(stderr=True, quiet=_rank() > 0)) as view:
            for state in trainer.run():
                view.show(state)
        if _rank() == 0:
            _demand(out / RESULT)
    except KeyboardInterrupt:
        _interrupted(out)
    except (ValueError, OSError, RuntimeError) as error:
        _fail(error)
    _say(f"held-out accuracy {state.accuracy:.3f} after {state.rollouts} rollouts; written to {out}")


@app.command()
def compare(
    preset: Preset = "tiny",
    methods: Annotated[
        str,
        typer.Option(
            help="Comma-separated; grpo@8 fixes the group size, v05@4..16 tests from 4 up to 16, v05@4..16~6 spends 6 on average; "
            "+PRIOR and +cost=0.01 may follow."
        ),
    ] = DEFAULT_METHODS,
    suite: Annotated[
        str | None,
        typer.Option(
            help="In place of --preset and --methods: headline (every method at its group sizes on three task mixes, "
            "learning rates tuned, hours; policies are not kept) or smoke (a test)."
        ),
    ] = None,
    seeds: Annotated[int | None, typer.Option(help="Seeds a method; 3, or what the suite has.", min=1)] = None,
    rollouts: Rollouts = None,
    learning_rate: LearningRate = None,
    out: Annotated[Path, typer.Option(help="Directory of the comparison; finished runs in it are not run again.")] = Path(
        "runs/compare"
    ),
    jobs: Annotated[int, typer.Option(help="Runs at a time; 0 is one a core.", min=0)] = 0,
    json: Annotated[Path | None, typer.Option(help="Also write the records (as in compare.json) to this file.")] = None,
) -> None:
    """Train several methods from one warm start on the same prompts and rollout budget, and compare them.

    Ends with a table, plots (PNG) and compare.json in --out. Interrupted, it goes on where it stopped when called again. A suite
    leaves a row of runs.csv for every run, and all that it reports is made of them.

    Example: v05 compare --preset tiny --methods grpo,v05@4,v05@4..16 --seeds 5 --out runs/mine
    """
    from v05.tasks import make_task
    from v05.train.config import label_of, run_config

    try:
        if os.environ.get("WORLD_SIZE", "1") != "1":
            raise ValueError("v05 compare has a process for each run already; call it without torchrun")
        out.mkdir(parents=True, exist_ok=True)
        if suite is not None:
            if (preset, methods, learning_rate) != ("tiny", DEFAULT_METHODS, None):
                raise ValueError(f"--suite {suite} is complete, so --preset, --methods and --learning-rate cannot be set beside it")
            with _no_exit():
                _run_suite(suite, seeds, rollouts, out, jobs or usable_cores(), json)
            return
        specs = [spec.strip() for spec in methods.split(",")]
        configs = {
            f"{label_of(run)}-seed{seed}": run
            for seed in range(seeds or 3)  # seed by seed: what is finished early compares all methods
            for spec in specs
            for run in [run_config(preset, spec, seed=seed, **_overrides(rollouts, learning_rate))]
        }
    except KeyboardInterrupt:
        _interrupted(out)
    except (ValueError, OSError, RuntimeError) as error:
        _fail(error)
    _set_threads(1)
    from v05.train.checkpoint import find_checkpoints
    from v05.train.compare import is_finished
    from v05.train.policy import policy_folder

    first = next(iter(configs.values()))
    started = [name for name, config in configs.items() if not is_finished(config, out / name) and find_checkpoints(out / name)]
    if started:
        console.out(f"going on where they stopped: {', '.join(started)}")
    try:
        with _no_exit():
            with console.status("warm start of the policy (kept for later runs)"):
                policy_folder(first.policy, first.task, make_task(first.task), console.out)
            failed = _run_watched(configs, out, jobs or usable_cores())
            _report({name: config for name, config in configs.items() if name not in failed}, out, json)
    except KeyboardInterrupt:
        _interrupted(out)
    except (ValueError, OSError, RuntimeError) as error:
        _fail(error)
    for name, why in failed.items():
        console.out(f"failed: {name}: {why}", style="red", highlight=False)
    if failed:
        raise typer.Exit(1)


@app.command()
def report(
    runs: Annotated[
        list[Path], typer.Argument(metavar="RUN_DIR...", help="Run directories, or directories of runs as compare's --out.")
    ],
    out: Annotated[Path | None, typer.Option(help="The page; left out, report.html in the first directory.")] = None,
    baseline: Annotated[
        str | None, typer.Option(help="Method whose final accuracy the others are to reach, such as grpo@16; the first grpo.")
    ] = None,
) -> None:
    """Draw runs, finished or not, on one HTML page that needs no network.

    Runs that differ in their seed alone are one curve with a band; a run whose files are damaged is left out and named. The page
    holds learning curves over rollouts, tokens and seconds, rollouts saved, group sizes, prior against outcome, gradient norm,
    entropy, where time went, and completions to read.

    Example: v05 report runs/compare --out page.html
    """
    from rich.progress import track

    from v05.report.figures import document
    from v05.report.page import write_page
    from v05.report.runs import find_runs, read_runs, seeds_of

    def watched(items: Sequence[Any], what: str) -> Iterable[Any]:
        return track(items, what, console=console)

    try:
        directories = find_runs(runs)
        read, left_out = read_runs(directories, lambda items: watched(items, "reading runs"))
        page = out or runs[0] / "report.html"
        title = ", ".join(place.resolve().name for place in runs)
        write_page(document(seeds_of(read), read, baseline, watched, left_out), title, page)
    except (ValueError, OSError) as error:
        _fail(error)
    for name, why in left_out.items():
        console.out(f"left out: {name}: {why}", highlight=False)
    console.out(f"{len(read)} runs on {page}, {page.stat().st_size / 1e6:.1f} MB")


@app.command("fit-prior")
def fit_prior(
    logs: Annotated[
        list[Path], typer.Argument(help="JSON-lines files: policy (model@step), prompt, score (mean reward in [-1, 1]) and trials.")
    ],
    adapter: Annotated[
        Path | None, typer.Option(help="Train a residual query adapter on the logs and write it to this file (safetensors).")
    ] = None,
    steps: Annotated[int, typer.Option(help="Updates of the adapter.", min=1)] = 300,
    backbone: Annotated[
        Path | None,
        typer.Option(help="Hugging Face model folder that reads prompts; left out, the sentence model of the extra 'value'."),
    ] = None,
    tabpfn: Annotated[
        Path | None, typer.Option(help="Use TabPFN with this checkpoint file as the head, in place of the embedded one.")
    ] = None,
    context: Annotated[int, typer.Option(help="Most rows of a context.", min=2, max=1024)] = 1024,
    seed: Annotated[int, typer.Option(help="Of the adapter's training and the bootstrap.", min=0)] = 0,
    threads: Annotated[int, typer.Option(min=1)] = 1,
    json: Annotated[Path | None, typer.Option(help="Also write the records, unrounded, to this file.")] = None,
) -> None:
    """Fit the value model V0 to histories of policies, and report how well it predicts.

    Each checkpoint's test prompts are predicted from its context prompts and the checkpoints before it, beside the policy's mean,
    nearest neighbours and logistic regression on the same context. Prompts never seen and prompts seen under earlier checkpoints
    are reported apart. Prompts' features are kept in $V05_CACHE or ~/.cache/v05. Nothing is downloaded.

    Example: v05 fit-prior runs/one/outcomes/*.jsonl --backbone runs/one/policy --json scores.json
    """
    from rich.progress import track

    _set_threads(threads)
    try:
        from v05.prior.v0 import V0Prior
        from v05.prior.v0.adapter import AdaptedBackbone, load_adapter
        from v05.prior.v0.backbone import Backbone
        from v05.prior.v0.evaluate import evaluate
        from v05.prior.v0.head import Head, load_head
        from v05.prior.v0.logs import read_logs, walk
        from v05.prior.v0.train import train_adapter
        from v05.train.metrics import write_json

        def watched(items: Sequence[Any], what: str) -> Iterable[Any]:
            return track(items, what, console=console)

        if adapter is not None and tabpfn is not None:
            raise ValueError("--adapter trains through the embedded head; leave --tabpfn out")
        tasks = list(walk(read_logs(logs), context))
        reader = Backbone(backbone, cache_root())
        head: Head = load_head()
        if tabpfn is not None:
            from v05.prior.v0.tabpfn_head import TabPFNHead

            head = TabPFNHead(tabpfn)
        prior = V0Prior(reader, head)
        prompts = sorted(
            {prompt for task in tasks for prompt in (*task.context.prompts, *(row.prompt for row in task.rows))}, key=len
        )
        for start in watched(range(0, len(prompts), READ_AT_ONCE), "reading prompts"):
            reader.features(prompts[start : start + READ_AT_ONCE])  # into the cache: an interruption loses no more than these
        if adapter is not None:
            trained = train_adapter(reader, load_head(), tasks, adapter, steps=steps, seed=seed, track=watched)
            _say("adapter: validation loss {before:.4f} without, {after:.4f} with the best".format(**trained))
            if trained["kept"]:
                prior = V0Prior(AdaptedBackbone(reader, load_adapter(adapter, reader)), head)
            else:
                _say("adapter: not kept, as it is no better than the backbone's own features")
        records = evaluate(prior, tasks, watched, seed)
        if not records:
            raise ValueError("no checkpoint has test prompts and a context; give logs with more prompts a checkpoint")
        if json is not None:
            write_json(json, records)
    except KeyboardInterrupt:
        console.out("interrupted; the same command goes on from what was computed")
        raise typer.Exit(INTERRUPTED) from None
    except (ValueError, OSError, ImportError) as error:
        _fail(error)
    if longer := reader.longer_than_limit(prompts):
        _say(f"{longer} of {len(prompts)} prompts are longer than the backbone's {reader.limit} tokens; their ends were not read")
    Console(width=None if sys.stdout.isatty() else 180).print(_prior_table(records))


def _prior_table(records: list[dict[str, Any]]) -> Table:
    table = Table(title="success rates predicted within a policy; AUC with a 95 % bootstrap interval over prompts")
    for column in ("setting", "predictor", "prompts", "AUC", "Brier", "cross-entropy", "predicted -> came true"):
        table.add_column(column, justify="left" if column in ("setting", "predictor") else "right", no_wrap=True)
    for r in records:
        table.add_row(
            r["setting"],
            r["predictor"],
            str(r["prompts"]),
            f"{r['auc']:.3f} [{r['auc_low']:.3f}, {r['auc_high']:.3f}]",
            f"{r['brier']:.4f}",
            f"{r['cross_entropy']:.3f}",
            " ".join(f"{predicted:.2f}->{rate:.2f}" for predicted, rate, _ in r["calibration"]),
        )
    return table


@app.command("eval")
def evaluate(
    model: Annotated[Path, typer.Argument(help="Hugging Face model folder.")],
    benchmarks: Annotated[str, typer.Option(help="Comma-separated; NAME is the file NAME.jsonl in --data.")],
    data: Annotated[Path, typer.Option(help="Folder of the benchmarks, a problem a line.")],
    samples: Annotated[int, typer.Option(help="Completions a problem.", min=1)] = 16,
    engine: Annotated[str, typer.Option(help="What samples: transformers or vllm.")] = "transformers",
    temperature: Annotated[float, typer.Option(help="0 takes the likeliest token.", min=0.0)] = 0.6,
    top_p: Annotated[float, typer.Option(help="Share of the probability that is sampled from.", min=0.0, max=1.0)] = 0.95,
    max_new_tokens: Annotated[int, typer.Option(help="Length limit of a completion.", min=1)] = 8192,
    template: Annotated[
        str | None,
        typer.Option(
            help="The user's message, with {problem} in it; left out, the problem and on the next line "
            "'Please reason step by step, and put your final answer within \\boxed{}.'"
        ),
    ] = None,
    seed: Annotated[int, typer.Option(min=0)] = 0,
    sampling_batch: Annotated[int, typer.Option(help="Completions sampled at once.", min=1)] = 128,
    workers: Annotated[int, typer.Option(help="Processes that verify.", min=1)] = 2,
    time_limit: Annotated[float, typer.Option(help="Seconds that a verification may take.", min=0.1)] = 10.0,
    threads: Threads = 1,
    out: Annotated[
        Path | None, typer.Option(help="Directory of samples.jsonl, result.json and outcomes.jsonl; runs/eval/MODEL by default.")
    ] = None,
    json: Annotated[Path | None, typer.Option(help="Also write the records of result.json to this file.")] = None,
) -> None:
    """How often does a model answer right? mean@k and pass@k on local benchmarks, with 95 % bootstrap intervals over problems.

    A line of NAME.jsonl is a JSON object with the problem under problem, question or prompt, and the answer under answer,
    final_answer or solution (of which the last \\boxed{} counts). Each problem is asked as a user's message in the tokenizer's
    chat template; completions are verified in processes of their own. Interrupted, the same command goes on, and
    samples only what is missing, also where more samples or benchmarks are asked for. Nothing is downloaded.

    Example: v05 eval path/to/model --benchmarks aime24,math500 --data benchmarks --samples 16 --engine vllm
    """
    from v05.evaluate import TEMPLATE, EvalConfig, Sample, SampleLog, read_benchmark, write_results
    from v05.evaluate import evaluate as run
    from v05.prior.v0.backbone import fingerprint
    from v05.rollout.verifier import VerifierPool
    from v05.tasks.jsonl import AnswerScorer
    from v05.train.metrics import write_json

    out = out or Path("runs/eval") / model.resolve().name
    _set_threads(threads)
    try:
        if not (model / "config.json").is_file():
            raise ValueError(f"model={model}: no config.json there; give a Hugging Face model folder")
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
        problems = {name: read_benchmark(data, name, config.template, _say) for name in names}
        log = SampleLog(out, config)
        with _progress() as progress:
            bars = {name: progress.add_task(name, total=len(of) * samples, note="") for name, of in problems.items()}
            right = dict.fromkeys(names, 0.0)

            def watch(sample: Sample) -> None:
                name = sample.benchmark
                right[name] += sample.reward
                progress.advance(bars[name])
                progress.update(bars[name], note=f"{right[name]:.0f} right")

            verifier = VerifierPool(AnswerScorer, workers=workers, time_limit=time_limit)
            try:
                _no_exit()(run)(config, problems, samples, log, verifier, capacity=sampling_batch, watch=watch)
            finally:
                verifier.close()
                log.close()
        records = write_results(out, config, problems, samples, log)
        if json is not None:
            write_json(json, records)
    except KeyboardInterrupt:
        _interrupted(out)
    except (ValueError, OSError, RuntimeError, ImportError) as error:
        _fail(error)
    if verifier.timed_out:
        _say(f"{verifier.timed_out} completions took the verifier more than {time_limit:g} s and count as wrong")
    if verifier.crashed:
        _say(f"{verifier.crashed} completions ended their verifier's process and count as wrong")
    Console(width=None if sys.stdout.isatty() else 180).print(_benchmark_table(records))
    _say(f"samples and records are in {out}")


@app.command("check-task")
def check_task(
    file: Annotated[Path, typer.Argument(help="A task for v05 train --jsonl, a prompt and its answer a line.")],
    show: Annotated[int, typer.Option(help="Rows of each kind to show.", min=0)] = 3,
    json: Annotated[Path | None, typer.Option(help="Also write a record for every line to this file.")] = None,
) -> None:
    """How is each reference answer of a task read, and can it be earned? Run this before training on a file of your own.

    Shows what the answers are read as (numbers, formulas, words), which rows cannot earn their reward even by a completion that is
    the reference, and which prompts repeat. Ends with status 1 if a row cannot earn its reward.

    Example: v05 check-task tasks.jsonl --json checked.json
    """
    from dataclasses import asdict

    from v05.tasks.check import check_task as check
    from v05.train.metrics import write_json

    try:
        with _progress() as progress:
            bar = progress.add_task("rows", total=None, note="")
            rows = check(file, lambda: progress.advance(bar))
        if json is not None:
            write_json(json, [asdict(row) | {"cannot_earn": row.cannot_earn} for row in rows])
    except KeyboardInterrupt:
        raise typer.Exit(INTERRUPTED) from None
    except (ValueError, OSError, RuntimeError, ImportError) as error:
        _fail(error)
    if not rows:
        _fail(ValueError(f"{file} holds no row; give one JSON object a line"))
    output = Console(width=None if sys.stdout.isatty() else 180)
    kinds = Table("kind", "rows", "line", "answer", "is read as", title=f"{len(rows)} rows of {file}")
    for kind in dict.fromkeys(row.kind for row in rows):
        of_kind = [row for row in rows if row.kind == kind]
        for i, row in enumerate(of_kind[:show] or of_kind[:1]):
            kinds.add_row(
                *((kind, str(len(of_kind))) if i == 0 else ("", "")), str(row.line), *map(_plain, (row.answer, row.reads))
            )
    output.print(kinds)
    faults = [(row, ", ".join(row.unearned) or row.reads) for row in rows if row.unearned or row.kind == "unreadable"]
    if faults:
        table = Table("line", "answer", "earns nothing", title="rows whose reference itself is not rewarded")
        for row, why in faults[:MOST_FAULTS]:
            table.add_row(str(row.line), *map(_plain, (row.answer, why)))
        output.print(table)
        if len(faults) > MOST_FAULTS:
            _say(f"{len(faults) - MOST_FAULTS} more such rows; --json FILE writes all")
    for row in [row for row in rows if row.repeats is not None][:MOST_FAULTS]:
        _say(f"line {row.line} repeats the prompt of line {row.repeats}{', with another answer' if row.contradicts else ''}")
    cannot = sum(row.cannot_earn for row in rows)
    repeated = sum(row.repeats is not None for row in rows)
    _say(f"{cannot} of {len(rows)} rows cannot earn their reward; {repeated} repeat a prompt")
    if cannot:
        raise typer.Exit(1)


def _plain(text: str) -> Text:
    """A text from a file, for a table: no markup, one line."""
    return Text(" ".join(text.split()))


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


@app.command()
def simulate(
    outcomes: Annotated[
        Path,
        typer.Argument(
            help="A log or a folder of logs: of v05 train and eval, verl, TRL, prime-rl or SkyRL; your own, as CSV or JSON lines."
        ),
    ],
    prior: Annotated[
        str,
        typer.Option(
            help="irt (one-parameter logistic, cross-fitted); a number: the truth with normal noise of that standard deviation "
            "on its logit; or a column of the file with predicted success rates."
        ),
    ] = "irt",
    reward: Annotated[
        str | None,
        typer.Option(help="Column with the reward, where a log has several or an unusual one; of prime-rl, a reward's name."),
    ] = None,
    success_above: Annotated[
        float | None, typer.Option(help="A greater reward is a success. Needed where rewards are not 0 and 1, or -1 and 1.")
    ] = None,
    replay: Annotated[
        str,
        typer.Option(
            help="superpopulation: fresh draws from the rates that may lie behind the outcomes; finite: the recorded trials."
        ),
    ] = "superpopulation",
    initial: Annotated[int, typer.Option(help="Rollouts of a prompt before its first test.", min=1)] = 4,
    maximum: Annotated[
        int | None, typer.Option(help="Most rollouts of a prompt; 16, or with --replay finite all trials if fewer.", min=1)
    ] = None,
    cost: Annotated[
        float | None, typer.Option(help="Of one rollout in v05+osla, squared error (centred units); 1 / maximum^2.", min=0.0)
    ] = None,
    seed: Annotated[int, typer.Option(min=0)] = 0,
    plot: Annotated[Path, typer.Option(help="Where to draw error over mean rollouts (PNG).")] = Path("runs/simulate.png"),
    json: Annotated[Path | None, typer.Option(help="Also write a record for each method and budget to this file.")] = None,
) -> None:
    """What would adaptive rollout budgets save on your logs? Replay recorded outcomes under each method and budget.

    Measures how far each baseline is from the true success rate, and says how many rollouts a prompt each method needs for
    the error of GRPO at 16 (or the maximum, if less). The rollouts of one prompt at one step are a group. Logs are told apart by
    their columns:

    Example, a CSV file with model, question, successes and trials: v05 simulate outcomes.csv --initial 4 --json simulate.json

    Example, runs of v05 train or v05 eval: v05 simulate runs/eval

    Example, verl with trainer.rollout_data_dir=rollouts: v05 simulate rollouts

    Example, TRL with log_completions (needs pyarrow): v05 simulate output_dir/completions --reward accuracy_reward

    Example, prime-rl: v05 simulate outputs/rollouts --success-above 0.5

    Example, any other: JSON lines with prompt, reward and, in training, step: v05 simulate mine.jsonl
    """
    from dataclasses import asdict

    import numpy as np

    from v05.simulate.plot import draw
    from v05.simulate.replay import MEASURED, REFERENCE, WARM_UP, Replay, Source
    from v05.simulate.summary import conclusion, table, what_was_read
    from v05.train.metrics import write_json

    try:
        noise = _number(prior)
        column = None if prior == "irt" or noise is not None else prior
        with _progress() as progress:
            read = _read(outcomes, column, reward, success_above, progress)
            if maximum is None:
                maximum = REFERENCE if replay != "finite" else min(REFERENCE, int(read.trials.max()))
            rng = np.random.default_rng(seed)
            if prior == "irt":
                read = _with_item_response(read, rng, progress)
            source = Source(read, noise, replay, maximum, rng)
            simulation = Replay(source.draw, initial, maximum, cost)
            bar = progress.add_task("replay", total=WARM_UP + MEASURED, note="")
            for _ in range(WARM_UP + MEASURED):
                simulation.step()
                progress.advance(bar)
        records = simulation.records
        draw(records, f"{outcomes.name}, prior {prior}, {replay}", plot)
        if json is not None:
            write_json(json, [asdict(record) for record in records])
    except KeyboardInterrupt:
        raise typer.Exit(INTERRUPTED) from None
    except (ValueError, OSError, ImportError) as error:
        _fail(error)
    out = Console(width=None if sys.stdout.isatty() else 180)
    out.print(table(records, initial, maximum))
    for sentence in what_was_read(read, prior):
        console.out(sentence)
    console.out(f"{source.cells} cells of {len(read)} replayed; plot in {plot}")
    out.print(conclusion(records, initial, maximum), highlight=False)


def _number(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:
        return None


def _read(path: Path, column: str | None, reward: str | None, success_above: float | None, progress: Progress) -> Outcomes:
    from v05.simulate.outcomes import read_outcomes

    bar = progress.add_task("reading", total=None, note="")
    read = read_outcomes(
        path, column, lambda rows: progress.update(bar, completed=rows), reward=reward, success_above=success_above
    )
    progress.update(bar, total=len(read), completed=len(read))
    return read


def _with_item_response(outcomes: Outcomes, rng: np.random.Generator, progress: Progress) -> Outcomes:
    from dataclasses import replace

    from v05.simulate.item_response import FOLDS, cross_fitted

    bar = progress.add_task("prior", total=FOLDS, note="item response, cross-fitted")
    return replace(outcomes, priors=cross_fitted(outcomes, rng, lambda: progress.advance(bar)))


@app.command()
def doctor(json: Annotated[Path | None, typer.Option(help="Also write the findings to this file.")] = None) -> None:
    """What of v05 runs here: versions, devices, active code paths, a self-check, and what to install for the rest.

    The self-check compares the op with its float64 specification; exit status 1 if they differ.

    Example: v05 doctor --json doctor.json
    """
    from v05.doctor import run

    try:
        status = run(json)
    except OSError as error:
        _fail(error)
    raise typer.Exit(status)


def _run_watched(
    configs: dict[str, RunConfig], out: Path, jobs: int, done: Callable[[str], None] = lambda name: None
) -> dict[str, str]:
    """Run and show it; `done` hears of every run that ends well, once. Returns those that failed, each with what to do about it."""
    from v05.train.compare import RunState, run_all

    many = len(configs) > MOST_BARS
    with _progress() as progress:
        whole = progress.add_task("runs", total=len(configs), note="", visible=many)
        bars = {
            name: progress.add_task(name, total=config.total_rollouts, note="waiting", start=False, visible=not many)
            for name, config in configs.items()
        }
        ended: set[str] = set()
        failed: dict[str, str] = {}

        def watch(states: list[RunState]) -> None:
            for state in states:
                if state.name in ended:
                    continue
                note = state.status if state.accuracy is None else f"{state.status}, held-out accuracy {state.accuracy:.3f}"
                running = state.status == "running"
                if running:
                    progress.start_task(bars[state.name])
                reached = state.total if state.status == "done" else state.rollouts  # a run ends within half a step of its total
                progress.update(bars[state.name], completed=reached, note=note, visible=running or not many)
                if state.status in ("done", "failed", "damaged"):
                    ended.add(state.name)
                    if state.status != "done":
                        failed[state.name] = state.why
                    progress.update(whole, completed=len(ended))
                    if state.status == "done":
                        done(state.name)
                    if not console.is_terminal:
                        console.out(f"{state.name}: {note}")  # a log has no bars

        run_all(configs, out, jobs, watch)
        return failed


def _run_suite(name: str, seeds: int | None, rollouts: int | None, out: Path, jobs: int, json_file: Path | None) -> None:
    from dataclasses import replace

    from v05.tasks import make_task
    from v05.train.config import run_config
    from v05.train.metrics import write_json
    from v05.train.policy import policy_folder
    from v05.train.suite import (
        ROWS,
        SUITES,
        Planned,
        append_row,
        counted_runs,
        in_order,
        read_rows,
        row_of,
        summarise,
        tuned_rates,
        tuning_runs,
    )
    from v05.train.suite_plots import draw_suite

    if name not in SUITES:
        raise ValueError(f"--suite {name} is unknown; choose one of {', '.join(SUITES)}")
    suite = SUITES[name] if rollouts is None else replace(SUITES[name], rollouts=rollouts)
    _set_threads(1)
    for mix in suite.mixes:
        first = run_config(mix, "grpo")
        with console.status(f"warm start of the policy for {mix} (kept for later runs)"):
            policy_folder(first.policy, first.task, make_task(first.task), console.out)

    in_order(suite, read_rows(out))  # a file of another suite is refused before anything runs

    def run(runs: list[Planned]) -> None:
        known = {row.key for row in read_rows(out)}
        missing = {run.name: run for run in runs if run.key not in known}
        console.out(f"{len(runs) - len(missing)} of {len(runs)} runs to {runs[0].stage} are in {out / ROWS}")

        def done(name: str) -> None:
            append_row(out, row_of(missing[name], out / name))
            shutil.rmtree(out / name / "policy", ignore_errors=True)  # hundreds of them

        failed = _run_watched({name: run.config for name, run in missing.items()}, out, jobs, done)
        if failed:
            told = "; ".join(f"{name}: {why}" for name, why in failed.items())
            raise RuntimeError(f"failed: {told}; the same command tries them again")

    run(tuning_runs(suite))
    rates = tuned_rates(suite, read_rows(out))
    run(counted_runs(suite, rates, seeds or suite.seeds))
    rows = in_order(suite, read_rows(out))
    records = summarise(rows)
    for file in filter(None, (out / "compare.json", json_file)):
        write_json(file, records)
    plots = draw_suite(rows, out)
    for table in _suite_tables(records):
        Console(width=None if sys.stdout.isatty() else 180).print(table)
    console.out(f"{len(plots)} plots, compare.json, {ROWS} and the runs are in {out}")


def _suite_tables(records: list[dict[str, Any]]) -> Iterator[Table]:
    """One for each mix."""
    from v05.train.suite import RIVALS, TARGET, difference

    for mix in dict.fromkeys(record["mix"] for record in records):
        group = [record for record in records if record["mix"] == mix]
        start = sum(record["accuracy_before"] for record in group) / len(group)
        table = Table(
            title=f"{mix}: held-out accuracy from {start:.3f}; up to {max(len(r['seeds']) for r in group)} seeds, 95 % intervals"
        )
        versus = [f"over {rival}'s best size" for rival in RIVALS]
        for column in (
            "method",
            "rate",
            "accuracy",
            *versus,
            f"rollouts to {TARGET}'s",
            "a prompt",
            "rejected",
            "baseline MSE",
            "entropy",
        ):
            table.add_column(column, justify="left" if column == "method" else "right")
        for r in group:
            table.add_row(
                r["label"],
                f"{r['learning_rate']:g}",
                f"{r['accuracy_after']:.3f} [{r['accuracy_low']:.3f}, {r['accuracy_high']:.3f}]",
                *(difference(r, f"over_{rival}") for rival in RIVALS),
                _rollouts(r["rollouts_to_grpo"]) if "rollouts_to_grpo" in r else "",
                f"{r['group_size']:.1f}",
                _known(r["prior_rejected"], ".2f"),
                _known(r["baseline_mse"], ".4f"),
                f"{r['entropy_after']:.3f}",
            )
        yield table


def _report(configs: dict[str, RunConfig], out: Path, json_file: Path | None) -> None:
    from v05.train.compare import Run, is_finished, load_run, summarise
    from v05.train.config import label_of
    from v05.train.metrics import write_json
    from v05.train.plots import draw_all

    runs = [load_run(label_of(config), out / name) for name, config in configs.items() if is_finished(config, out / name)]
    if not runs:
        return
    records = summarise(runs)
    for file in filter(None, (out / "compare.json", json_file)):
        write_json(file, records)
    by_label: dict[str, list[Run]] = defaultdict(list)
    for run in runs:
        by_label[run.label].append(run)
    plots = draw_all(by_label, out)
    Console(width=None if sys.stdout.isatty() else 180).print(_table([r for r in records if r["record"] == "method"]))
    console.out(f"{len(plots)} plots, compare.json and the runs are in {out}")


def _table(methods: list[dict[str, Any]]) -> Table:
    from v05.methods import REFERENCE

    start = sum(m["accuracy_before"] for m in methods) / len(methods)
    table = Table(
        title=f"held-out accuracy from {start:.3f} at equal training rollouts; "
        f"up to {max(len(m['seeds']) for m in methods)} seeds, 95 % intervals"
    )
    reference = next((m["label"] for m in methods if m["method"] == REFERENCE.name), None)
    versus = [] if reference is None else [f"gain over {reference}", f"rollouts to {reference}'s final"]
    columns = ["method", "accuracy", *versus, "rollouts", "baseline MSE", "gradient norm", "entropy", "a prompt", "seconds"]
    for column in columns:
        table.add_column(column, justify="left" if column == "method" else "right", no_wrap=True)
    for m in methods:
        gain = f"{m['gain']:+.3f} [{m['gain_low']:+.3f}, {m['gain_high']:+.3f}]" if "gain" in m else ""
        reached, low, high = (_rollouts(m[f"rollouts_to_baseline{end}"]) for end in ("", "_low", "_high"))
        table.add_row(
            m["label"],
            f"{m['accuracy_after']:.3f} [{m['accuracy_low']:.3f}, {m['accuracy_high']:.3f}]",
            *([gain, f"{reached} [{low}, {high}]"] if versus else []),
            f"{m['rollouts']:,.0f}",
            _known(m["baseline_mse"], ".4f"),
            f"{m['grad_norm']:.3f} ± {m['grad_norm_std']:.3f}",
            f"{m['entropy_after']:.3f}",
            f"{m['group_size']:.1f}",
            f"{m['seconds']:.0f}",
        )
    return table


def _known(value: float, form: str) -> str:
    """Nothing for NaN, where a method has no such figure."""
    return "" if isnan(value) else f"{value:{form}}"


def _rollouts(count: float | None) -> str:
    return "never" if count is None else f"{count:,.0f}"


def _overrides(rollouts: int | None, learning_rate: float | None) -> dict[str, Any]:
    overrides: dict[str, Any] = {}
    if rollouts is not None:
        overrides["total_rollouts"] = rollouts
    if learning_rate is not None:
        overrides["optimizer"] = {"learning_rate": learning_rate}
    return overrides


def _progress() -> Progress:
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[note]}"),
        console=console,
        disable=_rank() > 0,
    )


def _rank() -> int:
    """This process's number under torchrun; 0 without it."""
    return int(os.environ.get("RANK", "0"))


def _say(line: str) -> None:
    """Print once for all ranks."""
    if _rank() == 0:
        console.out(line)


def _set_threads(count: int) -> None:
    import torch

    torch.set_num_threads(count)


def _fail(error: Exception) -> NoReturn:
    from pydantic import ValidationError

    text = explained_places(error) if isinstance(error, ValidationError) else str(error)
    console.out(f"v05: {text}", style="red", highlight=False)
    raise typer.Exit(2)


def _read_config(path: Path) -> RunConfig:
    """The configuration in a file; ValueError names the file."""
    from pydantic import ValidationError

    from v05.files import read_object
    from v05.train.config import RunConfig

    try:
        return RunConfig.model_validate(read_object(path))
    except ValidationError as error:
        raise ValueError(f"--config {path}: {explained_places(error)}") from None


@contextmanager
def _no_exit() -> Iterator[None]:
    """Whatever runs within may not end the command as if it had succeeded: a task's or a policy's code may call exit()."""
    try:
        yield
    except SystemExit as end:
        raise RuntimeError(f"exit({end.code!r}) was called before there was a result; something that the run calls did it") from end


def _demand(result: Path) -> None:
    """The command is about to end with status 0."""
    if not result.is_file():
        raise RuntimeError(f"the run ended without {result}; call it again")


def _interrupted(out: Path) -> NoReturn:
    console.out(f"interrupted; what was measured so far is in {out}, and the same command goes on from there")
    raise typer.Exit(INTERRUPTED)


def main() -> None:
    """Entry point of the command `v05`."""
    try:
        app()
    except SystemExit as end:  # which typer makes of every end but that of a bug
        if (distributed := sys.modules.get("v05.train.distributed")) is not None:  # only a run joins a job, and imports it
            distributed.leave_world(end.code if isinstance(end.code, int) else int(end.code is not None))
        raise
