"""Every baseline and stopping rule as a pure device function of a group's count, mean and prior, in reward units;
calibrated fusion of rewards and priors scaled to [0, 1].

The same arithmetic as `csrc/include/v05/fusion.hpp` and `stopping.hpp`; `v05/reference/` is the specification of all
three. Float64 throughout, elementwise over scalars or blocks; counts are int64. Two habits are for Triton's
interpreter. No operand ever divides by zero, also not where a `tl.where` discards the quotient: it would warn. No bare
number is assigned to a variable or passed to tl.log: it would become float32.
"""

import triton
import triton.language as tl

# Shared by number with v05.methods.Baseline.
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

# The baselines that read the batch's groups, and those that read the batch.
NEEDS_GROUPS = (JAMES_STEIN.value,)
NEEDS_BATCH = (BATCH_MEAN.value, BATCH_ENERGY_MEAN.value, *NEEDS_GROUPS)

# What is known of a batch, in the order of its (5,) float64.
BATCH_DIVISOR = tl.constexpr(0)
BATCH_COUNT = tl.constexpr(1)
BATCH_REWARD = tl.constexpr(2)  # the mean of all rewards
BATCH_WEIGHT = tl.constexpr(3)  # the sum of the energies
BATCH_WEIGHTED = tl.constexpr(4)  # the sum of energy * (reward - BATCH_REWARD)

# What is known of its groups, in the order of their (5,) float64.
GROUPS_COUNT = tl.constexpr(0)  # that have rollouts
GROUPS_MEAN = tl.constexpr(1)  # of their means
GROUPS_VAR = tl.constexpr(2)  # of their means
# Over the groups of two rollouts or more, how far chance alone moves their means: the mean of var / k, with a rollout left out
# of var / (k - 1).
GROUPS_NOISE = tl.constexpr(3)
GROUPS_NOISE_OF_OTHERS = tl.constexpr(4)


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
def james_stein(count, mean, prior, other_groups, p_groups, LEFT_OUT: tl.constexpr):
    """The mean shrunk towards the mean of the other groups' means (James-Stein, arXiv 2511.03710), as far as chance alone
    explains how the groups' means differ. A group of one rollout has the others' mean, also where that one is left out.
    Without other groups the mean stands, without a rollout either the prior.
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
    """The mean fused with a prior that is worth kappa rollouts: a Beta prior's posterior mean (EBPO, arXiv 2602.05165). A NaN
    prior is no prior: the mean stands. Without a rollout the prior stands.
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
    """The baseline of any method but calibrated fusion, in the shape of `mean`. Without a prior the group mean stands in,
    without a rollout the prior, without an energy (energy_mean is NaN) the plain mean.

    All of it is of the group and the batch or, where LEFT_OUT says so, of a rollout's others; `other_groups` is the mean of the
    means of the batch's other groups. What else NEEDS_GROUPS gives a rule is at p_groups.
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
    """Whether there is nothing to compare a rollout with: then its baseline is its own reward, or nothing."""
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
    """The mean of the other rollouts; NaN without others."""
    others = mean + (mean - reward) / tl.maximum(count - 1, 1).to(tl.float64)
    return tl.where(count > 1, others, float("nan"))


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
def believe(prior, alpha, beta, kappa, log_odds):
    """(a, b, log_odds): Beta(a, b) of the success rate that a prior in [0, 1] is taken for, and the log odds that it is not
    hallucinated, as given. A NaN prior is no prior: odds of 0.
    """
    no_prior = is_nan(prior)
    v = tl.where(no_prior, 0.5, tl.where(prior < 0.005, 0.005, tl.where(prior > 0.995, 0.995, prior)))
    success = tl.exp(alpha + beta * tl.log(v / (1.0 - v)))  # its odds
    log_odds = tl.where(no_prior, float("-inf"), log_odds + v * 0.0)  # a bare number would count as float32
    return kappa * (success / (1.0 + success)), kappa / (1.0 + success), log_odds


@triton.jit
def energy_ratio(complement, delta0, delta1):
    """The mean energy of successes over that of failures, where `complement` is the failure rate."""
    shift = delta0 + delta1 * tl.log(complement)
    return tl.exp(tl.where(shift < -8.0, -8.0, tl.where(shift > 8.0, 8.0, shift)))


@triton.jit
def least_variance(rate, complement, delta0, delta1):
    """The baseline for which E[(reward - baseline)^2 energy] is least, rewards scaled to [0, 1]."""
    success = rate * energy_ratio(complement, delta0, delta1)
    return success / (success + complement)


@triton.jit
def stirling(r):
    """log Gamma(1 / r) less its leading terms, to 1e-13 for r up to 1/8."""
    r2 = r * r
    return (
        ((8.417508417508418e-4 * r2 - 5.952380952380953e-4) * r2 + 7.936507936507937e-4) * r2 - 2.777777777777778e-3
    ) * r2 * r + r / 12.0


@triton.jit
def log_rising(a, x):
    """log Gamma(a + x) - log Gamma(a) for a > 0, x >= 0, to 1e-12; as in fusion.hpp a is raised to where Stirling's series
    holds, which here starts earlier and has more terms: a thread's registers are few.
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
    log_u = tl.log(u) + (share - (u - 1.0)) * (a * r_end)  # what the sum rounds away is put back
    return tl.log(above / below) + (a - 0.5) * log_u + x * (tl.log(a + x) - 1.0) + stirling(r_end) - stirling(r)


