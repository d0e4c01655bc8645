"""The calibrator recovers the numbers that made the data, follows a drift, and keeps its last good fit."""

import math

import numpy as np
import pytest
from scipy.special import expit

from v05.methods import Calibration
from v05.prior import calibration as module
from v05.prior.calibration import BOUNDS, Calibrator, negative_log_likelihood
from v05.reference import betaln, calibrated


def draw(rng, groups, truth):
    """(successes, counts, priors) of groups of 1 to 16 rollouts, drawn from the calibrator's own model."""
    logits = rng.normal(0.0, 2.0, groups)
    q = expit(truth.alpha + truth.beta * logits)
    vague = rng.random(groups) < truth.eps
    rates = np.where(vague, rng.beta(0.5, 0.5, groups), rng.beta(truth.kappa * q, truth.kappa * (1 - q)))
    counts = rng.integers(1, 17, groups)
    return rng.binomial(counts, rates).astype(float), counts.astype(float), expit(logits)


@pytest.mark.parametrize(
    "truth",
    [Calibration(0, 1, 4.5, 0.12), Calibration(-1, 0.6, 10, 0.3), Calibration(0.5, 0, 2, 0.1), Calibration(0, 1.5, 40, 0.02)],
    ids=["default", "shifted", "noise", "sharp"],
)
def test_recovers_the_numbers_that_made_the_data(truth):
    calibrator = Calibrator(window=10_000, half_life=None)
    calibrator.observe(*draw(np.random.default_rng(0), 10_000, truth))
    found = calibrator.fit()
    assert found.alpha == pytest.approx(truth.alpha, abs=0.1)
    assert found.beta == pytest.approx(truth.beta, abs=0.08)
    assert found.kappa == pytest.approx(truth.kappa, rel=0.2)
    assert found.eps == pytest.approx(truth.eps, abs=0.04)
    assert calibrator.calibration is found


@pytest.mark.parametrize("theta", [(0.0, 1.0, 1.5, -2.0), (-3.0, 0.1, -2.0, 4.0), (1.0, -1.0, 7.0, -9.0)], ids=str)
def test_value_is_the_marginal_likelihood_and_the_gradient_its_slope(theta):
    rng = np.random.default_rng(1)
    successes, counts, priors = draw(rng, 50, Calibration())
    successes[::3] = rng.uniform(0.0, counts[::3])  # rewards need not be binary
    priors[:2] = 0.0, 1.0
    weights = rng.uniform(0.1, 1.0, 50)
    objective = negative_log_likelihood(successes, counts, priors, weights)
    alpha, beta, kappa, eps = theta[0], theta[1], math.exp(theta[2]), 1 / (1 + math.exp(-theta[3]))
    likelihoods = []
    for x, k, v in zip(successes, counts, np.clip(priors, 0.005, 0.995), strict=True):
        q = 1 / (1 + math.exp(-alpha - beta * math.log(v / (1 - v))))
        a, b = kappa * q, kappa * (1 - q)
        m1 = math.exp(betaln(x + a, k - x + b) - betaln(a, b))
        m0 = math.exp(betaln(x + 0.5, k - x + 0.5) - betaln(0.5, 0.5))
        likelihoods.append((1 - eps) * m1 + eps * m0)
    default = np.array([0.0, 1.0, math.log(4.5), math.log(0.12 / 0.88)])
    penalty = 0.1 * weights.max() * np.sum((theta - default) ** 2) / 2
    expected = (penalty - weights @ np.log(likelihoods)) / weights.sum()
    assert objective(np.array(theta))[0] == pytest.approx(expected, rel=1e-9)
    steps = 1e-5 * np.eye(4)
    slopes = [(objective(theta + step)[0] - objective(theta - step)[0]) / 2e-5 for step in steps]
    assert objective(np.array(theta))[1] == pytest.approx(slopes, rel=1e-5, abs=1e-8)


