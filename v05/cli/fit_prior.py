"""`v05 fit-prior`: fit the value model V0 to logs and measure how well it predicts."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table

from v05.cli.shared import INTERRUPTED, console, demand_input, fail, print_table, say, set_threads, watched
from v05.machine import cache_root

READ_AT_ONCE = 128  # prompts per block


def fit_prior(
    logs: Annotated[
        list[Path],
        typer.Argument(
            metavar="LOGS...",
            help="JSON-lines files with the fields policy (model@step), prompt, score (mean reward in [-1, 1]) and trials, such as "
            "RUN/outcomes/*.jsonl of v05 train.",
        ),
    ],
    adapter: Annotated[
        Path | None,
        typer.Option(
            help="Also train a residual query adapter on the logs and write it to this safetensors file, for --set v0.adapter in "
            "v05 train."
        ),
    ] = None,
    steps: Annotated[int, typer.Option(help="Training updates of the adapter.", min=1)] = 300,
    backbone: Annotated[
        Path | None,
        typer.Option(
            help="Hugging Face model folder whose features of prompts are used. Default: the sentence model of the extra 'value'."
        ),
    ] = None,
    tabpfn: Annotated[
        Path | None, typer.Option(help="Predict with TabPFN from this checkpoint file, in place of the embedded head.")
    ] = None,
    context: Annotated[
        int,
        typer.Option(
            help="Most logged rows that a prediction may infer from; fewer are faster and less accurate.", min=2, max=1024
        ),
    ] = 1024,
    seed: Annotated[int, typer.Option(help="Seed of the adapter's training and of the bootstrap.", min=0)] = 0,
    threads: Annotated[int, typer.Option(help="CPU threads of torch.", min=1)] = 1,
    json: Annotated[Path | None, typer.Option(help="Also write the records, unrounded, to this file.")] = None,
) -> None:
    """Fit the value model V0 to the logged outcomes of policies, and measure how well it predicts success rates.

    V0 predicts each checkpoint's test prompts from its context prompts and from earlier checkpoints. It is compared with the
    policy's mean, nearest neighbours and logistic regression on the same context, separately for new prompts and for prompts seen
    under earlier checkpoints. Features of prompts are cached in $V05_CACHE or ~/.cache/v05. Nothing is downloaded.

    Example: v05 fit-prior runs/one/outcomes/*.jsonl --backbone runs/one/policy --json scores.json
    """
    set_threads(threads)
    try:
        for log in logs:
            demand_input("LOGS", log, "JSON-lines files with policy, prompt, score and trials, such as those in a run's outcomes/")
        if tabpfn is not None:
            demand_input("--tabpfn", tabpfn, "the checkpoint file of a TabPFN classifier; nothing is downloaded")
        if backbone is not None:
            demand_input("--backbone", backbone, "the folder of a Hugging Face model; nothing is downloaded", folder=True)
        from v05.prior.v0 import V0Prior
        from v05.prior.v0.adapter import AdaptedBackbone, load_adapter
        from v05.prior.v0.backbone import Backbone
        from v05.prior.v0.head import Head, load_head
        from v05.prior.v0.logs import read_logs, walk
        from v05.prior.v0.predictors import score_predictors
        from v05.prior.v0.train import train_adapter
        from v05.train.metrics import write_json

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
            # Fills the cache, so that an interruption loses at most this block.
            reader.features(prompts[start : start + READ_AT_ONCE])
        if adapter is not None:
            trained = train_adapter(reader, load_head(), tasks, adapter, steps=steps, seed=seed, track=watched)
            say("adapter: validation loss {before:.4f} without, {after:.4f} with the best".format(**trained))
            if trained["kept"]:
                prior = V0Prior(AdaptedBackbone(reader, load_adapter(adapter, reader)), head)
            else:
                say("adapter: not used, because it is no better than the backbone's own features")
        records = score_predictors(prior, tasks, watched, seed)
        if not records:
            raise ValueError("no checkpoint has both test prompts and a context; give logs with more prompts per checkpoint")
        if json is not None:
            write_json(json, records)
    except KeyboardInterrupt:
        console.out("interrupted; the same command resumes from the features in the cache")
        raise typer.Exit(INTERRUPTED) from None
    except (ValueError, OSError, ImportError) as error:
        fail(error)
    if longer := reader.longer_than_limit(prompts):
        say(f"{longer} of {len(prompts)} prompts are longer than the backbone's {reader.limit} tokens, and were cut off there")
    print_table(_prior_table(records))


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
