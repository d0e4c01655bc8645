"""Outcome files are read as a stream and checked. Messages name what is wrong with a file."""

import json

import numpy as np
import pytest
from scipy.special import expit

from v05.simulate.item_response import cross_fitted
from v05.simulate.outcomes import Outcomes, fit_population, read_outcomes


def write(path, text):
    file = path / "outcomes.csv"
    file.write_text(text)
    return file


def test_reads_cells_in_any_column_order_and_adds_up_repeated_rows(tmp_path):
    text = "trials,model,extra,question,successes\n10,a,x,q1,3\n\n10,b,x,q1,10\n5,a,x,q2,0\n2,a,x,q1,1\n"
    outcomes = read_outcomes(write(tmp_path, text))
    assert outcomes.model.tolist() == [0, 0, 1]
    assert outcomes.question.tolist() == [0, 1, 0]
    assert outcomes.successes.tolist() == [4, 0, 10]
    assert outcomes.trials.tolist() == [12, 5, 10]
    assert outcomes.priors is None
    assert outcomes.left_out == 0


def test_rows_without_a_trial_are_left_out_and_counted(tmp_path):
    outcomes = read_outcomes(write(tmp_path, "model,question,successes,trials\na,q1,0,0\na,q2,1,2\n"))
    assert (len(outcomes), outcomes.left_out) == (1, 1)


def test_a_prior_column_may_have_holes(tmp_path):
    text = "model,question,successes,trials,guess\na,q1,1,2,0.25\na,q2,1,2,\na,q1,1,2,0.75\n"
    outcomes = read_outcomes(write(tmp_path, text), prior="guess")
    assert outcomes.priors == pytest.approx([0.5, np.nan], nan_ok=True)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("model,question,passed\na,q,1\n", "has no column successes, trials; it has model, question, passed"),
        ("", "has no column model, question, successes, trials; it has no header"),
        ("model,question,successes,trials\n", r"has no row with trials > 0 \(0 rows\)"),
        ("model,question,successes,trials\na,q,0,0\n", r"has no row with trials > 0 \(1 rows\)"),
        ("model,question,successes,trials\na,q,1,2\na,r,3,2\n", "row 2 has successes=3, trials=2 .* 0 <= successes <= trials"),
        ("model,question,successes,trials\na,q,-1,2\n", "row 1 has successes=-1"),
        ("model,question,successes,trials\na,q,0.5,2\n", "row 1 has successes=0.5"),
        ("model,question,successes,trials\na,q,nan,2\n", "row 1 has successes=nan"),
        ("model,question,successes,trials\na,q,1,inf\n", "row 1 has successes=1, trials=inf"),
        ("model,question,successes,trials\na,q,one,2\n", "line 2: 'a,q,one,2' lacks successes, trials as numbers"),
        ("model,question,successes,trials\na,q,1\n", "line 2: 'a,q,1' lacks"),
    ],
)
def test_mistakes_are_named(tmp_path, text, message):
    with pytest.raises(ValueError, match=message):
        read_outcomes(write(tmp_path, text))


def test_mistakes_in_priors_are_named(tmp_path):
    file = write(tmp_path, "model,question,successes,trials,guess\na,q,1,2,1.5\n")
    with pytest.raises(ValueError, match=r"row 1 has the prior 1.5"):
        read_outcomes(file, prior="guess")
    empty = write(tmp_path, "model,question,successes,trials,guess\na,q,1,2,\na,r,0,0,0.5\n")
    with pytest.raises(ValueError, match="has no prior in any row with trials > 0; fill the column"):
        read_outcomes(empty, prior="guess")
    with pytest.raises(ValueError, match="has no column other"):
        read_outcomes(file, prior="other")


def test_a_question_may_be_long_and_a_file_no_csv(tmp_path):
    question = "x" * 200_000
    assert len(read_outcomes(write(tmp_path, f"model,question,successes,trials\na,{question},1,2\n"))) == 1
    (tmp_path / "latin.csv").write_bytes("model,question,successes,trials\na,é,1,2\n".encode("latin-1"))
    with pytest.raises(ValueError, match=r"latin\.csv, near line .*; give a CSV file in UTF-8"):
        read_outcomes(tmp_path / "latin.csv")
    with pytest.raises(ValueError, match=r"near line 2: field larger than field limit .*; give a CSV file in UTF-8 with"):
        read_outcomes(write(tmp_path, f'model,question,successes,trials\na,"{"x" * (1 << 25)}'))


def write_run(directory, successes, task="sums"):
    directory.mkdir()
    (directory / "config.json").write_text(json.dumps({"task": {"kind": task}}))
    (directory / "result.json").write_text(json.dumps({"heldout_successes": successes, "heldout_samples": 4}))