def test_settled_groups_do_not_decide_for_the_others():
    """One eps serves right priors near 0 and 1 and uninformative priors near 1/2. It must suit the latter."""
    rng = np.random.default_rng(9)
    priors = np.concatenate([np.full(1800, 0.01), rng.uniform(0.3, 0.7, 200)])
    rates = np.concatenate([np.full(1800, 0.01), rng.beta(0.5, 0.5, 200)])
    counts = np.full(2000, 8.0)
    successes = rng.binomial(8, rates).astype(float)
    calibrator = Calibrator(half_life=None)
    calibrator.observe(successes, counts, priors)
    calibrator.fit()
    error = {}
    for name, calibration in (("fitted", calibrator.calibration), ("prior is sure", Calibration(0.0, 1.0, 100.0, 1e-3))):
        fused = [calibrated(8, x, v, calibration).baseline for x, v in zip(successes[1800:], priors[1800:], strict=True)]
        error[name] = np.mean((fused - rates[1800:]) ** 2)
    vague = np.mean(((successes[1800:] + 0.5) / 9 - rates[1800:]) ** 2)
    assert error["fitted"] < 1.05 * vague < error["prior is sure"]


def test_follows_a_policy_on_the_move():
    rng = np.random.default_rng(2)
    before, after = Calibration(-1.5, 1.0, 8.0, 0.05), Calibration(1.5, 0.5, 8.0, 0.05)
    forgetful, faithful = Calibrator(half_life=256), Calibrator(half_life=None)
    for calibrator in (forgetful, faithful):
        calibrator.observe(*draw(rng, 2000, before))
        assert calibrator.fit().alpha == pytest.approx(-1.5, abs=0.4)
        for _ in range(8):
            calibrator.observe(*draw(rng, 128, after))
            calibrator.fit()
    assert forgetful.calibration.alpha == pytest.approx(1.5, abs=0.4)
    assert forgetful.calibration.beta == pytest.approx(0.5, abs=0.2)
    assert faithful.calibration.alpha < 0.5  # without forgetting, the old groups still weigh


def test_the_window_drops_the_oldest():
    rng = np.random.default_rng(3)
    old, recent = draw(rng, 500, Calibration(-4.0, 1.0, 8.0, 0.05)), draw(rng, 500, Calibration(1.0, 1.0, 8.0, 0.05))
    calibrator, fresh = Calibrator(window=500), Calibrator(window=500)
    for groups in (old, recent):
        calibrator.observe(*groups)
    fresh.observe(*recent)
    assert calibrator.fit() == fresh.fit()


def test_too_few_groups_leave_the_default():
    calibrator = Calibrator()
    assert calibrator.fit() == Calibration()
    calibrator.observe([3.0], [4.0], [0.9])
    assert calibrator.fit() == Calibration()
    groups = draw(np.random.default_rng(4), 63, Calibration(-2.0, 0.5, 20.0, 0.02))
    calibrator.observe(*(values[:62] for values in groups))
    assert calibrator.fit() == Calibration()
    calibrator.observe(*(values[62:] for values in groups))
    assert calibrator.fit() != Calibration()
    assert calibrator.failed_fits == 0


def test_groups_without_prior_or_rollout_teach_nothing():
    x, k, v = draw(np.random.default_rng(5), 200, Calibration())
    plain, holed = Calibrator(), Calibrator()
    plain.observe(x, k, v)
    holed.observe(np.append(x, [0.0, 4.0]), np.append(k, [0.0, 4.0]), np.append(v, [0.5, np.nan]))
    assert holed.fit() == plain.fit()
    holed.observe([], [], [])
    assert holed.fit() == plain.fit()


@pytest.mark.parametrize("prior", [0.0, 0.5, 1.0, None], ids=["prior 0", "prior 1/2", "prior 1", "any prior"])
@pytest.mark.parametrize("rewards", ["none", "all", "mixed"])
@pytest.mark.parametrize("size", [1, 4])
def test_degenerate_data_still_fit(prior, rewards, size):
    rng = np.random.default_rng(6)
    counts = np.full(300, float(size))
    successes = {"none": 0 * counts, "all": counts, "mixed": rng.binomial(size, 0.5, 300)}[rewards]
    calibrator = Calibrator()
    calibrator.observe(successes, counts, rng.random(300) if prior is None else np.full(300, prior))
    found = calibrator.fit()
    assert calibrator.failed_fits == 0
    theta = np.array([found.alpha, found.beta, math.log(found.kappa), math.log(found.eps / (1 - found.eps))])
    assert all(low < number < high for number, (low, high) in zip(theta, BOUNDS, strict=True))


