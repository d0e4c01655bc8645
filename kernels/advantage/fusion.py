"""Every baseline and stopping rule as a device function of a group's count, mean and prior.

Arguments are in reward units; calibrated fusion takes rewards and priors scaled to [0, 1]. The arithmetic is the same as in
`csrc/include/v05/fusion.hpp` and `stopping.hpp`, and `v05/reference/` specifies all three. Everything is float64, elementwise over
scalars or blocks; counts are int64.

Two rules are for Triton's interpreter. Divisors are never zero, not even where a `tl.where` discards the quotient, because the
interpreter would warn. No Python number is assigned to a variable or passed to tl.log, because it would become float32.
"""

import triton
import triton.language as tl

# v05.methods.Baseline has the same numbers.
GROUP_MEAN = tl.constexpr(0)
PRIOR = tl.constexpr(1)
SHRINKAGE = tl.constexpr(2)
CALIBRATED = tl.constexpr(3)
ZERO = tl.constexpr(4)
BATCH_MEAN = tl.constexpr(5)
ENERGY_MEAN = tl.constexpr(6)
JAMES_STEIN = tl.constexpr(7)
LEAST_VARIANCE = tl.constexpr(8)
BATCH_ENERGY_MEAN = tl.constexpr(9)
CONJUGATE = tl.constexpr(10)

# The baselines that read statistics of the other groups (p_groups), and those that read statistics of the batch (p_batch).
NEEDS_GROUPS = (JAMES_STEIN.value,)
NEEDS_BATCH = (BATCH_MEAN.value, BATCH_ENERGY_MEAN.value, *NEEDS_GROUPS)

# Positions in the (5,) float64 statistics of a batch, p_batch.
BATCH_DIVISOR = tl.constexpr(0)
BATCH_COUNT = tl.constexpr(1)
BATCH_REWARD = tl.constexpr(2)  # the mean of all rewards
BATCH_WEIGHT = tl.constexpr(3)  # the sum of the energies
BATCH_WEIGHTED = tl.constexpr(4)  # the sum of energy * (reward - BATCH_REWARD)

# Positions in the (5,) float64 statistics of the batch's groups, p_groups.
GROUPS_COUNT = tl.constexpr(0)  # number of groups with rollouts
GROUPS_MEAN = tl.constexpr(1)  # mean of their means
GROUPS_VAR = tl.constexpr(2)  # variance of their means
# Variance of a group's mean by chance, averaged over the groups of two or more rollouts: var / k, or var / (k - 1) with one rollout
# left out.
GROUPS_NOISE = tl.constexpr(3)
GROUPS_NOISE_OF_OTHERS = tl.constexpr(4)


@triton.jit
def is_nan(x):
    return x != x


@triton.jit
def shrinkage(count, mean, prior, half_range):
    """V_0.5's empirical shrinkage (arXiv 2603.10848): (baseline, weight, statistic, squared_bias, mse).

    half_range = (hi - lo) / 2 converts reward units to centred units. baseline is in reward units, mse in reward units squared,
    squared_bias in centred units. Without a prior (NaN) the baseline is the mean, without a rollout it is the prior.
    """
    no_prior = is_nan(prior)
    k = tl.maximum(count, 1).to(tl.float64)
    difference = (mean - prior) / half_range
    squared = difference * difference
    statistic = k * squared  # NaN without a prior or a rollout
    weight = 1.0 - 1.0 / tl.where(statistic > 1.0, statistic, 1.0)
    excess = squared - 1.0 / k
    squared_bias = tl.where(no_prior, float("inf"), tl.where(excess > 0.0, excess, 0.0))
    baseline = tl.where(no_prior, mean, tl.where(count == 0, prior, prior + weight * (mean - prior)))
    weight = tl.where(no_prior, 1.0, weight)
    mse = tl.where(count == 0, float("nan"), weight / k * half_range * half_range)
    return baseline, weight, statistic, squared_bias, mse


