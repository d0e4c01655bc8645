"""The replay draws the rollouts and spends the budgets that it names. Its errors are those computed by hand."""

import json

import numpy as np
import pytest
from typer.testing import CliRunner

from v05.cli import app
from v05.simulate import replay as module
from v05.simulate.outcomes import Outcomes
from v05.simulate.replay import Record, Replay, Source, rollouts_needed


@pytest.fixture(autouse=True)
def _short(monkeypatch):
    monkeypatch.setattr(module, "STEP", 256)
    monkeypatch.setattr(module, "WARM_UP", 1)
    monkeypatch.setattr(module, "MEASURED", 4)


def outcomes(successes, trials, priors=None):
    cells = np.arange(len(successes))
    priors = None if priors is None else np.asarray(priors, dtype=float)
    return Outcomes(cells, cells, np.asarray(successes, dtype=float), np.asarray(trials, dtype=float), priors)


def spread(cells=300, seed=0):
    """Outcomes with success rates of all sizes, and a prior that is half the success rate and half noise."""
    rng = np.random.default_rng(seed)
    rates = rng.beta(0.5, 0.5, cells)
    return outcomes(rng.binomial(10, rates), np.full(cells, 10), np.clip(0.5 * rates + 0.5 * rng.random(cells), 0, 1))


def replayed(source, initial=4, maximum=6, cost=None, steps=5):
    simulation = Replay(source.draw, initial, maximum, cost)
    for _ in range(steps):
        simulation.step()
    return simulation.records


def test_superpopulation_draws_bernoulli_rewards_from_rates_near_the_outcomes():
    source = Source(outcomes([0, 5, 10] * 20, [10] * 60), 0.5, "superpopulation", 8, np.random.default_rng(0))
    groups = source.draw(6000)
    assert groups.rewards.shape == (6000, 8)
    assert set(np.unique(groups.rewards)) == {0.0, 1.0}
    assert groups.rewards.mean(axis=1) - groups.rates == pytest.approx(np.zeros(6000), abs=0.75)
    assert np.mean(groups.rewards - groups.rates[:, None]) == pytest.approx(0.0, abs=0.01)
    assert np.mean((groups.rates > 0.2) & (groups.rates < 0.8)) == pytest.approx(1 / 3, abs=0.05)


def test_finite_draws_the_recorded_trials():
    recorded = outcomes([0, 3, 6, 8], [8, 8, 8, 8])
    groups = Source(recorded, 0.0, "finite", 8, np.random.default_rng(0)).draw(400)
    assert sorted(groups.rewards.sum(axis=1)) == sorted([0, 3, 6, 8] * 100)  # every cell is drawn equally often
    assert np.array_equal(groups.rewards.mean(axis=1), groups.rates)
    three = groups.rewards[groups.rates == 3 / 8]
    assert three.mean(axis=0) == pytest.approx(np.full(8, 3 / 8), abs=0.2)  # the trials are shuffled
    assert groups.priors == pytest.approx(groups.rates)  # the prior has no noise


def test_finite_leaves_out_cells_of_too_few_trials():
    source = Source(outcomes([0, 3, 6], [8, 4, 8]), 0.0, "finite", 8, np.random.default_rng(0))
    assert source.cells == 2
    with pytest.raises(ValueError, match=r"maximum=9 trials, but the largest cell has 8; lower"):
        Source(outcomes([0, 3], [8, 4]), 0.0, "finite", 9, np.random.default_rng(0))


def test_every_method_and_budget_spends_what_it_says():
    records = replayed(Source(spread(), None, "superpopulation", 6, np.random.default_rng(1)))
    rollouts = {(r.method, r.budget): r.mean_rollouts for r in records}
    osla = rollouts["v05+osla", "one-step look-ahead"]
    assert 4 < osla < 6
    for method in ("grpo", "v05", "calibrated"):
        assert [r.mean_rollouts for r in records if r.method == method] == sorted([4.0, 5.0, 6.0, osla])
    for method in ("mean+budget", "calibrated+budget"):
        assert {r.mean_rollouts for r in records if r.method == method} == {4.0, 5.0, 6.0, osla}
        assert rollouts[method, "as v05+osla"] == osla


def test_errors_are_those_on_paper():
    records = replayed(Source(spread(), None, "superpopulation", 6, np.random.default_rng(2)), steps=17)
    by = {(r.method, r.budget): r for r in records}
    for size in (4, 5, 6):
        grpo = by["grpo", f"{size} each"]
        assert grpo.mse == pytest.approx(4 / 8 / size, rel=0.1)  # p ~ Beta(1/2, 1/2) has E p (1 - p) = 1/8
        assert 0 < grpo.mse_standard_error < 0.05 * grpo.mse
        assert by["calibrated", f"{size} each"].mse < grpo.mse
    # If the mean equals the lowest or the highest size, there is nothing to share out: the budget changes nothing.
    for size in (4, 6):
        assert by["mean+budget", f"{size} on average"].mse == pytest.approx(by["grpo", f"{size} each"].mse)
        assert by["calibrated+budget", f"{size} on average"].mse == pytest.approx(by["calibrated", f"{size} each"].mse)
    assert by["calibrated+budget", "5 on average"].mse < by["calibrated", "5 each"].mse