def test_a_fit_that_does_not_converge_leaves_the_last_good_one(monkeypatch):
    rng = np.random.default_rng(7)
    calibrator = Calibrator()
    calibrator.observe(*draw(rng, 500, Calibration()))
    good = calibrator.fit()
    monkeypatch.setattr(module, "MAX_ITERATIONS", 1)
    calibrator.observe(*draw(rng, 500, Calibration(-3.0, 0.2, 30.0, 0.02)))
    assert calibrator.fit() == good
    assert calibrator.fit() == good
    assert calibrator.failed_fits == 2
    monkeypatch.undo()
    assert calibrator.fit() != good
    assert calibrator.failed_fits == 2


def test_goes_on_from_its_state():
    rng = np.random.default_rng(8)
    calibrator = Calibrator()
    calibrator.observe(*draw(rng, 300, Calibration(-1.0, 0.7, 8.0, 0.2)))
    calibrator.fit()
    calibrator.failed_fits = 3
    state = {name: value.copy() for name, value in calibrator.state_dict().items()}
    again = Calibrator()
    again.load_state_dict(state)
    assert (again.calibration, again.failed_fits) == (calibrator.calibration, 3)
    more = draw(rng, 100, Calibration(1.0, 0.7, 8.0, 0.2))
    for one in (calibrator, again):
        one.observe(*more)
    assert again.fit() == calibrator.fit()
    assert state["groups"].shape == (3, 300)  # the state is a copy: more groups were observed since


@pytest.mark.parametrize(
    ("groups", "message"),
    [
        (([5.0], [4.0], [0.5]), r"successes\[0\]=5.0 is out of bounds .* scale rewards to \[0, 1\]"),
        (([1.0, -1.0], [4.0, 4.0], [0.5, 0.5]), r"successes\[1\]=-1.0"),
        (([math.nan], [4.0], [0.5]), r"successes\[0\]=nan"),
        (([0.0], [-1.0], [0.5]), r"counts\[0\]=-1.0"),
        (([1.0], [4.0], [1.5]), r"priors\[0\]=1.5 is out of bounds .* NaN means no prior"),
        (([1.0], [4.0], [0.5, 0.5]), "shapes"),
        (([[1.0]], [[4.0]], [[0.5]]), "shapes"),
    ],
)
def test_bad_groups_are_refused_whole(groups, message):
    calibrator = Calibrator()
    with pytest.raises(ValueError, match=message):
        calibrator.observe(*groups)
    assert calibrator.state_dict()["groups"].shape == (3, 0)


@pytest.mark.parametrize(("arguments", "message"), [({"window": 10}, "window=10"), ({"half_life": 0.0}, "half_life=0.0")])
def test_bad_settings(arguments, message):
    with pytest.raises(ValueError, match=message):
        Calibrator(**arguments)


def energies_of(rng, successes, counts, priors, delta0, delta1):
    """(2, G) sums of energies. The mean energy of a success is exp(delta0 + delta1 log(1 - v)) times that of a failure."""
    ratio = np.exp(delta0 + delta1 * np.log(1 - priors))
    drawn = [[rng.gamma(0.5, 2.0, int(n)).sum() for n in kind] for kind in (successes, counts - successes)]
    return np.array([ratio * drawn[0], drawn[1]]) * 37.0  # an arbitrary unit


@pytest.mark.parametrize(("delta0", "delta1"), [(0.0, 0.0), (-1.0, 0.0), (0.2, 1.5)])
def test_recovers_the_shift_of_energies(delta0, delta1):
    rng = np.random.default_rng(3)
    successes, counts, priors = draw(rng, 8000, Calibration(0.0, 1.0, 1e5, 1e-6))  # priors are right
    calibrator = Calibrator(window=8000, half_life=None)
    calibrator.observe(successes, counts, priors, energies_of(rng, successes, counts, priors, delta0, delta1))
    found = calibrator.fit()
    assert found.delta0 == pytest.approx(delta0, abs=0.2)
    assert found.delta1 == pytest.approx(delta1, abs=0.2)


