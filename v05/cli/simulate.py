"""`v05 simulate`: replay recorded outcomes under each method and budget."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from v05.cli.shared import INTERRUPTED, console, demand_input, fail, output, print_table, progress_bars

if TYPE_CHECKING:
    import numpy as np
    from rich.progress import Progress

    from v05.simulate.outcomes import Outcomes


def simulate(
    outcomes: Annotated[
        Path,
        typer.Argument(
            metavar="OUTCOMES",
            help="A log of rollouts or a folder of logs: of v05 train, v05 eval, verl, TRL, prime-rl or SkyRL, or your own as CSV "
            "or JSON lines.",
        ),
    ],
    prior: Annotated[
        str,
        typer.Option(
            help="Where the simulated prior comes from. irt: an item-response model (one-parameter logistic) fitted to other parts "
            "of the log. A number: the true rate with normal noise of that standard deviation on its logit. Else: the column "
            "of the file with your own predicted success rates."
        ),
    ] = "irt",
    reward: Annotated[
        str | None,
        typer.Option(
            help="Column with the reward, if the log has several or an unusual name; for prime-rl logs, the name of a reward."
        ),
    ] = None,
    success_above: Annotated[
        float | None, typer.Option(help="Rewards above this are successes. Needed unless the rewards are 0 and 1, or -1 and 1.")
    ] = None,
    replay: Annotated[
        str,
        typer.Option(
            help="How rewards are drawn. superpopulation: fresh draws from success rates that explain the recorded outcomes; works "
            "with few trials. finite: only the recorded trials; assumes nothing, but needs --maximum of them per prompt."
        ),
    ] = "superpopulation",
    initial: Annotated[
        int, typer.Option(help="Rollouts of each prompt before its first test. 4 is the paper's number.", min=1)
    ] = 4,
    maximum: Annotated[
        int | None,
        typer.Option(help="Most rollouts of a prompt. Default: 16; with --replay finite, the most trials if fewer.", min=1),
    ] = None,
    cost: Annotated[
        float | None,
        typer.Option(
            help="Price of one rollout in the test of v05+osla, in squared error (rewards scaled to -1 and 1). Lower it to sample "
            "more. Default: 1 / maximum^2.",
            min=0.0,
        ),
    ] = None,
    seed: Annotated[int, typer.Option(help="Seed of the replay and of the prior.", min=0)] = 0,
    plot: Annotated[Path, typer.Option(help="PNG file for the plot of error over mean rollouts.")] = Path("runs/simulate.png"),
    json: Annotated[Path | None, typer.Option(help="Also write one record per method and budget to this file.")] = None,
) -> None:
    """Estimate what adaptive rollout budgets would save on your logs, by replaying recorded outcomes under each method and budget.

    Measures how far each baseline is from the true success rate, and how many rollouts per prompt each method needs to match the
    error of GRPO at 16 rollouts (or at --maximum, if lower). The rollouts of one prompt at one step are a group. The kind of a log
    is recognised by its columns:

    Example, a CSV file with model, question, successes and trials: v05 simulate outcomes.csv --initial 4 --json simulate.json

    Example, runs of v05 train or v05 eval: v05 simulate runs/eval

    Example, verl with trainer.rollout_data_dir=rollouts: v05 simulate rollouts

    Example, TRL with log_completions (needs pyarrow): v05 simulate output_dir/completions --reward accuracy_reward

    Example, prime-rl: v05 simulate outputs/rollouts --success-above 0.5

    Example, your own JSON lines with prompt, reward and, from training, step: v05 simulate mine.jsonl
    """
    from dataclasses import asdict

    import numpy as np

    from v05.arguments import choice
    from v05.simulate.plot import draw
    from v05.simulate.replay import MEASURED, REFERENCE, REPLAYS, WARM_UP, Replay, Source
    from v05.simulate.summary import conclusion, table, what_was_read
    from v05.train.metrics import write_json

    try:
        demand_input("OUTCOMES", outcomes, "a log of rollouts or a folder of logs, as v05 simulate --help lists them", folder=True)
        choice("replay", replay, REPLAYS)
        noise = _number(prior)
        column = None if prior == "irt" or noise is not None else prior
        with progress_bars() as progress:
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
        fail(error)
    print_table(table(records, initial, maximum))
    for sentence in what_was_read(read, prior):
        console.out(sentence)
    console.out(f"{source.cells} cells of {len(read)} replayed; plot in {plot}")
    output().print(conclusion(records, initial, maximum), highlight=False)


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