@triton.jit
def james_stein(count, mean, prior, other_groups, p_groups, LEFT_OUT: tl.constexpr):
    """Shrink the mean towards the mean of the other groups' means (James-Stein, arXiv 2511.03710).

    The weight of the other groups is the share of the differences among groups that chance explains. The baseline of a group of one
    rollout is the mean of the others, also if that rollout is left out. Without other groups it is the group's mean, and without a
    rollout either it is the prior.
    """
    noise = tl.load(p_groups + (GROUPS_NOISE_OF_OTHERS if LEFT_OUT else GROUPS_NOISE))
    excess = tl.load(p_groups + GROUPS_VAR) - tl.load(p_groups + GROUPS_NOISE)
    noisy = noise > 0.0
    total = noise + tl.where(excess > 0.0, excess, 0.0)
    weight = tl.where(noisy, noise / tl.where(noisy, total, 1.0), 0.0)
    shrunk = mean + weight * (other_groups - mean)
    shrunk = tl.where(count < (1 if LEFT_OUT else 2), other_groups, shrunk)
    return tl.where(is_nan(other_groups), tl.where(count == 0, prior, mean), shrunk)


@triton.jit
def conjugate(count, mean, prior, kappa):
    """Fuse the mean with a prior that is worth kappa rollouts: the posterior mean of a Beta prior (EBPO, arXiv 2602.05165).

    Without a prior (NaN) the result is the mean, without a rollout it is the prior.
    """
    k = count.to(tl.float64)
    fused = prior + k / (k + kappa) * (mean - prior)
    return tl.where(is_nan(prior), mean, tl.where(count == 0, prior, fused))


@triton.jit
def baseline_of(
    RULE: tl.constexpr,
    LEFT_OUT: tl.constexpr,
    count,
    mean,
    energy_mean,
    prior,
    kappa,
    batch_mean,
    batch_energy_mean,
    other_groups,
    p_groups,
    half_range,
):
    """The baseline of any method except those with a calibrated prior, in the shape of `mean`.

    Without a prior it is the group mean, without a rollout the prior, and without energies (energy_mean is NaN) the unweighted
    mean.

    With LEFT_OUT, the arguments describe the group and the batch without the rollout in question. `other_groups` is the mean of the
    means of the batch's other groups. p_groups has further statistics for the baselines in NEEDS_GROUPS.
    """
    if RULE == SHRINKAGE:
        return shrinkage(count, mean, prior, half_range)[0]
    elif RULE == PRIOR:
        return tl.where(is_nan(prior), mean, prior)
    elif RULE == CONJUGATE:
        return conjugate(count, mean, prior, kappa)
    elif RULE == ZERO:
        return tl.where(is_nan(mean), 0.0, mean * 0.0)
    elif RULE == BATCH_MEAN:
        return batch_mean
    elif RULE == JAMES_STEIN:
        return james_stein(count, mean, prior, other_groups, p_groups, LEFT_OUT)
    elif RULE == BATCH_ENERGY_MEAN:
        return tl.where(is_nan(batch_energy_mean), batch_mean, batch_energy_mean)
    elif RULE == ENERGY_MEAN:
        plain = tl.where(count == 0, prior, mean)
        return tl.where(is_nan(energy_mean), plain, energy_mean)
    else:
        return tl.where(count == 0, prior, mean)


@triton.jit
def is_alone(RULE: tl.constexpr, count, prior, batch_count, other_groups):
    """Whether a rollout has no baseline but its own reward."""
    alone = count == 1
    if RULE == ZERO:
        alone = count < 0
    if RULE == BATCH_MEAN:
        alone = batch_count == 1
    if RULE == JAMES_STEIN:
        alone &= is_nan(other_groups)
    if RULE == BATCH_ENERGY_MEAN:
        alone = batch_count == 1
    if RULE == PRIOR:
        alone &= is_nan(prior)
    if (RULE == SHRINKAGE) | (RULE == CONJUGATE):
        alone &= is_nan(prior)
    return alone


@triton.jit
def mean_without(reward, count, mean):
    """The mean without this reward; NaN if `count` is 1 or less."""
    others = mean + (mean - reward) / tl.maximum(count - 1, 1).to(tl.float64)
    return tl.where(count > 1, others, float("nan"))


