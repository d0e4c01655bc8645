"""The command's sentences agree with its figures."""

import numpy as np
import pytest

from v05.simulate.outcomes import Outcomes
from v05.simulate.replay import Record
from v05.simulate.summary import conclusion, what_was_read

GRPO = [Record("grpo", "", mean, mse, 0.0) for mean, mse in ((4.0, 0.4), (8.0, 0.2), (16.0, 0.1))]


@pytest.mark.parametrize(
    ("others", "sentence"),
    [
        ([(4.0, 0.3), (16.0, 0.06)], "calibrated at 14.0 rollouts a prompt has the baseline error that the mean (grpo) has at 16."),
        ([(4.0, 0.05)], "calibrated at 4.0 rollouts a prompt or fewer has the baseline error that the mean (grpo) has at 16."),
        (
            [(4.0, 0.5), (16.0, 0.11)],
            "no method has the baseline error that the mean (grpo) has at 16 with fewer rollouts a prompt.",
        ),
        (
            [(4.0, 0.4), (16.0, 0.0999)],
            "no method has the baseline error that the mean (grpo) has at 16 with fewer rollouts a prompt.",
        ),
    ],
    ids=["fewer", "fewest", "never", "as many"],
)
def test_conclusion(others, sentence):
    records = [*GRPO, *(Record("calibrated", "", mean, mse, 0.0) for mean, mse in others)]
    assert conclusion(records, 4, 16) == "On these logs, " + sentence


def outcomes(model, question, trials):
    successes = np.zeros(len(trials))
    return Outcomes(np.array(model), np.array(question), successes, np.array(trials, dtype=float), source="rollouts of verl")


def test_what_was_read_says_what_the_outcomes_cannot():
    read = "read rollouts of verl: {} of {} models or steps and {} prompts"
    single, unknown = "no group has two rollouts", "no prompt is in two groups"
    first, *rest = what_was_read(outcomes([0, 0], [0, 1], [1, 1]), "irt")
    assert first == read.format("2 rollouts in 2 groups,", 1, 2)
    assert [line.split(",")[0] for line in rest] == [single, unknown]
    assert [line.split(",")[0] for line in what_was_read(outcomes([0, 0], [0, 1], [1, 1]), "0.5")][-1] == single
    assert list(what_was_read(outcomes([0, 1], [0, 0], [2, 1]), "irt")) == [read.format("3 rollouts in 2 groups,", 2, 1)]
