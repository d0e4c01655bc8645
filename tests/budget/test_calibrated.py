"""Calibrated fusion and its gains: the core against `v05.reference`, and the core against arithmetic of 400 digits."""

from __future__ import annotations

import itertools
import math
from dataclasses import astuple

import mpmath
import numpy as np
import pytest
from scipy.stats import beta

from v05 import _core, reference
from v05.methods import Calibration

NAN = math.nan
PRIORS = [0.0, 0.004, 0.3, 0.5, 0.97, 1.0, NAN]
FEW = [(0, 0.0), (1, 0.0), (1, 0.125), (1, 1.0), (4, 0.0), (4, 2.5), (4, 4.0), (16, 1.0), (16, 15.75), (16, 16.0)]
SAMPLES = [*FEW, (65535, 30000.0)]


def exact(count: int, successes: float, prior: float, calibration: Calibration) -> tuple[mpmath.mpf, ...]:
    """Baseline, variance, hallucination and both gains, straight from the published formulas."""

    def posterior(k: int, x: float) -> tuple[mpmath.mpf, mpmath.mpf, mpmath.mpf]:
        def component(a: mpmath.mpf, b: mpmath.mpf) -> tuple[mpmath.mpf, mpmath.mpf, mpmath.mpf]:
            evidence = mpmath.beta(x + a, k - x + b) / mpmath.beta(a, b)
            a, b = x + a, k - x + b
            return evidence, a / (a + b), a * b / ((a + b) ** 2 * (a + b + 1))

        m0, vague, vague_variance = component(mpmath.mpf(0.5), mpmath.mpf(0.5))
        w0, informed, informed_variance = mpmath.mpf(1), vague, vague_variance
        if not math.isnan(prior):
            v = mpmath.mpf(min(max(prior, 0.005), 0.995))
            q = 1 / (1 + mpmath.exp(-calibration.alpha - calibration.beta * mpmath.log(v / (1 - v))))
            m1, informed, informed_variance = component(calibration.kappa * q, calibration.kappa * (1 - q))
            w0 = calibration.eps * m0 / (calibration.eps * m0 + (1 - mpmath.mpf(calibration.eps)) * m1)
        mean = (1 - w0) * informed + w0 * vague
        spread = (1 - w0) * (informed - mean) ** 2 + w0 * (vague - mean) ** 2
        return mean, (1 - w0) * informed_variance + w0 * vague_variance + spread, w0

    mean, variance, w0 = posterior(count, successes)
    after = mean * posterior(count + 1, successes + 1)[1] + (1 - mean) * posterior(count + 1, successes)[1]
    total = mean * (1 - mean) / variance - 1
    rate = (mean * total + 1) / (total + 2)
    ratio = mpmath.exp(min(max(calibration.delta0 + calibration.delta1 * mpmath.log(1 - rate), -8), 8))
    of_gradient = 4 * (mean * (1 - mean) - variance) * ratio / (rate * ratio + 1 - rate)
    return mean, variance, w0, 4 * (variance - after), of_gradient / (count * (count + 1)) if count else mpmath.inf


@pytest.mark.parametrize(
    "calibration",
    [
        Calibration(0.0, 1.0, 4.5, 0.12),
        Calibration(-1.0, 0.3, 30.0, 0.5),
        Calibration(2.0, -1.0, 1e-6, 1e-12),
        Calibration(0.1, 1.5, 1e8, 0.01),
        Calibration(0.0, 1.0, 1e12, 1e-9),
        Calibration(100.0, 0.0, 1.0, 0.3),
        Calibration(-100.0, -100.0, 1e-6, 0.999),
        Calibration(0.0, 1.0, 4.5, 0.12, -0.5, 1.5),
        Calibration(0.5, 0.7, 1e4, 0.01, 8.0, -8.0),
    ],
    ids=str,
)
@pytest.mark.parametrize("prior", PRIORS)
def test_core_is_exact(prior: float, calibration: Calibration) -> None:
    with mpmath.workdps(400):  # subtracting rates next to 0 and 1 cancels hundreds of digits
        for count, successes in SAMPLES:
            found = _core.calibrated(count, successes, prior, astuple(calibration))
            expected = [float(number) for number in exact(count, successes, prior, calibration)]
            # Log evidence is a sum of terms near count * log(count * kappa). Each of them is right to its last digit.
            tolerance = 1e-13 + 1e-16 * (count + 1) * (40 + abs(math.log(calibration.kappa)))
            assert found[:4] == pytest.approx(expected[:4], rel=20 * tolerance, abs=1e-290), (count, successes)
            # E[p (1 - p)] is a difference. It cancels where the rate is 0 or 1 and it is unknown which.
            mean, variance = expected[:2]
            kept = 1 - variance / (mean * (1 - mean)) if 0 < mean < 1 else 1.0
            assert found[4] == pytest.approx(expected[4], rel=20 * tolerance + 1e-13 / max(kept, 1e-9), abs=1e-290)


