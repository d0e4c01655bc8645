"""Fits the numbers of a `Calibration` to the stream of past groups, to learn how far the prior can be trusted.

Success rates are modelled as a Beta distribution around the calibrated prior, mixed with a vague Beta for prompts where the prior
carries no information (`v05.reference.calibrated`). With the success rate integrated out, the rewards of a group have a likelihood
in closed form. The fit chooses the four numbers that maximise the likelihood of recent groups (empirical Bayes; robust mixture
priors: Schmidli et al. 2014).

The baseline that minimises the gradient's variance is not the success rate p but E[reward energy] / E[energy]. Its log-odds are
logit(p) + log(w1 / w0), where w1 and w0 are the mean energies of successes and of failures. The shift delta0 + delta1 log(1 - p)
estimates log(w1 / w0). It is fitted as a logistic regression of the rewards with each rollout weighted by its energy; the offset is
the logit of p, estimated from the four numbers and the group's other rollouts. The objective is convex, and its minimum is where
E[(reward - baseline)^2 energy] is smallest. The regressor is log(1 - p) because energies differ most where a policy is sure of its
successes; logit p would make them differ as much where the policy is sure to fail. The shift is valid for groups of the sizes that
it was fitted on, because the estimate of p is more certain in larger groups.
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

FEWEST_GROUPS = 64  # with fewer groups the calibration keeps its default
LEAST_PRIOR = 0.005  # priors are clipped to [0.005, 0.995], as in fusion.hpp
RESTRAINT = 0.1  # weight of the pull towards the default, in groups; it decides only numbers that the data leave undetermined
VAGUE = 0.5  # both parameters of the vague Beta
MOST_SHIFT = 8.0  # as in fusion.hpp
SHIFT_TOLERANCE = 1e-6
SHIFT_RESTRAINT = 2.0  # factor of the penalty |shift|^2 / 2; a rollout of average energy has weight 1
MAX_ITERATIONS = 200
TOLERANCE = 1e-4  # of the mean gradient over groups; its sampling noise is fifty times larger even with 4096 groups
# Bounds of (alpha, beta, log kappa, logit eps). A fit reaches them only where the data cannot distinguish larger values.
BOUNDS = ((-20.0, 20.0), (-10.0, 10.0), (-5.0, 12.0), (-12.0, 12.0))
ROUNDING = 1e-9  # relative excess over [0, count] that is allowed for a sum of rewards

Objective = Callable[[NDArray[np.float64]], tuple[float, NDArray[np.float64]]]


class Calibrator:
    """Keeps the latest groups and fits the `Calibration` that maximises the likelihood of their rewards.

    A group with prior v has weight v (1 - v). The baseline's squared error comes mostly from groups with an uncertain outcome;
    without the weight, the many groups with a near-certain outcome would dominate the fit wherever the model is too simple. A
    weight that depends on the prior alone does not bias the fit where the model is right.

    `observe` is cheap. `fit` takes milliseconds and need not run before every step: steps use the last fit.

    Args:
        window: the number of groups kept; the oldest are dropped first.
        half_life: a group's weight halves after this many newer groups, so that the fit follows a changing policy. None weighs all
            groups equally.

    Attributes:
        calibration: the last fit that converged; the default `Calibration()` until 64 groups have been seen.
        failed_fits: the number of fits that did not converge. After such a fit the previous calibration stays in use.

    Raises:
        ValueError: an argument is out of bounds.
    """

    def __init__(self, window: int = 4096, half_life: float | None = 2048.0) -> None:
        if window < FEWEST_GROUPS:
            raise ValueError(f"window={window} holds fewer than the {FEWEST_GROUPS} groups that a fit needs; give more")
        if half_life is not None and not half_life > 0:
            raise ValueError(f"half_life={half_life} is not a positive number of groups; None weighs all groups equally")
        self.calibration = Calibration()
        self.failed_fits = 0
        self._window = window
        self._half_life = half_life
        self._groups = np.zeros((3, 0))  # successes, counts, priors; oldest first
        self._energies = np.zeros((2, 0))  # of their successes and of their failures

    def observe(self, successes: ArrayLike, counts: ArrayLike, priors: ArrayLike, energies: ArrayLike | None = None) -> None:
        """Remember G finished groups. Groups without a prior (NaN) or without a rollout are skipped.

        Args:
            successes: (G,) sums of each group's rewards, with rewards scaled to [0, 1].
            counts: (G,) numbers of valid rollouts.
            priors: (G,) priors scaled to [0, 1], as they were before the rewards were seen.
            energies: (2, G) sums over a group's rollouts of energy times reward, and of energy times 1 - reward (`v05.energy`).
                Groups without energies do not affect the shift.

        Raises:
            ValueError: shapes differ, a sum is outside [0, count], a prior is outside [0, 1], or an energy is negative or not
                finite. No group is remembered then.
        """
        columns = [np.asarray(values, dtype=np.float64) for values in (successes, counts, priors)]
        shapes = [values.shape for values in columns]
        if columns[0].ndim != 1 or len(set(shapes)) > 1:
            raise ValueError(f"successes, counts and priors have shapes {shapes}; give one number per group in each")
        x, k, v = columns
        for name, values, bad, remedy in (
            ("counts", k, ~((k >= 0) & np.isfinite(k)), "give the number of valid rollouts of each group"),
            ("successes", x, ~((x >= -ROUNDING) & (x <= k * (1 + ROUNDING))), "scale rewards to [0, 1] before they are summed"),
            ("priors", v, (v < 0) | (v > 1), "scale them to [0, 1]; NaN means no prior"),
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
            raise ValueError(f"energies[:, {group}]={spent[:, group].tolist()} are not finite numbers of at least 0")
        teaches = (k > 0) & ~np.isnan(v)
        seen = np.stack([np.clip(x, 0.0, k), k, v])[:, teaches]
        self._groups = np.concatenate([self._groups, seen], axis=1)[:, -self._window :]
        self._energies = np.concatenate([self._energies, spent[:, teaches]], axis=1)[:, -self._window :]

    def fit(self, by_variances: bool = False) -> Calibration:
        """Fit `calibration` again, starting from the last fit, and return it.

        It stays unchanged if there are fewer than 64 groups or if the fit does not converge. With `by_variances` only kappa is
        fitted, as in EBPO (`kappa_of_variances`).
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
        """Numeric arrays by name: the kept groups (3, G), their energies (2, G), the last fit, and the number of failed fits."""
        return {
            "groups": self._groups.copy(),
            "energies": self._energies.copy(),
            "calibration": np.array(astuple(self.calibration)),
            "failed_fits": np.array(self.failed_fits),
        }

    def load_state_dict(self, state: dict[str, NDArray[Any]]) -> None:
        """Resume from the `state_dict` of a calibrator with the same settings. Later fits are then bitwise the same."""
        groups, numbers = kept_array(state, "groups", (3, None)), kept_array(state, "calibration", (len(fields(Calibration)),))
        energies = kept_array(state, "energies", (2, groups.shape[1]))
        failed_fits = int(kept_array(state, "failed_fits", ()))
        successes, counts, priors = groups
        refuse_values("energies", energies < 0)
        refuse_values("groups", (counts <= 0) | (successes < 0) | (successes > counts) | (priors < 0) | (priors > 1))
        self.calibration = Calibration(*map(float, numbers))  # raises ValueError for numbers out of bounds
        self._groups, self._energies, self.failed_fits = groups.copy(), energies.copy(), failed_fits