@triton.jit
def osla_take_more(count, squared_bias, max_rollouts, cost):
    """One-step look-ahead (arXiv 2603.10848): take another rollout while it lowers D2 / (k D2 + 1) by more than its cost.

    Centred units. Without a prior D2 is infinite and the fall is 1 / (k (k + 1)).
    """
    k = count.to(tl.float64)
    no_prior = squared_bias == float("inf")
    d2 = tl.where(no_prior, 0.0, squared_bias)
    fall = d2 / (k * d2 + 1.0) - d2 / ((k + 1.0) * d2 + 1.0)
    fall_without_prior = tl.where(count == 0, float("inf"), 1.0 / (tl.where(count == 0, 1.0, k) * (k + 1.0)))
    return (count < max_rollouts) & (tl.where(no_prior, fall_without_prior, fall) > cost)


@triton.jit
def believe(prior, alpha, beta, kappa, log_odds):
    """(a, b, log_odds): the distribution Beta(a, b) of the success rate given a prior in [0, 1], and the log odds that the prior is
    not hallucinated, which are -inf without a prior (NaN).
    """
    no_prior = is_nan(prior)
    v = tl.where(no_prior, 0.5, tl.where(prior < 0.005, 0.005, tl.where(prior > 0.995, 0.995, prior)))
    success = tl.exp(alpha + beta * tl.log(v / (1.0 - v)))  # odds of a success
    log_odds = tl.where(no_prior, float("-inf"), log_odds + v * 0.0)  # a Python number would become float32
    return kappa * (success / (1.0 + success)), kappa / (1.0 + success), log_odds


@triton.jit
def energy_ratio(complement, delta0, delta1):
    """The mean energy of successes over that of failures at the failure rate `complement`."""
    shift = delta0 + delta1 * tl.log(complement)
    return tl.exp(tl.where(shift < -8.0, -8.0, tl.where(shift > 8.0, 8.0, shift)))


@triton.jit
def least_variance(rate, complement, delta0, delta1):
    """The baseline that minimises E[(reward - baseline)^2 energy], for rewards scaled to [0, 1]."""
    success = rate * energy_ratio(complement, delta0, delta1)
    return success / (success + complement)


@triton.jit
def stirling(r):
    """log Gamma(1 / r) minus its leading terms, with an error below 1e-13 for r up to 1/8."""
    r2 = r * r
    return (
        ((8.417508417508418e-4 * r2 - 5.952380952380953e-4) * r2 + 7.936507936507937e-4) * r2 - 2.777777777777778e-3
    ) * r2 * r + r / 12.0


@triton.jit
def log_rising(a, x):
    """log Gamma(a + x) - log Gamma(a) for a > 0, x >= 0, with an error below 1e-12.

    As in likelihood.hpp, a is raised until Stirling's series is accurate. Here the series starts at a smaller a and has more terms,
    because a thread has few registers.
    """
    above = a * 0.0 + 1.0
    below = above + x * 0.0
    for _ in range(8):
        low = a < 8.0
        above *= tl.where(low, a, 1.0)
        below *= tl.where(low, a + x, 1.0)
        a += tl.where(low, 1.0, 0.0)
    r, r_end = 1.0 / a, 1.0 / (a + x)
    share = x * r
    u = 1.0 + share
    log_u = tl.log(u) + (share - (u - 1.0)) * (a * r_end)  # adds back the rounding error of u
    return tl.log(above / below) + (a - 0.5) * log_u + x * (tl.log(a + x) - 1.0) + stirling(r_end) - stirling(r)


@triton.jit
def likelihood_term(term, a, b, successes, failures):
    """One of the terms whose sum is the log-likelihood ratio of a group under Beta(a, b) and under Beta(1/2, 1/2)."""
    start = tl.where(term == 0, a, tl.where(term == 1, b, tl.where(term == 2, a + b, tl.where(term == 5, 1.0, 0.5))))
    steps = tl.where(term % 3 == 0, successes, tl.where(term % 3 == 1, failures, successes + failures))
    rising = log_rising(start, steps)
    return tl.where(term > 5, 0.0, tl.where((term < 2) | (term == 5), rising, -rising))


