"""The figures that a step records."""

import numpy as np
import pytest

from v05.train.step_records import mismatch


def test_mismatch_figures():
    trainer = [np.log(np.array([0.5, 0.3], dtype=np.float32)), np.log(np.array([0.9], dtype=np.float32))]
    engine = [np.log(np.array([0.25, 0.3], dtype=np.float32)), np.log(np.array([1.0], dtype=np.float32))]
    figures = mismatch(trainer, engine, cap=1.5)
    assert figures["mismatch"] == pytest.approx((np.log(2) - np.log(0.9)) / 3, rel=1e-5)
    assert figures["mismatch_ratio"] == pytest.approx((2 + 1 + 0.9) / 3, rel=1e-5)
    assert figures["capped_fraction"] == pytest.approx(1 / 3)
    assert mismatch(trainer, engine, cap=None)["capped_fraction"] == 0.0
    assert all(np.isnan(value) for value in mismatch(None, engine, cap=1.5).values())
