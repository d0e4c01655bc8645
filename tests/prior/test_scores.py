"""AUC, Brier score and cross-entropy against scikit-learn and results by hand, and the interval of AUC."""

import numpy as np
import pytest
from sklearn.metrics import roc_auc_score

from v05.prior.scores import auc, auc_interval, brier, calibration_curve, cross_entropy


def draw(seed, count=200):
    rng = np.random.default_rng(seed)
    rates = rng.integers(0, 11, count) / 10
    return np.round(np.clip(rates + 0.5 * rng.normal(size=count), 0, 1), 1), rates, rng.integers(0, 3, count)


def test_auc_is_the_usual_one_within_each_policy():
    predicted, rates, groups = draw(0)
    assert auc(predicted, rates) == pytest.approx(roc_auc_score(rates > 0.5, predicted))
    parts = [(groups == g) for g in range(3)]
    pairs = np.array([(rates[p] > 0.5).sum() * (rates[p] <= 0.5).sum() for p in parts])
    each = np.array([roc_auc_score(rates[p] > 0.5, predicted[p]) for p in parts])
    assert auc(predicted, rates, groups) == pytest.approx((pairs * each).sum() / pairs.sum())
    shifted = predicted + 10.0 * groups  # a difference between policies says nothing about prompts
    assert auc(shifted, rates, groups) == auc(predicted, rates, groups)


def test_scores_by_hand():
    assert brier(np.array([0.5, 1.0]), np.array([0.0, 1.0])) == 0.125
    assert cross_entropy(np.array([0.5, 0.5]), np.array([0.3, 1.0])) == pytest.approx(np.log(2))
    assert np.isfinite(cross_entropy(np.array([0.0, 1.0]), np.array([1.0, 0.0])))
    assert calibration_curve(np.array([0.9, 0.1, 0.2, 0.8]), np.array([1.0, 0.0, 0.5, 0.5]), bins=2) == [
        (pytest.approx(0.15), 0.25, 2),
        (pytest.approx(0.85), 0.75, 2),
    ]


def test_the_interval_holds_the_estimate_and_narrows():
    widths = []
    for count in (50, 800):
        predicted, rates, groups = draw(1, count)
        low, high = auc_interval(predicted, rates, groups)
        assert low < auc(predicted, rates, groups) < high
        widths.append(high - low)
    assert widths[1] < widths[0] / 2


def test_one_class_has_no_auc():
    assert np.isnan(auc(np.array([0.1, 0.2]), np.array([1.0, 0.9])))
    assert np.isnan(auc_interval(np.array([0.1, 0.2]), np.array([1.0, 0.9]), np.zeros(2, dtype=int))).all()
    assert np.isnan(brier(np.zeros(0), np.zeros(0)))
