"""`v05 simulate`: recorded outcomes replayed under each method and budget."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from v05.cli.shared import INTERRUPTED, console, demand_input, fail, output, progress_bars

if TYPE_CHECKING:
    import numpy as np
    from rich.progress import Progress

    from v05.simulate.outcomes import Outcomes


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
    output().print(table(records, initial, maximum))
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
