"""The specification against results that were obtained without it."""

import math

import numpy as np
import pytest

from helpers.golden_cases import golden_options, golden_parameters
from v05 import reference

TOLERANCE = 1e-12


@pytest.mark.parametrize("case", golden_parameters())
def test_golden(case):
    advantages, statistics = reference.advantages(case["rewards"], case["group_ids"], case["prior"], **golden_options(case))
    np.testing.assert_allclose(advantages, case["expect"]["advantages"], rtol=TOLERANCE, atol=TOLERANCE)
    assert len(statistics) == len(case["expect"]["stats"])
    for seen, expected in zip(statistics, case["expect"]["stats"], strict=True):
        for name, value in expected.items():
            assert getattr(seen, name) == pytest.approx(value, rel=TOLERANCE, abs=TOLERANCE), name


def test_shrinkage_is_the_positive_part_james_stein_estimator():
    rng = np.random.default_rng(0)
    for _ in range(200):
        k, mean, prior = int(rng.integers(1, 20)), rng.uniform(-1, 1), rng.uniform(-1, 1)
        fused = reference.shrinkage(k, mean, prior)
        noise, bias = 1 / k, max(0.0, (mean - prior) ** 2 - 1 / k)
        assert fused.weight == pytest.approx(bias / (bias + noise))
        assert fused.baseline == pytest.approx(fused.weight * mean + (1 - fused.weight) * prior)
        assert fused.mse == pytest.approx(bias * noise / (bias + noise))


def test_the_p_value_is_that_of_a_right_prior():
    # A mean whose noise has the assumed variance 1/k around the prior: T is a squared standard normal.
    rng = np.random.default_rng(1)
    means = 0.2 + rng.standard_normal(4000) / math.sqrt(4)
    p_values = [reference.shrinkage(4, float(m), 0.2).p_value for m in means]
    for level in (0.05, 0.5, 0.9):
        assert np.mean(np.array(p_values) < level) == pytest.approx(level, abs=0.025)


def test_default_cost_crosses_between_15_and_16_rollouts():
    huge = 1e9  # the gain tends to 1 / (k (k + 1))
    assert reference.osla_take_more(15, huge, max_rollouts=100, cost=1 / 256)
    assert not reference.osla_take_more(16, huge, max_rollouts=100, cost=1 / 256)


def test_no_prior_means_the_group_mean():
    advantages, (statistics,) = reference.advantages([1, 0, 0, 1], [0] * 4, [math.nan], method="v05")
    np.testing.assert_allclose(advantages, [0.5, -0.5, -0.5, 0.5])
    assert statistics.weight == 1.0
    assert statistics.mse == pytest.approx(0.25 / 4)  # reward variance 1/4 at p = 1/2, divided by k = 4
    assert math.isnan(statistics.statistic)
    assert statistics.take_more