FEW = tl.constexpr(16)  # up to so many rollouts, products replace Stirling's series


@triton.jit
def log_likelihood_ratio(count, a, b, successes, failures, is_few):
    """The log-likelihood ratio of a group under Beta(a, b) and under Beta(1/2, 1/2), for scalars or 1-D blocks of successes.

    `is_few` means that successes are whole numbers and `count` is at most FEW. The result is then the logarithm of a few products,
    which takes a twentieth of the time on a GPU. Within the bounds of a Calibration the products neither overflow nor underflow.
    """
    ratio = successes * 0.0
    if is_few:
        above, below = ratio + 1.0, ratio + 1.0
        for i in range(0, count.to(tl.int32)):
            above *= (1.0 + i) * tl.where(i < successes, a + i, 1.0) * tl.where(i < failures, b + i, 1.0)
            below *= (a + b + i) * tl.where(i < successes, 0.5 + i, 1.0) * tl.where(i < failures, 0.5 + i, 1.0)
        ratio = tl.log(above / below)
    else:
        for term in range(6):
            ratio += likelihood_term(term, a, b, successes, failures)
    return ratio


@triton.jit
def beta_moments(a, b):
    """(mean, 1 - mean without cancellation, variance) of Beta(a, b)."""
    mean, complement = a / (a + b), b / (a + b)
    return mean, complement, mean * complement / (a + b + 1.0)


@triton.jit
def calibrated(count, successes, all_ends, a, b, log_odds):
    """Calibrated fusion: (baseline, 1 - baseline, variance, hallucination) of the success rate, rewards scaled to [0, 1].

    `successes` is the sum of `count` such rewards. `all_ends` means that all are 0 or 1. a, b and log_odds are from `believe`.
    """
    failures = count.to(tl.float64) - successes
    log_odds += log_likelihood_ratio(count, a, b, successes, failures, all_ends & (count <= FEW))
    rival = tl.exp(-tl.abs(log_odds))  # never overflows
    w0 = tl.where(log_odds > 0.0, rival, 1.0) / (1.0 + rival)
    w1 = tl.where(log_odds > 0.0, 1.0, rival) / (1.0 + rival)
    vague, vague_complement, vague_variance = beta_moments(0.5 + successes, 0.5 + failures)
    informed, complement, variance = beta_moments(a + successes, b + failures)
    difference = informed - vague
    return (
        w1 * informed + w0 * vague,
        w1 * complement + w0 * vague_complement,
        w1 * variance + w0 * vague_variance + w0 * w1 * difference * difference,
        w0,
    )


@triton.jit
def successes_of(count, mean, low, high):
    """The sum of a group's rewards scaled to [0, 1]. Rounding errors around whole numbers are removed, as in judge.hpp."""
    k = count.to(tl.float64)
    total = tl.where(count == 0, 0.0, k * ((mean - low) / (high - low)))
    total = tl.minimum(tl.maximum(total, 0.0), k)
    whole = tl.floor(total + 0.5)
    largest = tl.maximum(tl.abs(k * low), tl.abs(k * high)) / (high - low)
    return tl.where(tl.abs(total - whole) <= 8.0 * 2.220446049250313e-16 * largest, whole, total)


@triton.jit
def calibrated_take_more(count, baseline, complement, variance, max_rollouts, cost):
    """Take another rollout while it lowers the variance of the success rate by more than its cost, as in stopping.hpp."""
    gain = 4.0 * variance * (variance / (baseline * complement))
    return (count < max_rollouts) & (gain > cost)


@triton.jit
def variance_take_more(k, baseline, complement, variance, delta0, delta1, max_rollouts, cost):
    """Take another rollout while it lowers the variance of the group's gradient by more than its cost, as in stopping.hpp.

    `k` is the count as float64. A group without rollouts takes one at any cost.
    """
    product = baseline * complement
    spread = product - variance
    failure = (complement * spread + variance) / (product + variance)
    ratio = energy_ratio(failure, delta0, delta1)
    gradient_variance = 4.0 * spread * ratio / (ratio + failure * (1.0 - ratio))
    return (k < max_rollouts) & (gradient_variance > cost * k * (k + 1.0))