def kappa_of_variances(successes: NDArray[np.float64], counts: NDArray[np.float64], weights: NDArray[np.float64]) -> float:
    """kappa = s2 / tau2: the variance of rewards within a prompt over the variance of success rates among prompts.

    kappa says how many of a prompt's own rollouts the mean over all prompts is worth (EBPO, arXiv 2602.05165). Both variances are
    moment estimates from the groups with at least two rollouts. `weights` are the (G,) weights of the groups; EBPO weighs all past
    groups equally. Without a group of two rollouts the result is the default kappa.
    """
    several = counts > 1
    if not several.any():
        return Calibration().kappa
    x, k, w = successes[several], counts[several], weights[several]
    means = x / k
    within = float(w @ (x * (1 - means)) / (w @ (k - 1)))
    spread = float(w @ np.square(means - np.average(means, weights=w)) / w.sum())
    among = spread - within * float(np.average(1 / k, weights=w))  # without the sampling noise of the means
    least, most = (math.exp(bound) for bound in BOUNDS[2])
    return min(max(within / among, least), most) if among > 0 else most


def negative_log_likelihood(
    successes: NDArray[np.float64], counts: NDArray[np.float64], priors: NDArray[np.float64], weights: NDArray[np.float64]
) -> Objective:
    """The objective of a fit. It maps theta = (alpha, beta, log kappa, logit eps) to its value and its (4,) gradient.

    The value is the weighted mean of -log((1 - eps) m1 + eps m0) over G groups, where m1 and m0 are the marginal likelihoods under
    the calibrated and the vague Beta. A penalty (theta - default)^2 / 2 is added; its weight is RESTRAINT times the largest weight
    of a group. All arguments are (G,).
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
    """(delta0, delta1) of the shift from the log-odds of the success rate to those of the least-variance baseline.

    Args:
        groups: (3, G) successes, counts and priors.
        energies: (2, G) energies of successes and of failures, weighted by age. Their unit does not matter.
        rates: the calibration of the success rates. Each rollout's success rate is its leave-one-out posterior mean.
        start: where Newton's method starts. The objective is convex.

    The shift is 0 if there are no energies.
    """
    total = energies.sum(axis=0)
    known = total > 0
    if not known.any():
        return 0.0, 0.0
    successes, counts, priors = groups[:, known]
    weights = energies[:, known] * (counts.sum() / total[known].sum())  # a rollout of average energy has weight 1
    # successes among the other rollouts, from the view of a success and of a failure
    others = np.stack([np.maximum(successes - 1, 0.0), np.minimum(successes, counts - 1)])
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
    """Posterior means of the success rates, as in `v05.reference.calibrated`. The array arguments broadcast."""
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
    """The (4,) theta of a calibration."""
    return np.array([calibration.alpha, calibration.beta, math.log(calibration.kappa), float(logit(calibration.eps))])
