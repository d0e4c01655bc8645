"""The device functions of `kernels/advantage/fusion.py`, each called by a tiny kernel, against `v05.reference`."""

import math
from dataclasses import astuple
from itertools import product

import numpy as np
import pytest
import torch
import triton
import triton.language as tl

from v05 import _core, reference
from v05.kernels.advantage import fusion
from v05.methods import Baseline, Calibration

LOW, HIGH = -3.0, 5.0
HALF_RANGE = (HIGH - LOW) / 2
CASES = [
    (count, mean if count else math.nan, prior)
    for count, mean, prior in product((0, 1, 2, 4, 15, 16), (-1.0, -0.25, 0.0, 0.5, 1.0), (-1.0, 0.0, 0.5, 0.8, math.nan))
]
PUBLISHED_COST = 1 / 256


@triton.jit
def fuse_kernel(p_count, p_mean, p_prior, p_out, p_take_more, N, half_range: tl.float64, cost: tl.float64, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    count, mean = tl.load(p_count + i, i < N, other=1), tl.load(p_mean + i, i < N, other=0.0)
    prior = tl.load(p_prior + i, i < N, other=0.0)
    baseline, weight, statistic, squared_bias, mse = fusion.shrinkage(count, mean, prior, half_range)
    tl.store(p_out + i, baseline, i < N)
    tl.store(p_out + N + i, weight, i < N)
    tl.store(p_out + 2 * N + i, statistic, i < N)
    tl.store(p_out + 3 * N + i, squared_bias, i < N)
    tl.store(p_out + 4 * N + i, mse, i < N)
    tl.store(p_take_more + i, fusion.osla_take_more(count, squared_bias, 16, cost), i < N)


@triton.jit
def baseline_kernel(p_count, p_mean, p_prior, p_out, N, half_range: tl.float64, RULE: tl.constexpr, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    count, mean = tl.load(p_count + i, i < N, other=1), tl.load(p_mean + i, i < N, other=0.0)
    prior = tl.load(p_prior + i, i < N, other=0.0)
    tl.store(
        p_out + i, fusion.baseline_of(RULE, False, count, mean, mean, prior, half_range, mean, mean, mean, None, half_range), i < N
    )


@triton.jit
def calibrated_kernel(
    p_count,
    p_mean,
    p_prior,
    p_out,
    N,
    alpha: tl.float64,
    beta: tl.float64,
    kappa: tl.float64,
    log_odds: tl.float64,
    ALL_ENDS: tl.constexpr,
):
    i = tl.program_id(0)
    count, mean, prior = tl.load(p_count + i), tl.load(p_mean + i), tl.load(p_prior + i)
    a, b, odds = fusion.believe(prior, alpha, beta, kappa, log_odds)
    successes = fusion.successes_of(count, mean, -3.0, 5.0)
    baseline, complement, variance, hallucination = fusion.calibrated(count, successes, ALL_ENDS, a, b, odds)
    tl.store(p_out + i, baseline)
    tl.store(p_out + N + i, complement)
    tl.store(p_out + 2 * N + i, variance)
    tl.store(p_out + 3 * N + i, hallucination)


def columns() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Counts, means and priors of the cases, in reward units."""
    count, mean, prior = (torch.tensor(column, dtype=torch.float64) for column in zip(*CASES, strict=True))
    return count.to(torch.int64), (mean + 1) * HALF_RANGE + LOW, (prior + 1) * HALF_RANGE + LOW


def test_numbers_of_the_baseline_rules():
    assert [getattr(fusion, rule.name).value for rule in Baseline] == list(Baseline)


def test_shrinkage_and_osla():
    n = len(CASES)
    got = torch.empty(5, n, dtype=torch.float64)
    take_more = torch.empty(n, dtype=torch.bool)
    fuse_kernel[(1,)](*columns(), got, take_more, n, HALF_RANGE, PUBLISHED_COST, BLOCK=256)
    expected = [reference.shrinkage(*case) for case in CASES]
    wanted = np.array(
        [((f.baseline + 1) * HALF_RANGE + LOW, f.weight, f.statistic, f.squared_bias, f.mse * HALF_RANGE**2) for f in expected]
    ).T
    np.testing.assert_allclose(got.numpy(), wanted, rtol=1e-12, atol=1e-12)
    wants_more = [
        reference.osla_take_more(case[0], f.squared_bias, 16, PUBLISHED_COST) for case, f in zip(CASES, expected, strict=True)
    ]
    assert take_more.tolist() == wants_more


@pytest.mark.parametrize(
    "rule", [Baseline.GROUP_MEAN, Baseline.PRIOR, Baseline.SHRINKAGE, Baseline.CONJUGATE], ids=lambda rule: rule.name.lower()
)
def test_baseline_of(rule):
    got = torch.empty(len(CASES), dtype=torch.float64)
    counts, means, priors = columns()
    baseline_kernel[(1,)](counts, means, priors, got, len(CASES), HALF_RANGE, RULE=int(rule), BLOCK=256)
    fused = [(reference.shrinkage(*case).baseline + 1) * HALF_RANGE + LOW for case in CASES]
    wanted = {
        Baseline.GROUP_MEAN: torch.where(counts == 0, priors, means),
        Baseline.PRIOR: torch.where(priors.isnan(), means, priors),
        Baseline.SHRINKAGE: torch.tensor(fused, dtype=torch.float64),
        Baseline.CONJUGATE: torch.tensor(
            [reference.conjugate(*map(float, case), HALF_RANGE) for case in zip(counts, means, priors, strict=True)],
            dtype=torch.float64,
        ),
    }
    torch.testing.assert_close(got, wanted[rule], rtol=1e-12, atol=1e-12, equal_nan=True)


@pytest.mark.parametrize(
    "calibration",
    [Calibration(), Calibration(-1.0, 0.3, 30.0, 0.5), Calibration(2.0, -1.0, 1e-4, 1e-12), Calibration(0.1, 1.5, 1e8, 0.01)],
    ids=str,
)
@pytest.mark.parametrize("all_ends", [False, True], ids=["fractions", "whole"])
def test_calibrated_fusion(calibration, all_ends):
    """Compared with the core, which tests/budget/test_calibrated.py compares with arithmetic of 400 digits."""
    samples = [(0, 0.0), (1, 0.0), (1, 1.0), (4, 0.0), (4, 2.5), (4, 4.0), (16, 1.0), (17, 17.0), (300, 7.0), (1024, 700.25)]
    if all_ends:
        samples = [(count, successes) for count, successes in samples if successes == int(successes)]
    cases = [(count, successes, prior) for count, successes in samples for prior in (0.0, 0.004, 0.3, 0.97, 1.0, math.nan)]
    count, successes, prior = (torch.tensor(column, dtype=torch.float64) for column in zip(*cases, strict=True))
    mean = LOW + (HIGH - LOW) * successes / count
    got = torch.empty(4, len(cases), dtype=torch.float64)
    numbers = (calibration.alpha, calibration.beta, calibration.kappa, math.log1p(-calibration.eps) - math.log(calibration.eps))
    calibrated_kernel[(len(cases),)](count.long(), mean, prior, got, len(cases), *numbers, ALL_ENDS=all_ends)
    core = np.array([_core.calibrated(*case, astuple(calibration))[:3] for case in cases]).T
    # A log-likelihood near count * log(count * kappa) is right only to its last digits, and so are the values computed from it.
    np.testing.assert_allclose(got[[0, 2, 3]].numpy(), core, rtol=2e-10, atol=1e-300)
    np.testing.assert_allclose((got[0] + got[1]).numpy(), 1.0, rtol=1e-14)