def test_a_seed_gives_the_same_figures_again():
    first, again, other = (
        replayed(Source(spread(), None, "superpopulation", 5, np.random.default_rng(s)), 4, 5) for s in (3, 3, 4)
    )
    assert first == again
    assert first != other


@pytest.mark.parametrize("prior", [0.0, 1.0, np.nan], ids=["prior 0", "prior 1", "no prior"])
def test_a_prior_that_says_nothing(prior):
    recorded = spread()
    source = Source(
        outcomes(recorded.successes, recorded.trials, np.full(300, prior)), None, "superpopulation", 5, np.random.default_rng(5)
    )
    by = {(r.method, r.budget): r for r in replayed(source, 4, 5)}
    assert by["calibrated", "4 each"].mse < 1.05 * by["grpo", "4 each"].mse


@pytest.mark.parametrize("cell", [(0, 4), (4, 4), (2, 4)], ids=str)
def test_one_cell_is_enough(cell):
    records = replayed(Source(outcomes([cell[0]], [cell[1]], [0.5]), None, "superpopulation", 5, np.random.default_rng(6)), 4, 5)
    assert all(np.isfinite(r.mse) for r in records)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"replay": "bootstrap"}, "replay='bootstrap' is unknown; choose one of superpopulation, finite"),
        ({"noise": -1.0}, "noise is -1.0"),
        ({"noise": np.nan}, "noise is nan"),
    ],
)
def test_bad_source(changed, message):
    arguments = {"noise": 0.5, "replay": "superpopulation", "maximum": 8, "rng": np.random.default_rng(0), **changed}
    with pytest.raises(ValueError, match=message):
        Source(spread(), **arguments)


def test_rollouts_needed_are_read_between_records():
    records = [Record("grpo", "", mean, mse, 0.0) for mean, mse in ((4.0, 0.4), (8.0, 0.2), (16.0, 0.1))]
    assert rollouts_needed(records, "grpo", 0.5) == 4.0
    assert rollouts_needed(records, "grpo", 0.3) == pytest.approx(6.0)
    assert rollouts_needed(records, "grpo", 0.1) == 16.0
    assert rollouts_needed(records, "grpo", 0.05) is None
    assert rollouts_needed(records, "v05", 0.5) is None


def invoke(*arguments):
    return CliRunner().invoke(app, ["simulate", *map(str, arguments)])


@pytest.fixture
def file(tmp_path):
    rng = np.random.default_rng(7)
    lines = ["model,question,successes,trials,guess"]
    lines += [f"m{m},q{q},{rng.binomial(8, rng.beta(0.5, 0.5))},8,{rng.random():.3f}" for m in range(4) for q in range(30)]
    path = tmp_path / "outcomes.csv"
    path.write_text("\n".join(lines) + "\nm0,untried,0,0,0.5\n")
    return path


@pytest.mark.parametrize("prior", ["irt", "0.6", "guess"])
def test_command_prints_draws_and_writes(file, tmp_path, prior):
    out = tmp_path / "out"
    result = invoke(file, "--prior", prior, "--maximum", 5, "--plot", out / "plot.png", "--json", out / "new" / "records.json")
    assert result.exit_code == 0, result.output
    for text in ("calibrated+budget", "v05+osla", "rollouts to match grpo at 5", "1 rows without a trial left out"):
        assert text in result.output
    needed = {row.split("│")[1].strip(): row.split("│")[-2].strip() for row in result.output.splitlines() if row.startswith("│")}
    assert needed["grpo"] == "5.0"
    if prior == "0.6":  # better with the fewest rollouts than grpo with the most
        assert needed["calibrated+budget"] == "≤ 4.0"
    assert (out / "plot.png").stat().st_size > 10_000
    records = json.loads((out / "new" / "records.json").read_text())
    assert {r["method"] for r in records} == {"grpo", "v05", "calibrated", "v05+osla", "mean+budget", "calibrated+budget"}
    assert all(set(r) == {"method", "budget", "mean_rollouts", "mse", "mse_standard_error"} for r in records)


def test_finite_replay_stops_at_the_trials_there_are(file, tmp_path):
    result = invoke(file, "--replay", "finite", "--initial", 7, "--plot", tmp_path / "plot.png")
    assert result.exit_code == 0, result.output
    assert "rollouts to match grpo at 8" in result.output


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--prior", "nothing"), "has no column nothing"),
        (("--replay", "bootstrap"), "replay='bootstrap' is unknown"),
        (("--initial", 8, "--maximum", 4), "initial"),
    ],
)
def test_command_explains_mistakes(file, tmp_path, arguments, message):
    result = invoke(file, *arguments, "--plot", tmp_path / "plot.png")
    assert result.exit_code == 2
    assert message in result.output
    assert not (tmp_path / "plot.png").exists()
