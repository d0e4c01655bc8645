"""The history prior learns from text, remembers prompts, and forgets."""

import numpy as np
import pytest

from v05.prior import ConstantPrior, MeanPrior
from v05.prior.history import HistoryPrior


def log_loss(p, truth):
    return float(-np.mean(truth * np.log(p) + (1 - truth) * np.log(1 - p)))


def prompts_and_rates(rng, count):
    """Most additions succeed and most products fail. Longer ones are harder."""
    prompts, rates = [], []
    for _ in range(count):
        digits, sign = int(rng.integers(1, 4)), str(rng.choice(["+", "*"]))
        numbers = rng.integers(10 ** (digits - 1), 10**digits, size=2)
        prompts.append(f"{numbers[0]:03d}{sign}{numbers[1]:03d}=")
        rates.append({"+": 0.95, "*": 0.4}[sign] - 0.12 * digits)
    return prompts, np.array(rates)


def observe(prior, prompts, rates, rng, trials=4):
    n = np.full(len(prompts), float(trials))
    prior.observe(prompts, rng.binomial(trials, rates).astype(float), n)


def test_learns_unseen_prompts_from_their_text():
    rng = np.random.default_rng(0)
    prior = HistoryPrior()
    for _ in range(60):
        observe(prior, *prompts_and_rates(rng, 64), rng)
    prompts, rates = prompts_and_rates(rng, 500)
    constant = log_loss(np.full(500, rates.mean()), rates)
    floor = log_loss(rates, rates)
    assert log_loss(prior.predict(prompts), rates) < floor + 0.25 * (constant - floor)


def test_remembers_a_prompts_own_past():
    rng = np.random.default_rng(1)
    prompts = [f"prompt {i}" for i in range(40)]
    rates = rng.choice([0.1, 0.9], size=40)
    prior = HistoryPrior()
    for _ in range(10):
        observe(prior, prompts, rates, rng)
    assert np.abs(prior.predict(prompts) - rates).mean() < 0.15


def test_forgets_as_the_policy_moves_on():
    rng = np.random.default_rng(2)
    prior = HistoryPrior(forgetting=0.9)
    for rate in (0.1, 0.9):
        for _ in range(60):
            observe(prior, ["a", "b"], np.full(2, rate), rng)
    assert np.all(prior.predict(["a", "b"]) > 0.8)


def test_starts_undecided_and_stays_inside_the_unit_interval():
    prior = HistoryPrior()
    assert prior.predict(["anything", ""]) == pytest.approx([0.5, 0.5])
    for _ in range(300):
        prior.observe(["always"], np.ones(1) * 4, np.ones(1) * 4)
    assert 0.9 < prior.predict(["always"])[0] < 1.0


def test_nothing_to_learn_is_no_error():
    prior = HistoryPrior()
    prior.observe([], np.zeros(0), np.zeros(0))
    prior.observe(["a"], np.zeros(1), np.zeros(1))
    assert prior.predict(["a"]) == pytest.approx([0.5])
    assert prior.predict([]).shape == (0,)


def test_capacity_bounds_the_memory():
    prior = HistoryPrior(capacity=10)
    for i in range(50):
        prior.observe([f"p{i}"], np.ones(1), np.ones(1))
    assert len(prior._past) == 10
    assert "p49" in prior._past


def test_a_prior_goes_on_from_its_state():
    rng = np.random.default_rng(3)
    prior = HistoryPrior(capacity=100)
    for _ in range(5):
        observe(prior, *prompts_and_rates(rng, 64), rng)
    observe(prior, ["line\nbreak", "\0", "é"], np.full(3, 0.5), rng)
    state = prior.state_dict()
    again = HistoryPrior(capacity=100)
    again.load_state_dict({name: value.copy() for name, value in state.items()})
    prompts, rates = prompts_and_rates(rng, 64)
    for one in (prior, again):  # both learn and forget the same prompts, to the last bit
        observe(one, prompts, rates, np.random.default_rng(4))
    assert list(again._past) == list(prior._past)
    probe = [*prompts, *list(prior._past), "never seen"]
    assert np.array_equal(prior.predict(probe), again.predict(probe))
    assert not np.array_equal(prior.predict(probe), HistoryPrior().predict(probe))
    assert int(state["step"]) == 6  # the state is a copy, which later outcomes do not change


def test_constant_prior_knows_nothing():
    prior = ConstantPrior(0.3)
    prior.observe(["a"], np.ones(1), np.ones(1))
    assert prior.predict(["a", "b"]).tolist() == [0.3, 0.3]


def test_the_mean_prior_is_the_discounted_mean_of_all_outcomes():
    prior = MeanPrior(forgetting=0.5)
    assert np.isnan(prior.predict(["a", "b"])).all()
    prior.observe(["a"], np.zeros(1), np.zeros(1))
    assert np.isnan(prior.predict(["a"])).all()  # a group without a rollout has no outcome
    prior.observe(["a", "b"], np.array([3.0, 0.0]), np.array([4.0, 2.0]))
    assert prior.predict(["a", "never seen"]) == pytest.approx([0.5, 0.5])
    prior.observe(["a"], np.array([5.0]), np.array([5.0]))
    assert prior.predict(["b"]) == pytest.approx([(0.5 * 3 + 5) / (0.5 * 6 + 5)])
    assert prior.predict([]).shape == (0,)
    again = MeanPrior(forgetting=0.5)
    again.load_state_dict(prior.state_dict())
    for one in (prior, again):
        one.observe(["c"], np.array([1.0]), np.array([3.0]))
    assert np.array_equal(prior.predict(["a"]), again.predict(["a"]))
