"""`v05 train`: one policy, one method."""

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
        Path, typer.Option(help="Run directory: config.json, metrics.jsonl, outcomes/, tensorboard/, result.json, policy/.")
    ],
    preset: Preset = "tiny",
    method: Annotated[
        str,
        typer.Option(
            help="optimal, calibrated, v05, prior, none, batch, batch_energy, grpo, dr_grpo, dapo, rloo, maxrl, opo, otb, js or "
            "ebpo (docs/methods.md says when each one wins); v05@4 fixes the group size, v05@4..16 tests up to 16, "
            "v05@4..16~6 spends 6 on average where they gain most; +PRIOR and +cost=0.01 may follow."
        ),
    ] = "v05",
    seed: Annotated[int, typer.Option(min=0)] = 0,
    rollouts: Rollouts = None,
    learning_rate: LearningRate = None,
    jsonl: Annotated[
        Path | None, typer.Option(help='Prompts instead of the preset\'s: a {"prompt": ..., "answer": ...} object a line.')
    ] = None,
    policy: Policy = None,
    max_new_tokens: MaxNewTokens = None,
    chat: Annotated[
        bool, typer.Option("--chat", help="Put prompts into the policy's chat template, as an instruct model expects them.")
    ] = False,
    engine: Annotated[
        str | None, typer.Option(help="What samples rollouts: transformers (in this process), vllm, vllm_server or ray.")
    ] = None,
    prior: Annotated[
        str,
        typer.Option(
            help="Learnt in the run: history; mean, of all outcomes; spo, each prompt's own past; the generalist value model, "
            "inferring in context: v0. For comparison: constant; noise; oracle, the policy's own chance of the reference answer."
        ),
    ] = "history",
    config: Annotated[
        Path | None,
        typer.Option(help="Run exactly this config.json; leave the other options of a run out, except --set."),
    ] = None,
    settings: Settings = None,
    distributed: Annotated[str, typer.Option(help="Under torchrun: ddp replicates the policy, fsdp2 shards it.")] = "ddp",
    wandb: Annotated[str | None, typer.Option(help="Show the figures in this project of Weights & Biases, too.")] = None,
    threads: Threads = 1,
) -> None:
    """Train one policy with one method. A run that was interrupted goes on where it stopped when called again.

    The first run on a preset warm-starts its policy by supervised training (some minutes for tiny) and keeps it in
    $V05_CACHE or ~/.cache/v05. Under torchrun several processes train the one policy. `v05 report` draws the run, also while it
    lasts; tensorboard --logdir shows its figures.

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
            raise ValueError(f"--config is complete, so {', '.join(beside)} cannot be set beside it; edit the file, or use --set")
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
        console.out("interrupted before the first step; a warm start begins anew when the command is called again")
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
    say(f"held-out accuracy {state.accuracy:.3f}{greedy} after {state.rollouts} rollouts; written to {out}")


def _demand(result: Path) -> None:
    """The command is about to end with status 0."""
    if not result.is_file():
        raise RuntimeError(f"the run ended without {result}; call it again")