@triton.jit
def likelihood_term(term, a, b, successes, failures):
    """The logarithm of how much likelier a group is under Beta(a, b) than under Beta(1/2, 1/2) is the sum of terms 0 to 7."""
    start = tl.where(term == 0, a, tl.where(term == 1, b, tl.where(term == 2, a + b, tl.where(term == 5, 1.0, 0.5))))
    steps = tl.where(term % 3 == 0, successes, tl.where(term % 3 == 1, failures, successes + failures))
    rising = log_rising(start, steps)
    return tl.where(term > 5, 0.0, tl.where((term < 2) | (term == 5), rising, -rising))


FEW = tl.constexpr(16)  # rollouts, up to which products of whole numbers stand in for Stirling's series


@triton.jit
def log_likelihood_ratio(count, a, b, successes, failures, is_few):
    """That sum, for scalars or 1-D blocks of successes; the terms lie side by side, a thread each.

    is_few says that successes are whole and `count` is at most FEW: then it is the logarithm of a few products, which takes a GPU a
    twentieth of the time. Within the bounds of a Calibration they neither overflow nor vanish.
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
    """(mean, 1 - mean with all its digits, variance) of Beta(a, b)."""
    mean, complement = a / (a + b), b / (a + b)
    return mean, complement, mean * complement / (a + b + 1.0)


@triton.jit
def calibrated(count, successes, all_ends, a, b, log_odds):
    """Calibrated fusion: (baseline, 1 - baseline, variance, hallucination) of the success rate, rewards scaled to [0, 1].

    `successes` is the sum of `count` such rewards; all_ends says that they are 0 and 1 alone; a, b and log_odds are what `believe`
    makes of the prior.
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
    """The sum of a group's rewards scaled to [0, 1]; a whole number is one again after rounding, as in advantage.cpp."""
    k = count.to(tl.float64)
    total = tl.where(count == 0, 0.0, k * ((mean - low) / (high - low)))
    total = tl.minimum(tl.maximum(total, 0.0), k)
    whole = tl.floor(total + 0.5)
    largest = tl.maximum(tl.abs(k * low), tl.abs(k * high)) / (high - low)
    return tl.where(tl.abs(total - whole) <= 8.0 * 2.220446049250313e-16 * largest, whole, total)


@triton.jit
def calibrated_take_more(count, baseline, complement, variance, max_rollouts, cost):
    """Another rollout while the variance of the success rate would fall by more than its cost, as in stopping.hpp."""
    gain = 4.0 * variance * (variance / (baseline * complement))
    return (count < max_rollouts) & (gain > cost)


@triton.jit
def variance_take_more(k, baseline, complement, variance, delta0, delta1, max_rollouts, cost):
    """Another rollout while the variance of the group's gradient would fall by more than its cost, as in stopping.hpp; `k` is the
    count as float64. A group without rollouts asks at any cost.
    """
    product = baseline * complement
    spread = product - variance
    failure = (complement * spread + variance) / (product + variance)
    ratio = energy_ratio(failure, delta0, delta1)
    gradient_variance = 4.0 * spread * ratio / (ratio + failure * (1.0 - ratio))
    return (k < max_rollouts) & (gradient_variance > cost * k * (k + 1.0))
