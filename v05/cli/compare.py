"""`v05 compare`: train several methods from one warm start, or run a suite of comparisons."""

from __future__ import annotations

import os
import shutil
from collections import defaultdict
from collections.abc import Callable, Iterator
from math import isnan
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table

from v05.cli.shared import (
    LearningRate,
    MaxNewTokens,
    Policy,
    Preset,
    Rollouts,
    Settings,
    console,
    demand_task,
    fail,
    interrupted,
    no_exit,
    overrides_of,
    print_table,
    progress_bars,
    set_threads,
)
from v05.machine import usable_cores

if TYPE_CHECKING:
    from v05.train.config import RunConfig

DEFAULT_METHODS = "grpo,dr_grpo,v05,calibrated,none,optimal"
MOST_BARS = 24  # with more runs than this, only those under way have a progress bar


def compare(
    context: typer.Context,
    preset: Preset = "tiny",
    methods: Annotated[
        str,
        typer.Option(
            help="Methods to compare, separated by commas. grpo@8 samples 8 rollouts per prompt, v05@4..16 samples 4 and up to 16 "
            "by its test, v05@4..16~6 spends 6 on average; +PRIOR and +cost=0.01 may follow (v05 train --help, --method)."
        ),
    ] = DEFAULT_METHODS,
    suite: Annotated[
        str | None,
        typer.Option(
            help="Run a whole experiment in place of --preset: headline (every method at several group sizes on three task mixes, "
            "with tuned learning rates; takes hours, and trained policies are not kept) or smoke (a quick test). --methods "
            "then selects a part of it."
        ),
    ] = None,
    seeds: Annotated[
        int | None,
        typer.Option(help="Seeds per method. Default: 3, or the suite's own number. More seeds narrow the intervals.", min=1),
    ] = None,
    rollouts: Rollouts = None,
    learning_rate: LearningRate = None,
    policy: Policy = None,
    max_new_tokens: MaxNewTokens = None,
    settings: Settings = None,
    out: Annotated[Path, typer.Option(help="Directory of the comparison. Finished runs in it are not run again.")] = Path(
        "runs/compare"
    ),
    jobs: Annotated[
        int, typer.Option(help="Runs at the same time, one thread each; 0 is one per CPU core. Lower it if memory runs out.", min=0)
    ] = 0,
    json: Annotated[Path | None, typer.Option(help="Also write the records of compare.json to this file.")] = None,
) -> None:
    """Train several methods from one warm start, on the same prompts and with the same number of rollouts, and compare them.

    Prints a table and writes plots (PNG) and compare.json to --out. Call the same command again to resume an interrupted
    comparison. A suite also writes one row per run to runs.csv, from which its tables and plots are made.

    Example: v05 compare --preset tiny --methods grpo,v05@4,v05@4..16 --seeds 5 --out runs/mine
    """
    from v05.tasks import make_task
    from v05.train.presets import label_of, run_config

    try:
        if os.environ.get("WORLD_SIZE", "1") != "1":
            raise ValueError("v05 compare starts a process for each run itself; call it without torchrun")
        out.mkdir(parents=True, exist_ok=True)
        if suite is not None:
            if (preset, learning_rate, policy, max_new_tokens) != ("tiny", None, None, None):
                raise ValueError(f"--suite {suite} is complete, so --preset, --learning-rate and --policy cannot be set beside it")
            if settings:
                raise ValueError(f"--suite {suite} is complete, so --set {settings[0]} cannot be set beside it; leave --set out")
            with no_exit():
                specs = None if methods == DEFAULT_METHODS else [spec.strip() for spec in methods.split(",")]
                _run_suite(suite, specs, seeds, rollouts, out, jobs or usable_cores(), json)
            return
        for setting in settings or ():
            if setting.partition("=")[0] in ("method", "seed"):
                raise ValueError(f"--set {setting}: a comparison chooses methods and seeds itself; use --methods and --seeds")
        specs = [spec.strip() for spec in methods.split(",")]
        overrides = overrides_of(context, rollouts, learning_rate, policy, max_new_tokens)
        configs = {
            f"{label_of(run)}-seed{seed}": run
            for seed in range(seeds or 3)  # seed by seed, so that an early stop has compared all methods on some seeds
            for spec in specs
            for run in [run_config(preset, spec, settings or (), seed=seed, **overrides)]
        }
        if len(configs) < len(specs) * (seeds or 3):
            labels = ", ".join(dict.fromkeys(label_of(run) for run in configs.values()))
            raise ValueError(f"--methods {methods} names a method twice: in full, the methods are {labels}; name each once")
    except KeyboardInterrupt:
        interrupted(out)
    except (ValueError, OSError, RuntimeError) as error:
        fail(error)
    set_threads(1)
    from v05.files import require_model
    from v05.train.checkpoint import find_checkpoints
    from v05.train.compare import is_finished
    from v05.train.policy import policy_folder

    first = next(iter(configs.values()))
    started = [name for name, config in configs.items() if not is_finished(config, out / name) and find_checkpoints(out / name)]
    if started:
        console.out(f"resuming interrupted runs: {', '.join(started)}")
    try:
        demand_task(first)
        if first.policy.path is not None:
            require_model("policy.path", first.policy.path)
        with no_exit():
            with console.status("warm-starting the policy (kept for later runs)"):
                policy_folder(first.policy, first.task, make_task(first.task), console.out)
            failed = _run_watched(configs, out, jobs or usable_cores())
            _report({name: config for name, config in configs.items() if name not in failed}, out, json)
    except KeyboardInterrupt:
        interrupted(out)
    except (ValueError, OSError, RuntimeError) as error:
        fail(error)
    for name, why in failed.items():
        console.out(f"failed: {name}: {why}", style="red", highlight=False)
    if failed:
        raise typer.Exit(1)


