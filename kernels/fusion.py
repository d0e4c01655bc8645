"""Every baseline and stopping rule as a pure device function of a group's count, mean and prior, in reward units.

The same arithmetic as `csrc/include/v05/fusion.hpp` and `stopping.hpp`; `v05/reference.py` is the specification of all
three. Float64 throughout, elementwise over scalars or blocks; counts are int64. No operand ever divides by zero, also
not where a `tl.where` discards the quotient: Triton's interpreter would warn.
"""

import triton
import triton.language as tl

# Shared by number with v05.methods.Baseline.
GROUP_MEAN = tl.constexpr(0)
PRIOR = tl.constexpr(1)
SHRINKAGE = tl.constexpr(2)


@triton.jit
def is_nan(x):
    return x != x


@triton.jit
def shrinkage(count, mean, prior, half_range):
    """V_0.5's empirical shrinkage (arXiv 2603.10848): (baseline, weight, statistic, squared_bias, mse).

    half_range = (hi - lo) / 2 carries reward units to centred ones. baseline is in reward units, mse in reward units
    squared, squared_bias in centred units. A NaN prior is no prior: the mean stands. Without a rollout the prior
    stands.
    """
    no_prior = is_nan(prior)
    k = tl.maximum(count, 1).to(tl.float64)
    difference = (mean - prior) / half_range
    squared = difference * difference
    statistic = k * squared  # NaN without a prior or a rollout, for then `difference` is
    weight = 1.0 - 1.0 / tl.where(statistic > 1.0, statistic, 1.0)
    excess = squared - 1.0 / k
    squared_bias = tl.where(no_prior, float("inf"), tl.where(excess > 0.0, excess, 0.0))
    baseline = tl.where(no_prior, mean, tl.where(count == 0, prior, prior + weight * (mean - prior)))
    weight = tl.where(no_prior, 1.0, weight)
    mse = tl.where(count == 0, float("nan"), weight / k * half_range * half_range)
    return baseline, weight, statistic, squared_bias, mse


@triton.jit
def baseline_of(RULE: tl.constexpr, count, mean, prior, half_range):
    """The baseline of any method. Without a prior the group mean stands in, without a rollout the prior."""
    if RULE == SHRINKAGE:
        return shrinkage(count, mean, prior, half_range)[0]
    elif RULE == PRIOR:
        return tl.where(is_nan(prior), mean, prior)
    else:
        return tl.where(count == 0, prior, mean)


@triton.jit
def osla_take_more(count, squared_bias, max_rollouts, cost):
    """One-step look-ahead (arXiv 2603.10848): another rollout while D2 / (k D2 + 1) would fall by more than its cost.

    Centred units. Without a prior D2 is infinite and the fall is 1 / (k (k + 1)).
    """
    k = count.to(tl.float64)
    no_prior = squared_bias == float("inf")
    d2 = tl.where(no_prior, 0.0, squared_bias)
    fall = d2 / (k * d2 + 1.0) - d2 / ((k + 1.0) * d2 + 1.0)
    fall_without_prior = tl.where(count == 0, float("inf"), 1.0 / (tl.where(count == 0, 1.0, k) * (k + 1.0)))
    return (count < max_rollouts) & (tl.where(no_prior, fall_without_prior, fall) > cost)


@triton.jit
def erfc_of_sqrt(y):
    """erfc(sqrt(y)) of a float64 scalar y >= 0, to about 1e-14 relative; a tail of 1e-300 keeps its digits.

    With x = sqrt(y), erfc(x) = (2 x / pi) exp(-y) * integral over t > 0 of exp(-t^2) / (t^2 + x^2). The midpoint rule
    with step h = 1/2 errs by exp(-(pi / h)^2) = 7e-18 once the pole at t = ix is accounted for, which it is by adding 2
    / (1 + exp(2 pi x / h)) while x < pi / h (Hunter & Regan 1972). No difference is taken, so no digit cancels. Not
    tl.erf: 1 - erf(x) has no digits in the tail, and libdevice's erfc is missing from the interpreter.
    """
    x = tl.sqrt(y)
    t = (tl.arange(0, 16).to(tl.float64) + 0.5) * 0.5  # exp(-t^2) of the last is 1e-26
    x_or_more = tl.where(x > 0.0, x, 1.0)  # at 0 the integral is not needed
    integral = 0.5 * tl.sum(tl.exp(-t * t) / (t * t + x_or_more * x_or_more))
    near = x < 6.283185307179586
    pole = tl.where(near, 2.0 / (1.0 + tl.exp(12.566370614359172 * tl.where(near, x, 0.0))), 0.0)
    return 0.6366197723675814 * x * tl.exp(-y) * integral + pole


@triton.jit
def p_value(statistic):
    """Of a test statistic under chi-square with one degree of freedom; NaN stays NaN."""
    return erfc_of_sqrt(0.5 * statistic)
