"""What finished groups say of the prior: the numbers of a `Calibration`, fitted to the stream of past groups.

Success rates are modelled as a Beta around the calibrated prior, mixed with a vague Beta for priors that say nothing here
(`v05.reference.calibrated`). The rewards of a group, their rate integrated out, then have a likelihood in closed form, and the
four numbers that make recent groups likeliest are fitted to them (empirical Bayes; robust mixture priors: Schmidli et al. 2014).

The baseline that minimises the gradient's variance is not the success rate p but E[reward energy] / E[energy], whose log-odds are
those of p and log(w1 / w0), w1 and w0 the mean energies of successes and of failures. So the shift delta0 + delta1 log(1 - p) is a
logistic regression of the rewards in which every rollout weighs as much as its energy, beside p as the four numbers and the group's
other rollouts have it. It is convex, and what it minimises is least where E[(reward - baseline)^2 energy] is. The energies differ
where a policy is sure of its successes, hence log(1 - p) and not logit p, which would have them differ where it is sure to fail.
The shift goes with groups of the sizes that it was fitted to: beside a belief that more rollouts made surer it is another.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import astuple, fields, replace
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.optimize import minimize
from scipy.special import betaln, expit, gammaln, logit, psi

from v05.methods import Calibration
from v05.prior import kept_array, refuse_values

FEWEST_GROUPS = 64  # below these the default stands
LEAST_PRIOR = 0.005  # priors are kept within [0.005, 0.995], as in fusion.hpp
RESTRAINT = 0.1  # what the pull to the default weighs, in groups: enough to settle what the data leave open
VAGUE = 0.5  # both parameters of the vague Beta
MOST_SHIFT = 8.0  # as in fusion.hpp
SHIFT_TOLERANCE = 1e-6
SHIFT_RESTRAINT = 2.0  # what the pull of the shift to 0 weighs, in rollouts of average energy whose outcome is open
MAX_ITERATIONS = 200
TOLERANCE = 1e-4  # of the gradient a group; sampling noise is fifty times that even with 4096 groups
# Bounds of (alpha, beta, log kappa, logit eps). Data meet them only where they cannot tell what lies beyond.
BOUNDS = ((-20.0, 20.0), (-10.0, 10.0), (-5.0, 12.0), (-12.0, 12.0))
ROUNDING = 1e-9  # by which a sum of rewards may leave [0, count]

Objective = Callable[[NDArray[np.float64]], tuple[float, NDArray[np.float64]]]


class Calibrator:
    """Keeps the latest groups and fits the `Calibration` to them that their rewards make likeliest.

    A group with prior v weighs v (1 - v): squared error comes from groups that may go either way, and the many that are as good as
    settled would otherwise have the last word where the model is too simple. A weight that depends on the prior alone changes
    nothing where the model is right.

    `observe` is cheap; `fit` takes milliseconds and need not run before every step: a step uses the last fit.

    Args:
        window: groups that are kept; the oldest go first.
        half_life: groups after which one counts half, so that a policy on the move is followed; None weighs all alike.

    Attributes:
        calibration: the last good fit; `Calibration()`, the default, until 64 groups were seen.
        failed_fits: fits that did not converge since the start; the one before them stayed.

    Raises:
        ValueError: an argument is out of bounds.
    """

    def __init__(self, window: int = 4096, half_life: float | None = 2048.0) -> None:
        if window < FEWEST_GROUPS:
            raise ValueError(f"window={window} holds fewer than the {FEWEST_GROUPS} groups that a fit needs; give more")
        if half_life is not None and not half_life > 0:
            raise ValueError(f"half_life={half_life} is not a positive number of groups; None weighs all groups alike")
        self.calibration = Calibration()
        self.failed_fits = 0
        self._window = window
        self._half_life = half_life
        self._groups = np.zeros((3, 0))  # successes, counts, priors; oldest first
        self._energies = np.zeros((2, 0))  # of their successes and of their failures

    def observe(self, successes: ArrayLike, counts: ArrayLike, priors: ArrayLike, energies: ArrayLike | None = None) -> None:
        """Remember G finished groups. Those without a prior (NaN) or without a rollout teach nothing and are left out.

        Args:
            successes: (G,) sums of rewards, each scaled to [0, 1].
            counts: (G,) valid rollouts.
            priors: (G,) scaled to [0, 1], as they were before the rewards were seen.
            energies: (2, G) sums over a group's rollouts of energy times reward, and of energy times 1 - reward (`v05.energy`).
                Without them the groups have no say in the shift.

        Raises:
            ValueError: shapes differ, a sum is outside [0, count], a prior outside [0, 1], an energy is negative or not finite.
                Nothing is remembered then.
        """
        columns = [np.asarray(values, dtype=np.float64) for values in (successes, counts, priors)]
        shapes = [values.shape for values in columns]
        if columns[0].ndim != 1 or len(set(shapes)) > 1:
            raise ValueError(f"successes, counts and priors have shapes {shapes}; give one number a group in each")
        x, k, v = columns
        for name, values, bad, remedy in (
            ("counts", k, ~((k >= 0) & np.isfinite(k)), "give the valid rollouts of each group"),
            ("successes", x, ~((x >= -ROUNDING) & (x <= k * (1 + ROUNDING))), "scale rewards to [0, 1] before they are summed"),
            ("priors", v, (v < 0) | (v > 1), "scale them to [0, 1]; NaN is no prior"),
        ):
            if bad.any():
                group = int(np.flatnonzero(bad)[0])
                raise ValueError(f"{name}[{group}]={values[group]} is out of bounds ({int(bad.sum())} such groups); {remedy}")
        spent = np.zeros((2, len(k))) if energies is None else np.asarray(energies, dtype=np.float64)
        if spent.shape != (2, len(k)):
            raise ValueError(f"energies has shape {spent.shape}; give two numbers for each of {len(k)} groups, (2, G)")
        wrong = ~((spent >= 0) & np.isfinite(spent)).all(axis=0)
        if wrong.any():
            group = int(np.flatnonzero(wrong)[0])
            raise ValueError(f"energies[:, {group}]={spent[:, group].tolist()} are no finite numbers of at least 0")
        teaches = (k > 0) & ~np.isnan(v)
        seen = np.stack([np.clip(x, 0.0, k), k, v])[:, teaches]
        self._groups = np.concatenate([self._groups, seen], axis=1)[:, -self._window :]
        self._energies = np.concatenate([self._energies, spent[:, teaches]], axis=1)[:, -self._window :]

    def fit(self, by_variances: bool = False) -> Calibration:
        """Fit `calibration` anew, starting from the last. It stays as it is on too few groups or if the fit does not converge.

        With `by_variances` kappa alone is fitted, as EBPO does (`kappa_of_variances`).
        """
        if self._groups.shape[1] < FEWEST_GROUPS:
            return self.calibration
        successes, counts, priors = self._groups
        ages = np.arange(len(counts))[::-1]
        recency = np.ones(len(ages)) if self._half_life is None else np.exp2(-ages / self._half_life)
        if by_variances:
            self.calibration = Calibration(kappa=kappa_of_variances(successes, counts, recency))
            return self.calibration
        clipped = _clipped(priors)
        found = minimize(
            negative_log_likelihood(successes, counts, priors, recency * clipped * (1 - clipped)),
            _numbers(self.calibration),
            method="L-BFGS-B",
            jac=True,
            bounds=BOUNDS,
            options={"maxiter": MAX_ITERATIONS, "ftol": 0.0, "gtol": TOLERANCE},
        )
        if found.success and np.isfinite(found.x).all():
            alpha, beta, log_kappa, logit_eps = map(float, found.x)
            rates = Calibration(alpha, beta, math.exp(log_kappa), float(expit(logit_eps)))
            shift = fitted_shift(self._groups, self._energies * recency, rates, (self.calibration.delta0, self.calibration.delta1))
            self.calibration = replace(rates, delta0=shift[0], delta1=shift[1])
        else:
            self.failed_fits += 1
        return self.calibration

    def state_dict(self) -> dict[str, NDArray[Any]]:
        """The groups kept, (3, groups), their energies, (2, groups), the last fit, how many failed: numeric arrays by name."""
        return {
            "groups": self._groups.copy(),
            "energies": self._energies.copy(),
            "calibration": np.array(astuple(self.calibration)),
            "failed_fits": np.array(self.failed_fits),
        }

    def load_state_dict(self, state: dict[str, NDArray[Any]]) -> None:
        """Go on from what `state_dict` of a calibrator with the same settings gave: fits are the same to the last bit."""
        groups, numbers = kept_array(state, "groups", (3, None)), kept_array(state, "calibration", (len(fields(Calibration)),))
        energies = kept_array(state, "energies", (2, groups.shape[1]))
        failed_fits = int(kept_array(state, "failed_fits", ()))
        successes, counts, priors = groups
        refuse_values("energies", energies < 0)
        refuse_values("groups", (counts <= 0) | (successes < 0) | (successes > counts) | (priors < 0) | (priors > 1))
        self.calibration = Calibration(*map(float, numbers))  # which refuses numbers out of bounds
        self._groups, self._energies, self.failed_fits = groups.copy(), energies.copy(), failed_fits


def kappa_of_variances(successes: NDArray[np.float64], counts: NDArray[np.float64], weights: NDArray[np.float64]) -> float:
    """How many rollouts the mean of all prompts is worth for one of them: s2 / tau2, the variance of rewards within a prompt over
    that of success rates among prompts (EBPO, arXiv 2602.05165).

    Both are estimated by moments from groups of two rollouts or more, (G,) weighed; without such groups the default stands. EBPO
    weighs all past groups alike, and so does nothing here where the policy stands still.
    """
    several = counts > 1
    if not several.any():
        return Calibration().kappa
    x, k, w = successes[several], counts[several], weights[several]
    means = x / k
    within = float(w @ (x * (1 - means)) / (w @ (k - 1)))
    spread = float(w @ np.square(means - np.average(means, weights=w)) / w.sum())
    among = spread - within * float(np.average(1 / k, weights=w))  # less what chance adds
    least, most = (math.exp(bound) for bound in BOUNDS[2])
    return min(max(within / among, least), most) if among > 0 else most


def negative_log_likelihood(
    successes: NDArray[np.float64], counts: NDArray[np.float64], priors: NDArray[np.float64], weights: NDArray[np.float64]
) -> Objective:
    """The function that a fit minimises: of theta = (alpha, beta, log kappa, logit eps), its value and (4,) gradient.

    It is the weighted mean over G groups, arguments (G,), of -log((1 - eps) m1 + eps m0), m1 and m0 the marginal likelihoods under
    the calibrated and the vague Beta; plus (theta - default)^2 / 2, which weighs RESTRAINT times the heaviest group.
    """
    logits = logit(_clipped(priors))
    failures = counts - successes
    sizes, size_of = np.unique(counts, return_inverse=True)
    log_m0 = betaln(successes + VAGUE, failures + VAGUE) - betaln(VAGUE, VAGUE)
    shares = weights / weights.sum()
    default = _numbers(Calibration())

    def objective(theta: NDArray[np.float64]) -> tuple[float, NDArray[np.float64]]:
        alpha, beta, log_kappa, logit_eps = theta
        kappa = math.exp(log_kappa)
        q, complement = expit(alpha + beta * logits), expit(-alpha - beta * logits)
        a, b = kappa * q, kappa * complement
        log_size = (gammaln(sizes + kappa) - gammaln(kappa))[size_of]
        log_m1 = gammaln(successes + a) - gammaln(a) + gammaln(failures + b) - gammaln(b) - log_size
        informed = log_m1 - np.logaddexp(0.0, logit_eps)
        vague = log_m0 - np.logaddexp(0.0, -logit_eps)
        evidence = np.logaddexp(informed, vague)
        hallucination = np.exp(vague - evidence)

        believed = shares * (1.0 - hallucination)
        slope_a, slope_b = psi(successes + a) - psi(a), psi(failures + b) - psi(b)
        slope_size = (psi(sizes + kappa) - psi(kappa))[size_of]
        by_logit = believed * (slope_a - slope_b) * a * complement
        gradient = np.array(
            [
                by_logit.sum(),
                by_logit @ logits,
                believed @ (a * slope_a + b * slope_b - kappa * slope_size),
                shares @ hallucination - expit(logit_eps),
            ]
        )
        away = (theta - default) * RESTRAINT * shares.max()
        return float(0.5 * away @ (theta - default) - shares @ evidence), away - gradient

    return objective


def fitted_shift(
    groups: NDArray[np.float64], energies: NDArray[np.float64], rates: Calibration, start: tuple[float, float]
) -> tuple[float, float]:
    """(delta0, delta1): how far the log-odds of the least-variance baseline are from those of the success rate.

    Args:
        groups: (3, G) successes, counts and priors.
        energies: (2, G) of successes and of failures, weighed by age; their unit says nothing.
        rates: what the priors are trusted by. The success rate of a rollout is what is believed without it, leave-one-out.
        start: where the search begins; the function is convex and Newton's method finds its least value.

    Where there are no energies the shift is 0.
    """
    total = energies.sum(axis=0)
    known = total > 0
    if not known.any():
        return 0.0, 0.0
    successes, counts, priors = groups[:, known]
    weights = energies[:, known] * (counts.sum() / total[known].sum())  # a rollout of average energy weighs 1
    others = np.stack([np.maximum(successes - 1, 0.0), np.minimum(successes, counts - 1)])  # of a success, and of a failure
    believed = posterior_means(others, counts - 1, priors, rates)
    features = np.stack([np.ones_like(believed), np.log1p(-believed)])
    log_odds = logit(believed)
    outcome = np.array([[1.0], [0.0]])
    shift = np.array(start)
    for _ in range(MAX_ITERATIONS):
        baselines = expit(log_odds + np.clip(np.tensordot(shift, features, 1), -MOST_SHIFT, MOST_SHIFT))
        slope = np.tensordot(features, weights * (outcome - baselines), 2) - SHIFT_RESTRAINT * shift
        spread = weights * baselines * (1 - baselines)
        curvature = np.tensordot(features * spread, features, ((1, 2), (1, 2))) + SHIFT_RESTRAINT * np.eye(2)
        step = np.linalg.solve(curvature, slope)
        shift = np.clip(shift + step / max(1.0, np.abs(step).max() / 2), -MOST_SHIFT, MOST_SHIFT)
        if np.abs(step).max() < SHIFT_TOLERANCE:
            break
    return float(shift[0]), float(shift[1])


def posterior_means(
    successes: NDArray[np.float64], counts: NDArray[np.float64], priors: NDArray[np.float64], rates: Calibration
) -> NDArray[np.float64]:
    """What is believed of success rates, as `v05.reference.calibrated` has it; arguments that broadcast."""
    logits = logit(_clipped(priors))
    a, b = rates.kappa * expit(rates.alpha + rates.beta * logits), rates.kappa * expit(-rates.alpha - rates.beta * logits)
    failures = counts - successes
    log_m1 = betaln(successes + a, failures + b) - betaln(a, b)
    log_m0 = betaln(successes + VAGUE, failures + VAGUE) - betaln(VAGUE, VAGUE)
    hallucination = expit(logit(rates.eps) + log_m0 - log_m1)
    informed, vague = (successes + a) / (counts + a + b), (successes + VAGUE) / (counts + 2 * VAGUE)
    means: NDArray[np.float64] = (1 - hallucination) * informed + hallucination * vague
    return means


def _clipped(priors: NDArray[np.float64]) -> NDArray[np.float64]:
    return np.clip(priors, LEAST_PRIOR, 1 - LEAST_PRIOR)


def _numbers(calibration: Calibration) -> NDArray[np.float64]:
    """theta of a calibration."""
    return np.array([calibration.alpha, calibration.beta, math.log(calibration.kappa), float(logit(calibration.eps))])