def _run_watched(
    configs: dict[str, RunConfig], out: Path, jobs: int, done: Callable[[str], None] = lambda name: None
) -> dict[str, str]:
    """Run `configs` (name -> run) in `out`/name, `jobs` at a time, with progress bars.

    `done` is called once with the name of each run that succeeds. Returns the names of the failed runs, each with the reason and
    the remedy.
    """
    from v05.train.compare import RunStatus, run_all

    many = len(configs) > MOST_BARS
    with progress_bars() as progress:
        whole = progress.add_task("runs", total=len(configs), note="", visible=many)
        bars = {
            name: progress.add_task(name, total=config.total_rollouts, note="waiting", start=False, visible=not many)
            for name, config in configs.items()
        }
        ended: set[str] = set()
        failed: dict[str, str] = {}

        def watch(states: list[RunStatus]) -> None:
            for state in states:
                if state.name in ended:
                    continue
                note = state.status if state.accuracy is None else f"{state.status}, held-out accuracy {state.accuracy:.3f}"
                running = state.status == "running"
                if running:
                    progress.start_task(bars[state.name])
                # The last step may end half a step before or after the total.
                reached = state.total if state.status == "done" else state.rollouts
                progress.update(bars[state.name], completed=reached, note=note, visible=running or not many)
                if state.status in ("done", "failed", "damaged"):
                    ended.add(state.name)
                    if state.status != "done":
                        failed[state.name] = state.why
                    progress.update(whole, completed=len(ended))
                    if state.status == "done":
                        done(state.name)
                    if not console.is_terminal:
                        console.out(f"{state.name}: {note}")  # a log file shows no bars

        run_all(configs, out, jobs, watch)
        return failed


def _run_suite(
    name: str, specs: list[str] | None, seeds: int | None, rollouts: int | None, out: Path, jobs: int, json_file: Path | None
) -> None:
    from dataclasses import replace

    from v05.arguments import unknown
    from v05.tasks import make_task
    from v05.train.metrics import write_json
    from v05.train.policy import policy_folder
    from v05.train.presets import run_config
    from v05.train.suite import SUITES, Planned, counted_runs, tuning_runs
    from v05.train.suite_plots import draw_suite
    from v05.train.suite_rows import ROWS, append_row, in_order, read_rows, row_of
    from v05.train.suite_summary import summarise, tuned_rates

    if name not in SUITES:
        raise ValueError(unknown(f"--suite {name}", name, SUITES))
    suite = SUITES[name] if rollouts is None else replace(SUITES[name], rollouts=rollouts)
    whole, suite = suite, suite if specs is None else suite.only(specs)
    set_threads(1)
    for mix in suite.mixes:
        first = run_config(mix, "grpo")
        with console.status(f"warm-starting the policy for {mix} (kept for later runs)"):
            policy_folder(first.policy, first.task, make_task(first.task), console.out)

    in_order(whole, read_rows(out))  # refuses the file of another suite before anything runs

    def run(runs: list[Planned]) -> None:
        known = {row.key for row in read_rows(out)}
        missing = {run.name: run for run in runs if run.key not in known}
        console.out(f"{len(runs) - len(missing)} of {len(runs)} runs of the stage {runs[0].stage} are already in {out / ROWS}")

        def done(name: str) -> None:
            append_row(out, row_of(missing[name], out / name))
            shutil.rmtree(out / name / "policy", ignore_errors=True)  # a suite has hundreds of runs

        failed = _run_watched({name: run.config for name, run in missing.items()}, out, jobs, done)
        if failed:
            told = "; ".join(f"{name}: {why}" for name, why in failed.items())
            raise RuntimeError(f"failed: {told}; call the same command again to retry")

    run(tuning_runs(suite))
    rates = tuned_rates(suite, read_rows(out))
    run(counted_runs(suite, rates, seeds or suite.seeds))
    rows = in_order(whole, read_rows(out))
    records = summarise(rows)
    for file in filter(None, (out / "compare.json", json_file)):
        write_json(file, records)
    plots = draw_suite(rows, out)
    for table in _suite_tables(records):
        print_table(table)
    console.out(f"{len(plots)} plots, compare.json, {ROWS} and the runs are in {out}")