def test_runs_are_outcomes_too(tmp_path):
    write_run(tmp_path / "one", [0, 4, 2])
    write_run(tmp_path / "two", [1, 1, 4])
    both = read_outcomes(tmp_path)
    assert both.model.tolist() == [0, 0, 0, 1, 1, 1]
    assert both.question.tolist() == [0, 1, 2, 0, 1, 2]
    assert both.successes.tolist() == [0, 4, 2, 1, 1, 4]
    assert read_outcomes(tmp_path / "two").successes.tolist() == [1, 1, 4]
    with pytest.raises(ValueError, match="has no column 'guess'"):
        read_outcomes(tmp_path, prior="guess")
    (tmp_path / "two" / "result.json").write_text("{}")
    with pytest.raises(ValueError, match="has no heldout_successes, heldout_samples"):
        read_outcomes(tmp_path)
    for damaged in ("[1]", "{"):
        (tmp_path / "two" / "result.json").write_text(damaged)
        with pytest.raises(ValueError, match=r"two/result\.json .*; the run is damaged, leave its directory out"):
            read_outcomes(tmp_path)
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=r"holds no finished run: there is no result.json"):
        read_outcomes(tmp_path / "empty")


def test_prompts_of_different_tasks_are_different_questions(tmp_path):
    write_run(tmp_path / "one", [0, 4])
    write_run(tmp_path / "other", [1, 1, 4], task="products")
    write_run(tmp_path / "two", [2, 3, 4])
    assert read_outcomes(tmp_path).question.tolist() == [0, 1, 3, 4, 5, 0, 1, 2]


def test_one_path_with_other_content_is_another_task(tmp_path):
    for name, content in {"one": "a", "other": "b", "two": "a"}.items():
        write_run(tmp_path / name, [0, 4])
        (tmp_path / name / "config.json").write_text(json.dumps({"task": {"kind": "jsonl", "path": f"{name}.jsonl"}}))
        (tmp_path / name / "inputs.json").write_text(json.dumps({"task.path": content}))
    assert read_outcomes(tmp_path).question.tolist() == [0, 1, 2, 3, 0, 1]


def test_population_is_the_one_that_made_the_outcomes():
    rng = np.random.default_rng(0)
    trials = rng.integers(1, 20, 20_000).astype(float)
    successes = rng.binomial(trials.astype(int), rng.beta(0.4, 1.2, 20_000)).astype(float)
    cells = np.arange(20_000)
    a, b = fit_population(Outcomes(cells, cells, successes, trials))
    assert a == pytest.approx(0.4, rel=0.05)
    assert b == pytest.approx(1.2, rel=0.06)


def test_equal_outcomes_have_a_population():
    cells = np.arange(5)
    a, b = fit_population(Outcomes(cells, cells, np.full(5, 4.0), np.full(5, 4.0)))
    assert 0.99 < a / (a + b) < 1.0


def grid(rng, models, questions, trials=8):
    """Outcomes drawn from the item-response model itself, and the true rates."""
    model, question = np.divmod(np.arange(models * questions), questions)
    rates = expit(rng.normal(size=models)[model] - 2.0 * rng.normal(size=questions)[question])
    counts = np.full(len(model), float(trials))
    return Outcomes(model, question, rng.binomial(trials, rates).astype(float), counts), rates


def test_item_response_finds_abilities_and_difficulties():
    rng = np.random.default_rng(1)
    outcomes, rates = grid(rng, 20, 200)
    priors = cross_fitted(outcomes, rng)
    assert np.mean((priors - rates) ** 2) < 0.1 * rates.var()


def test_a_prior_never_sees_its_own_cell():
    rng = np.random.default_rng(2)
    outcomes, _ = grid(rng, 5, 8)
    before = cross_fitted(outcomes, np.random.default_rng(3))
    for cell in (0, 17, 39):
        flipped = outcomes.successes.copy()
        flipped[cell] = outcomes.trials[cell] - flipped[cell] if 2 * flipped[cell] != outcomes.trials[cell] else 0.0
        after = cross_fitted(Outcomes(outcomes.model, outcomes.question, flipped, outcomes.trials), np.random.default_rng(3))
        assert after[cell] == before[cell]
        assert np.abs(after - before).max() > 1e-3  # the priors of other cells do change


def test_a_lone_cell_has_an_undecided_prior():
    one = np.zeros(1, dtype=np.int64)
    assert cross_fitted(Outcomes(one, one, np.ones(1), np.ones(1)), np.random.default_rng(0)).tolist() == [0.5]
