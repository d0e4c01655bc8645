"""Curves computed by hand: where a mean reaches a target, and how often intervals cover the truth."""

from dataclasses import astuple

import numpy as np
import pytest

from v05.train.curves import bootstrap_interval, mean_curve, reaching


def curve(xs, ys):
    return np.array(xs, float), np.array(ys, float)


def test_the_mean_is_exact_where_seeds_were_evaluated_at_different_points():
    points, mean, spread = mean_curve([curve([0, 100, 300], [0.0, 0.2, 0.4]), curve([0, 200, 250], [0.2, 0.4, 0.4])])
    np.testing.assert_allclose(points, [0, 100, 200, 250])  # the shortest curve ends there
    np.testing.assert_allclose(mean, [0.1, 0.25, 0.35, 0.375])
    np.testing.assert_allclose(spread[0], 0.2 / np.sqrt(2))


def test_a_target_is_reached_between_evaluations():
    assert astuple(reaching([curve([0, 100, 200], [0.4, 0.5, 0.45])], [0.44])) == pytest.approx((40, 40, 40))
    assert reaching([curve([0, 100], [0.4, 0.5])], [0.3]).at == 0
    assert astuple(reaching([curve([0, 100], [0.4, 0.5])], [0.51])) == (None, None, None)
    ends = np.random.default_rng(0).random(20).tolist()  # summed in another order, their mean has another last digit
    assert reaching([curve([0, 100], [0.0, end]) for end in ends], ends).at == pytest.approx(100)


def test_seeds_are_resampled_in_pairs():
    """Each seed, and so each resample of seeds, reaches its own target half way. Only an interval from unpaired seeds would have a
    width.
    """
    curves = [curve([0, 100], [0.2, 0.6]), curve([0, 100], [0.5, 0.7])]
    assert astuple(reaching(curves, [0.4, 0.6])) == pytest.approx((50, 50, 50))
    one_never = reaching([*curves, curve([0, 100], [0.1, 0.2])], [0.4, 0.6, 0.9])
    assert one_never.at is None
    assert one_never.low == pytest.approx(50)
    assert one_never.high is None


def test_bootstrap_interval_covers_as_it_says():
    rng = np.random.default_rng(0)
    covered = 0
    for _ in range(40):
        low, high = bootstrap_interval([rng.random(200) < 0.5 for _ in range(10)])
        covered += low <= 0.5 <= high
    assert covered >= 34
