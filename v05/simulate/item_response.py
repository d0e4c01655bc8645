"""A cross-fitted prior from the outcomes: the one-parameter logistic model of item response theory (Rasch 1960).

    logit P(model m solves question q) = c + ability[m] - difficulty[q]

Each cell (a model and a question) belongs to a random fold and is predicted from the other folds, so its own outcome never enters
its prior.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import minimize
from scipy.special import expit

from v05.simulate.outcomes import Outcomes

FOLDS = 5
SPREAD = 2.0  # standard deviation (logits) of the normal prior on c, abilities and difficulties
MAX_ITERATIONS = 300
TOLERANCE = 1e-7  # relative, of the likelihood


def cross_fitted(outcomes: Outcomes, rng: np.random.Generator, progress: Callable[[], None] = lambda: None) -> NDArray[np.float64]:
    """The (C,) priors of all C cells. `progress` is called after each of FOLDS fits.

    A cell whose model and question have no other cell gets about the mean of all cells. A single cell gets 1/2.
    """
    priors = np.full(len(outcomes), np.nan)
    fold = rng.permutation(len(outcomes)) % FOLDS
    for held_out in range(FOLDS):
        predicted = fold == held_out
        theta = _fit(outcomes, ~predicted)
        priors[predicted] = expit(_logits(theta, outcomes.model[predicted], outcomes.question[predicted], _models(outcomes)))
        progress()
    return priors


def _models(outcomes: Outcomes) -> int:
    return int(outcomes.model.max()) + 1


def _logits(theta: NDArray[np.float64], model: NDArray[np.int64], question: NDArray[np.int64], models: int) -> NDArray[np.float64]:
    """Log-odds of success. theta is (c, abilities, difficulties)."""
    logits: NDArray[np.float64] = theta[0] + theta[1 + model] - theta[1 + models + question]
    return logits


def _fit(outcomes: Outcomes, kept: NDArray[np.bool_]) -> NDArray[np.float64]:
    """theta by penalised likelihood. A cell counts as one trial, because the model's error for a cell is common to its trials."""
    model, question = outcomes.model[kept], outcomes.question[kept]
    models, questions = _models(outcomes), int(outcomes.question.max()) + 1
    rate = outcomes.successes[kept] / outcomes.trials[kept]
    precision = SPREAD**-2
    cells = np.concatenate([[len(rate)], np.bincount(model, minlength=models), np.bincount(question, minlength=questions)])
    unit = (precision + cells / 8) ** -0.5  # about 1 / sqrt(curvature); without this scaling large data need many iterations

    def objective(scaled: NDArray[np.float64]) -> tuple[float, NDArray[np.float64]]:
        theta = unit * scaled
        logits = _logits(theta, model, question, models)
        residual = expit(logits) - rate
        value = np.logaddexp(0.0, logits).sum() - rate @ logits + precision * (theta @ theta) / 2
        by_model = np.bincount(model, residual, minlength=models)
        by_question = np.bincount(question, residual, minlength=questions)
        gradient = np.concatenate([[residual.sum()], by_model, -by_question]) + precision * theta
        return value, unit * gradient

    options = {"maxiter": MAX_ITERATIONS, "ftol": TOLERANCE}
    found = minimize(objective, np.zeros(len(unit)), jac=True, method="L-BFGS-B", options=options)
    theta: NDArray[np.float64] = unit * found.x
    return theta
