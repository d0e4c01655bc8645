"""Calibrated fusion and its gain: the core against `v05.reference`, and both against arithmetic of 60 digits."""

from __future__ import annotations

import math
from dataclasses import astuple

import mpmath
import pytest

from v05 import _core, reference
from v05.methods import Calibration

NAN = math.nan
PRIORS = [0.0, 0.004, 0.3, 0.5, 0.97, 1.0, NAN]
FEW = [(0, 0.0), (1, 0.0), (1, 0.125), (1, 1.0), (4, 0.0), (4, 2.5), (4, 4.0), (16, 1.0), (16, 15.75), (16, 16.0)]
SAMPLES = [*FEW, (65535, 30000.0)]


def exact(count: int, successes: float, prior: float, calibration: Calibration) -> tuple[mpmath.mpf, ...]:
    """baseline, variance, hallucination and gain from the formula as printed."""

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
    return mean, variance, w0, 4 * (variance - after)


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
    ],
    ids=str,
)
@pytest.mark.parametrize("prior", PRIORS)
def test_core_is_exact(prior: float, calibration: Calibration) -> None:
    with mpmath.workdps(400):  # rates next to 0 and 1 cancel hundreds of digits
        for count, successes in SAMPLES:
            found = _core.calibrated(count, successes, prior, astuple(calibration)[:4])
            expected = [float(number) for number in exact(count, successes, prior, calibration)]
            # Log evidence is a sum of terms near count * log(count * kappa), each right to its last digit.
            tolerance = 1e-13 + 1e-16 * (count + 1) * (40 + abs(math.log(calibration.kappa)))
            assert found == pytest.approx(expected, rel=20 * tolerance, abs=1e-290), (count, successes)


@pytest.mark.parametrize("calibration", [Calibration(0.0, 1.0, 4.5, 0.12), Calibration(-1.0, 0.3, 300.0, 0.5)], ids=str)
@pytest.mark.parametrize("prior", PRIORS)
def test_core_equals_reference(prior: float, calibration: Calibration) -> None:
    for count, successes in FEW:
        fused = reference.calibrated(count, successes, prior, calibration)
        gain = reference.calibrated_gain(count, successes, prior, calibration)
        found = _core.calibrated(count, successes, prior, astuple(calibration)[:4])
        assert found == pytest.approx((*astuple(fused), gain), rel=1e-9, abs=1e-13)


def test_a_vague_prior_is_the_sample_with_half_a_success_and_failure() -> None:
    baseline, variance, hallucination, gain = _core.calibrated(3, 1.0, NAN, (0.0, 1.0, 5.0, 0.1))
    assert (baseline, hallucination) == (1.5 / 4, 1.0)
    assert variance == pytest.approx(1.5 * 2.5 / (16 * 5))
    assert gain == pytest.approx(4 * (1.5 * 2.5 / 16) / 5**2)  # 4 m (1 - m) / (k + 2)^2


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
