"""SPO's tracker: a prompt's own outcomes, discounted at each visit."""

import numpy as np
import pytest

from v05.prior.spo import SpoPrior


def visit(prior, prompt, *rewards):
    prior.observe([prompt], np.array([float(sum(rewards))]), np.array([float(len(rewards))]))


def test_a_visit_discounts_the_prompts_own_past():
    prior = SpoPrior(forgetting=0.8)
    visit(prior, "a", 1)
    assert prior.predict(["a"]) == pytest.approx([(0.8 * 0.5 + 1) / (0.8 + 1)])
    for _ in range(3):
        visit(prior, "b", 0)  # a visit to "b" neither informs nor ages "a"
    visit(prior, "a", 0, 1, 1)
    assert prior.predict(["a"]) == pytest.approx([(0.8**2 * 0.5 + 0.8 + 2) / (0.8**2 + 0.8 + 3)])
    assert prior.predict(["never seen", "a"])[0] == 0.5


def test_it_follows_a_policy_on_the_move():
    rng = np.random.default_rng(0)
    prompts, prior = [f"prompt {i}" for i in range(200)], SpoPrior()
    for rate in (0.1, 0.9):
        for _ in range(30):
            prior.observe(prompts, rng.binomial(1, rate, 200).astype(float), np.ones(200))
        # Memory of 1 / (1 - rho) = 8 visits: the variance of such a mean is rate (1 - rate) (1 - rho) / (1 + rho).
        predicted = prior.predict(prompts)
        assert abs(predicted.mean() - rate) < 0.03
        assert predicted.var() == pytest.approx(rate * (1 - rate) * 0.125 / 1.875, rel=0.4)


def test_groups_without_a_trial_are_no_visit():
    prior = SpoPrior()
    visit(prior, "a", 1, 1)
    before = prior.predict(["a"])
    prior.observe(["a", "b"], np.zeros(2), np.zeros(2))
    prior.observe([], np.zeros(0), np.zeros(0))
    assert np.array_equal(prior.predict(["a"]), before)
    assert prior.predict([]).shape == (0,)


def test_a_prompt_that_returns_within_a_step_is_visited_twice():
    once, twice = SpoPrior(), SpoPrior()
    once.observe(["a", "a"], np.array([1.0, 0.0]), np.ones(2))
    visit(twice, "a", 1)
    visit(twice, "a", 0)
    assert np.array_equal(once.predict(["a"]), twice.predict(["a"]))


def test_the_tracker_goes_on_from_its_state():
    prior, again = SpoPrior(), SpoPrior()
    for prompt in ("line\nbreak", "\0", "é", "a"):
        visit(prior, prompt, 1, 0, 0)
    again.load_state_dict({name: values.copy() for name, values in prior.state_dict().items()})
    for one in (prior, again):
        visit(one, "a", 1)
    probe = ["line\nbreak", "\0", "é", "a", "never seen"]
    assert np.array_equal(prior.predict(probe), again.predict(probe))
    assert len(set(prior.predict(probe).tolist())) == 3