def test_the_shift_is_small_where_little_is_known_of_energies():
    rng = np.random.default_rng(4)
    groups = draw(rng, 400, Calibration())
    calibrator = Calibrator(half_life=None)
    calibrator.observe(*groups)
    without = calibrator.fit()
    assert (without.delta0, without.delta1) == (0.0, 0.0)
    few = np.zeros((2, 400))
    few[:, :4] = energies_of(rng, *(column[:4] for column in groups), -3.0, 0.0)
    again = Calibrator(half_life=None)
    again.observe(*groups, few)
    found = again.fit()
    assert (found.alpha, found.beta, found.kappa, found.eps) == (without.alpha, without.beta, without.kappa, without.eps)
    assert -1.5 < found.delta0 + found.delta1 * math.log(0.5) < 0.0


def test_the_shift_follows_the_stream_and_is_kept(tmp_path):
    rng = np.random.default_rng(5)
    calibrator = Calibrator(window=4096, half_life=256.0)
    for shift in (0.0, -2.0):
        groups = draw(rng, 2000, Calibration())
        calibrator.observe(*groups, energies_of(rng, *groups, shift, 0.0))
        calibrator.fit()
        assert calibrator.calibration.delta0 == pytest.approx(shift, abs=0.5)
    again = Calibrator(window=4096, half_life=256.0)
    again.load_state_dict(calibrator.state_dict())
    assert again.calibration == calibrator.calibration
    assert again.fit() == calibrator.fit()


@pytest.mark.parametrize(
    ("energies", "message"),
    [
        ([[1.0], [1.0]], r"energies has shape \(2, 1\); give two numbers for each of 2 groups"),
        ([[1.0, -1.0], [0.0, 0.0]], r"energies\[:, 1\]=\[-1.0, 0.0\] are not finite numbers of at least 0"),
        ([[1.0, np.inf], [0.0, 0.0]], r"energies\[:, 1\]=\[inf, 0.0\]"),
    ],
)
def test_energies_that_cannot_be_are_refused(energies, message):
    with pytest.raises(ValueError, match=message):
        Calibrator().observe([1.0, 1.0], [2.0, 2.0], [0.5, 0.5], energies)


@pytest.mark.parametrize(("kappa", "mean"), [(2.0, 0.5), (10.0, 0.3)])
def test_recovers_the_variances_that_ebpo_shrinks_by(kappa, mean):
    rng = np.random.default_rng(0)
    calibrator = Calibrator()
    counts = rng.integers(1, 9, 4096).astype(float)
    calibrator.observe(
        rng.binomial(counts.astype(int), rng.beta(kappa * mean, kappa * (1 - mean), 4096)), counts, np.full(4096, mean)
    )
    # E[p (1 - p)] / Var[p] of a Beta density is its kappa.
    fit = calibrator.fit(by_variances=True)
    assert fit.kappa == pytest.approx(kappa, rel=0.3)
    assert fit == Calibration(kappa=fit.kappa)


def test_variances_that_cannot_be_told():
    alone, alike = Calibrator(), Calibrator()
    alone.observe(np.arange(100) % 2, np.ones(100), np.full(100, 0.5))
    assert alone.fit(by_variances=True) == Calibration()  # one rollout per prompt says nothing about the variance within a prompt
    alike.observe(np.full(100, 2.0), np.full(100, 4.0), np.full(100, 0.5))
    # Prompts differ less than chance would explain: the mean of all is worth any number of rollouts.
    assert alike.fit(by_variances=True).kappa > 1e5


def test_the_pull_of_the_shift_to_0_weighs_rollouts_and_not_groups():
    rng = np.random.default_rng(6)
    priors, counts = rng.uniform(0.05, 0.6, 100), np.full(100, 16.0)
    successes = rng.binomial(16, priors).astype(float)
    calibrator = Calibrator(half_life=None)
    calibrator.observe(successes, counts, priors, energies_of(rng, successes, counts, priors, 0.0, 3.0))
    found = calibrator.fit()
    assert found.delta0 + found.delta1 * math.log(0.5) == pytest.approx(3.0 * math.log(0.5), abs=0.4)
