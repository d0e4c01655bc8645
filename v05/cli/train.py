"""`v05 train`: train one policy with one method."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from v05.cli.shared import (
    INTERRUPTED,
    LearningRate,
    MaxNewTokens,
    Policy,
    Preset,
    Rollouts,
    Settings,
    Threads,
    console,
    demand_input,
    demand_task,
    fail,
    interrupted,
    no_exit,
    on_command_line,
    overrides_of,
    rank,
    say,
    set_threads,
)


def train(
    context: typer.Context,
    out: Annotated[
        Path,
        typer.Option(
            help="Run directory to write: config.json, metrics.jsonl, outcomes/, tensorboard/, result.json and the trained policy/."
        ),
    ],
    preset: Preset = "tiny",
    method: Annotated[
        str,
        typer.Option(
            help="How advantages are computed: optimal, calibrated, v05, prior, none, batch, batch_energy, grpo, dr_grpo, dapo, "
            "rloo, maxrl, opo, otb, js or ebpo; docs/methods.md says when each one wins. The name alone takes the settings of "
            "the method's paper. v05@4 samples 4 rollouts per prompt; v05@4..16 samples 4, then more up to 16 while its test "
            "asks for them; v05@4..16~6 spends 6 per prompt on average, where they gain most. +PRIOR (a name that --prior "
            "lists) and +cost=0.01 (the test's price of one rollout; higher samples fewer) may follow."
        ),
    ] = "v05",
    seed: Annotated[int, typer.Option(help="Seed of the order of prompts, of sampling and of new LoRA weights.", min=0)] = 0,
    rollouts: Rollouts = None,
    learning_rate: LearningRate = None,
    jsonl: Annotated[
        Path | None,
        typer.Option(
            help='Train on your own prompts: a file with one {"prompt": ..., "answer": ...} object per line. A tenth of the '
            "prompts is held out. Check the file first with v05 check-task."
        ),
    ] = None,
    policy: Policy = None,
    max_new_tokens: MaxNewTokens = None,
    chat: Annotated[
        bool,
        typer.Option(
            "--chat",
            help="Send each prompt as a user's message in the chat template of the policy's tokenizer. Use it for instruct models; "
            "without it the policy reads the prompt as it is.",
        ),
    ] = False,
    engine: Annotated[
        str | None,
        typer.Option(
            help="The engine that samples rollouts: transformers (default; in this process, shares the trainer's weights), vllm "
            "(in this process, fast on a GPU), vllm_server (a running server; --set engine.url) or ray (actors on a cluster; "
            "--set engine.actors)."
        ),
    ] = None,
    prior: Annotated[
        str,
        typer.Option(
            help="Where a prompt's success rate is predicted from before it is sampled. history: the run's rollouts, of the prompt "
            "and of prompts that read alike (the default; right for most runs). mean: one rate for all prompts. spo: the "
            "prompt's own past only, for a small file that is read many times. v0: the generalist value model. For comparison "
            "only: constant, noise (random), oracle (the policy's true chance of the reference answer)."
        ),
    ] = "history",
    config: Annotated[
        Path | None,
        typer.Option(
            help="Run exactly this config.json of another run. Only --out, --set, --wandb and --threads may be given beside it."
        ),
    ] = None,
    settings: Settings = None,
    distributed: Annotated[
        str,
        typer.Option(
            help="How torchrun's processes share the policy. ddp: each has a copy (faster). fsdp2: each has a part, for one that "
            "does not fit."
        ),
    ] = "ddp",
    wandb: Annotated[str | None, typer.Option(help="Also log the metrics to this project of Weights & Biases.")] = None,
    threads: Threads = 1,
) -> None:
    """Train one policy with one method. Call the same command again to resume an interrupted run.

    The first run on a preset warm-starts its policy by supervised training (a few minutes for tiny) and keeps the result in
    $V05_CACHE or ~/.cache/v05 for later runs. Under torchrun, several processes train one policy together. Watch the metrics with
    `v05 report` or tensorboard --logdir, also while the run is going.

    Example: v05 train --preset tiny --method v05 --seed 0 --set loss.clip_high=0.28 --out runs/one
    """
    from v05.train.config import read_config
    from v05.train.metrics import RESULT, refuse_to_overwrite
    from v05.train.presets import label_of, run_config

    try:
        overrides = overrides_of(context, rollouts, learning_rate, policy, max_new_tokens)
        if distributed != "ddp":
            overrides["distributed"] = distributed
        if jsonl is not None:
            overrides["task"] = {"kind": "jsonl", "path": jsonl}
        if chat:
            overrides["chat"] = True
        if engine is not None:
            overrides["engine"] = {"kind": engine}
        given = on_command_line(context)
        if "prior" in given:
            overrides["prior"] = prior
        beside = sorted(given - {"out", "config", "settings", "wandb", "threads"})
        if config is not None and beside:
            raise ValueError(f"--config is complete, so {', '.join(beside)} cannot be set beside it; edit the file or use --set")
        if config is None:
            run = run_config(preset, method, settings or (), seed=seed, **overrides)
        else:
            demand_input("--config", config, "the config.json of a run, which is in the run's directory")
            run = read_config(config, settings or ())
        demand_task(run, "task.path" if jsonl is None else "--jsonl")
        refuse_to_overwrite(run, out)
        set_threads(threads)
        from v05.train.live import LiveView
        from v05.train.sinks import Sink, TensorBoard, WeightsAndBiases
        from v05.train.trainer import Trainer

        sinks: list[Sink] = [TensorBoard(out)]
        if wandb is not None:
            sinks.append(WeightsAndBiases(out, wandb, run))
        with no_exit():
            trainer = Trainer(run, out, say, sinks)
    except KeyboardInterrupt:
        console.out("interrupted before the first step; an unfinished warm start begins again when you call the command again")
        raise typer.Exit(INTERRUPTED) from None
    except (ValueError, OSError, RuntimeError, ImportError) as error:
        fail(error)
    try:
        with no_exit(), LiveView(f"{label_of(run)}, seed {run.seed}", Console(stderr=True, quiet=rank() > 0)) as view:
            for state in trainer.run():
                view.show(state)
        if rank() == 0:
            _demand(out / RESULT)
    except KeyboardInterrupt:
        interrupted(out)
    except (ValueError, OSError, RuntimeError) as error:
        fail(error)
    greedy = f", {trainer.state.final['greedy']:.3f} greedily," if trainer.state.final else ""
    short = f" (another step would have ended further from {state.total})" if state.rollouts < state.total else ""
    say(f"held-out accuracy {state.accuracy:.3f}{greedy} after {state.rollouts} rollouts{short}; written to {out}")


def _demand(result: Path) -> None:
    """Raise RuntimeError if the run has written no result: the command must not end with status 0 then."""
    if not result.is_file():
        raise RuntimeError(f"the run ended without {result}; call the same command again to resume it")