@pytest.mark.parametrize("calibration", [Calibration(0.0, 1.0, 4.5, 0.12), Calibration(-1.0, 0.3, 300.0, 0.5, -0.5, 2.0)], ids=str)
@pytest.mark.parametrize("prior", PRIORS)
def test_core_equals_reference(prior: float, calibration: Calibration) -> None:
    for count, successes in FEW:
        fused = reference.calibrated(count, successes, prior, calibration)
        gains = [of(count, successes, prior, calibration) for of in (reference.calibrated_gain, reference.variance_gain)]
        found = _core.calibrated(count, successes, prior, astuple(calibration))
        assert found == pytest.approx((*astuple(fused), *gains), rel=1e-9, abs=1e-13)


def test_a_vague_prior_is_the_sample_with_half_a_success_and_failure() -> None:
    baseline, variance, hallucination, gain, of_gradient = _core.calibrated(3, 1.0, NAN, (0.0, 1.0, 5.0, 0.1, 0.0, 0.0))
    assert (baseline, hallucination) == (1.5 / 4, 1.0)
    assert variance == pytest.approx(1.5 * 2.5 / (16 * 5))
    assert gain == pytest.approx(4 * (1.5 * 2.5 / 16) / 5**2)  # 4 m (1 - m) / (k + 2)^2
    assert of_gradient == pytest.approx(4 * 1.5 * 2.5 / (4 * 5) / (3 * 4))  # with equal energies: 4 E[p (1 - p)] / (k (k + 1))


@pytest.mark.parametrize(("delta0", "delta1", "within"), [(0.0, 0.0, 1e-9), (0.0, 1.0, 0.2), (-1.0, 1.0, 0.1), (0.0, 2.0, 0.6)])
def test_the_variance_of_the_gradient_is_its_mean_over_the_success_rate(delta0: float, delta1: float, within: float) -> None:
    """Compared with a numerical integral. Where rates are uncertain, the variance at the mean success rate is much further off."""
    angle = (np.arange(20_000) + 0.5) / 20_000 * np.pi / 2
    p, q, step = np.sin(angle) ** 2, np.cos(angle) ** 2, np.pi / 20_000 * np.sin(angle) * np.cos(angle)
    ratio = np.exp(np.clip(delta0 + delta1 * np.log(q), -8, 8))
    of_rate = 4 * p * q * ratio / (p * ratio + q)
    calibration = Calibration(0.0, 1.0, 4.5, 0.12, delta0, delta1)
    errors, at_mean = [], []
    for count, prior in itertools.product((1, 2, 4, 8), (0.05, 0.3, 0.5, 0.8, 0.95)):
        for successes in range(count + 1):
            belief = reference.calibrated(count, successes, prior, calibration)
            density = np.zeros_like(p)
            for weight, a in ((belief.hallucination, (0.5, 0.5)), (1 - belief.hallucination, (4.5 * prior, 4.5 * (1 - prior)))):
                density += weight * beta.pdf(p, a[0] + successes, a[1] + count - successes)
            expected = float((density * of_rate * step).sum())
            errors.append(abs(math.log(reference.gradient_variance(belief, calibration) / expected)))
            at_mean.append(abs(math.log(np.interp(belief.baseline, p, of_rate) / expected)))
    assert max(errors) < within
    assert np.mean(errors) < 0.25 * np.mean(at_mean)


@pytest.mark.parametrize("delta1", [0.0, 1.0])
@pytest.mark.parametrize("prior", PRIORS)
def test_by_itself_the_rule_asks_for_no_third_rollout(prior: float, delta1: float) -> None:
    """At the default cost the rule asks for no second rollout either, except for a prompt that surely has a rate near the one where
    a rollout's gradient varies most.
    """
    calibration = Calibration(0.0, 1.0, 4.5, 0.12, 0.0, delta1)
    for count in (1, 2, 5):
        for successes in range(count + 1):
            assert not reference.variance_take_more(count, successes, prior, calibration)


@pytest.mark.parametrize(
    ("numbers", "message"),
    [
        ((NAN, 1.0, 5.0, 0.1), "alpha=nan of a Calibration is not between -100 and 100"),
        ((0.0, 101.0, 5.0, 0.1), "beta=101.0 of a Calibration"),
        ((0.0, 1.0, 0.0, 0.1), "kappa=0.0 of a Calibration is not between 1e-6 and 1e12; fit it"),
        ((0.0, 1.0, math.inf, 0.1), "kappa=inf"),
        ((0.0, 1.0, 5.0, 0.0), "eps=0.0 of a Calibration is not above 0 and below 1"),
        ((0.0, 1.0, 5.0, 1.0), "eps=1.0"),
    ],
)
def test_bad_calibration(numbers: tuple[float, float, float, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Calibration(*numbers)


@pytest.mark.parametrize("shift", [(0.0, 0.0), (-0.4, 1.5), (1.0, -2.0), (8.0, -8.0), (-8.0, 8.0)])
def test_what_a_fresh_prompt_brings_has_a_closed_form(shift):
    calibration = Calibration(0.3, 0.8, 6.0, 0.15, *shift)
    assert calibration.fresh_prompt_gain == pytest.approx(reference.fresh_prompt_gain(calibration), rel=1e-12)