def _seeds(records: list[dict[str, Any]]) -> str:
    """How many seeds the records of a table have at most."""
    most = max(len(record["seeds"]) for record in records)
    return "1 seed" if most == 1 else f"up to {most} seeds"


def _suite_tables(records: list[dict[str, Any]]) -> Iterator[Table]:
    """One table for each task mix."""
    from v05.train.suite import RIVALS
    from v05.train.suite_summary import TARGET, difference

    for mix in dict.fromkeys(record["mix"] for record in records):
        group = [record for record in records if record["mix"] == mix]
        start = sum(record["accuracy_before"] for record in group) / len(group)
        table = Table(title=f"{mix}: held-out accuracy from {start:.3f}; {_seeds(group)}, 95 % intervals")
        versus = [f"over {rival}'s best size" for rival in RIVALS]
        for column in (
            "method",
            "rate",
            "accuracy",
            "greedy",
            "pass@k",
            *versus,
            f"rollouts to {TARGET}'s",
            "group size",
            "rejected",
            "baseline MSE",
            "entropy",
        ):
            table.add_column(column, justify="left" if column == "method" else "right", no_wrap=True)
        for r in group:
            table.add_row(
                r["label"],
                f"{r['learning_rate']:g}",
                f"{r['accuracy_after']:.3f} [{r['accuracy_low']:.3f}, {r['accuracy_high']:.3f}]",
                _known(r["greedy"], ".3f"),
                _known(r["pass_at_k"], ".3f"),
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
    from v05.train.metrics import write_json
    from v05.train.plots import draw_all
    from v05.train.presets import label_of

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
    print_table(_table([r for r in records if r["record"] == "method"]))
    console.out(f"{len(plots)} plots, compare.json and the runs are in {out}")


def _table(methods: list[dict[str, Any]]) -> Table:
    from v05.methods import REFERENCE

    start = sum(m["accuracy_before"] for m in methods) / len(methods)
    table = Table(title=f"held-out accuracy from {start:.3f} at equal training rollouts; {_seeds(methods)}, 95 % intervals")
    reference = next((m["label"] for m in methods if m["method"] == REFERENCE.name), None)
    versus = [] if reference is None else [f"gain over {reference}", f"rollouts to {reference}'s final"]
    columns = ["method", "accuracy", *versus, "greedy", "pass@k", "rollouts", "baseline MSE", "gradient norm"]
    columns += ["entropy", "group size", "seconds"]
    for column in columns:
        table.add_column(column, justify="left" if column == "method" else "right", no_wrap=True)
    for m in methods:
        gain = f"{m['gain']:+.3f} [{m['gain_low']:+.3f}, {m['gain_high']:+.3f}]" if "gain" in m else ""
        reached, low, high = (_rollouts(m[f"rollouts_to_baseline{end}"]) for end in ("", "_low", "_high"))
        table.add_row(
            m["label"],
            f"{m['accuracy_after']:.3f} [{m['accuracy_low']:.3f}, {m['accuracy_high']:.3f}]",
            *([gain, f"{reached} [{low}, {high}]" if len(m["seeds"]) > 1 else reached] if versus else []),
            _known(m["greedy"], ".3f"),
            _known(m["pass_at_k"], ".3f"),
            f"{m['rollouts']:,.0f}",
            _known(m["baseline_mse"], ".4f"),
            f"{m['grad_norm']:.3f} ± {m['grad_norm_std']:.3f}",
            f"{m['entropy_after']:.3f}",
            f"{m['group_size']:.1f}",
            f"{m['seconds']:.0f}",
        )
    return table


def _known(value: float, form: str) -> str:
    """The value as text; empty for NaN, which marks a figure that a method does not have."""
    return "" if isnan(value) else f"{value:{form}}"


def _rollouts(count: float | None) -> str:
    return "never" if count is None else f"{count:,.0f}"
