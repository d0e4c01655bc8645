"""Priors and calibrators resume from their own states. A damaged state is refused and changes nothing."""

import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from v05.integrations.learnt import keep_learnt, restore_learnt
from v05.prior import MeanPrior
from v05.prior.calibration import Calibrator
from v05.prior.history import HistoryPrior
from v05.prior.spo import SpoPrior
from v05.prior.v0.context import History

ROUNDS = 80  # number of groups, more than a fit needs


def history_prior():
    prior = HistoryPrior()
    for step in range(4):
        prior.observe(["1+1=", f"{step}+1="], np.array([3.0, 1.0]), np.full(2, 4.0))
    return prior


def mean_prior():
    prior = MeanPrior()
    prior.observe(["1+1=", "2+1="], np.array([3.0, 1.0]), np.full(2, 4.0))
    return prior


def spo_prior():
    prior = SpoPrior()
    prior.observe(["1+1=", "2+1="], np.array([3.0, 1.0]), np.full(2, 4.0))
    return prior


def history():
    kept = History()
    for step in range(4):
        kept.add(["1+1=", f"{step}+1="], np.array([0.75, 0.25]), np.full(2, 4.0))
    return kept


def calibrator():
    kept = Calibrator()
    rng = np.random.default_rng(0)
    kept.observe(rng.integers(0, 5, ROUNDS), np.full(ROUNDS, 4), rng.random(ROUNDS))
    kept.fit()
    return kept


LEARNERS = {"prior": history_prior, "mean": mean_prior, "spo": spo_prior, "history": history, "calibrator": calibrator}
FRESH = {"prior": HistoryPrior, "mean": MeanPrior, "spo": SpoPrior, "history": History, "calibrator": Calibrator}


def first(value):
    """Damage an array by setting its first element to `value`."""

    def damage(array):
        array = array.copy()
        array.flat[0] = value
        return array

    return damage


DAMAGES = {
    ("prior", "weights", "NaN"): first(np.nan),
    ("prior", "weights", "other length"): lambda array: array[:-1],
    ("prior", "weights", "words"): lambda array: array.astype("S8"),
    ("prior", "squared_gradients", "negative"): first(-1.0),
    ("prior", "past_trials", "infinite"): first(np.inf),
    ("prior", "past_successes", "negative"): first(-1.0),
    ("prior", "past_steps", "of a step to come"): first(99),
    ("prior", "past_prompts", "no JSON"): lambda array: array[:-1],
    ("prior", "past_prompts", "fewer"): lambda array: np.frombuffer(b'["a"]', dtype=np.uint8),
    ("prior", "past_prompts", "an object"): lambda array: np.frombuffer(b'{"a": 1}', dtype=np.uint8),
    ("prior", "past_prompts", "no text"): lambda array: np.frombuffer(b"\xff", dtype=np.uint8),
    ("prior", "step", "a list"): lambda array: np.array([4]),
    ("mean", "successes", "more than trials"): first(9.0),
    ("mean", "successes", "negative"): first(-1.0),
    ("mean", "trials", "negative"): first(-1.0),
    ("mean", "trials", "NaN"): first(np.nan),
    ("spo", "counts", "negative"): first(-1.0),
    ("spo", "counts", "NaN"): first(np.nan),
    ("spo", "counts", "none"): np.zeros_like,
    ("spo", "counts", "fewer"): lambda array: array[:1],
    ("spo", "prompts", "twice"): lambda array: np.frombuffer(b'["a", "a"]', dtype=np.uint8),
    ("history", "levels", "NaN"): first(np.nan),
    ("history", "versions", "of a version to come"): first(99),
    ("history", "counts", "more"): first(5),
    ("history", "counts", "none"): first(0),
    ("history", "rates", "above 1"): first(2.0),
    ("history", "trials", "negative"): first(-4.0),
    ("history", "prompts", "twice"): lambda array: np.frombuffer(b'["a", "a", "b", "c"]', dtype=np.uint8),
    ("calibrator", "groups", "NaN"): first(np.nan),
    ("calibrator", "groups", "transposed"): lambda array: array.T,
    ("calibrator", "groups", "more successes than trials"): first(9.0),
    ("calibrator", "calibration", "NaN"): first(np.nan),
    ("calibrator", "calibration", "out of bounds"): first(1e9),
    ("calibrator", "failed_fits", "missing"): None,
}


@pytest.mark.parametrize(("name", "key", "what"), DAMAGES)
def test_a_damaged_state_is_refused_whole(name, key, what):
    state = LEARNERS[name]().state_dict()
    damage = DAMAGES[name, key, what]
    damaged = {other: values for other, values in state.items() if other != key}
    if damage is not None:
        damaged[key] = damage(state[key])
    learner = LEARNERS[name]()
    with pytest.raises(ValueError, match=r".+"):
        learner.load_state_dict(damaged)
    for other, values in learner.state_dict().items():
        np.testing.assert_array_equal(values, state[other])
    learner.load_state_dict(state)


@pytest.mark.parametrize("name", LEARNERS)
def test_every_missing_array_is_named(name):
    state = LEARNERS[name]().state_dict()
    for key in state:
        with pytest.raises(ValueError, match=f"{key} is missing"):
            FRESH[name]().load_state_dict({other: values for other, values in state.items() if other != key})
    FRESH[name]().load_state_dict(FRESH[name]().state_dict())  # the state of a learner that has learnt nothing


def damaged_file(path, **changes):
    with safe_open(path, framework="numpy") as file:
        classes = file.metadata()
    arrays = load_file(path) | changes
    save_file({key: values for key, values in arrays.items() if values is not None}, path, classes)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"calibrator.groups": None}, "of what the calibrator learnt, groups is missing"),
        ({"calibrator.groups": np.full((3, 2), np.nan)}, "of what the calibrator learnt, groups holds values of float64"),
        ({"prior.weights": None}, "of what the prior learnt, weights is missing"),
        ({"prior.weights": np.full(2**14 + 1, np.nan)}, "of what the prior learnt, weights holds values of float64"),
    ],
)
def test_a_damaged_file_is_named_and_nothing_of_it_is_restored(changes, message, tmp_path):
    path = tmp_path / "learnt"
    keep_learnt(path, {"prior": history_prior(), "calibrator": calibrator()})
    damaged_file(path, **changes)
    held = path.read_bytes()
    fresh = {"prior": HistoryPrior(), "calibrator": Calibrator()}
    with pytest.raises(ValueError, match=rf"learnt is damaged: {message}.*; delete it, or give another path"):
        restore_learnt(path, fresh)
    assert path.read_bytes() == held
    assert fresh["prior"].predict(["1+1="]) == pytest.approx([0.5])
    assert fresh["calibrator"].calibration == Calibrator().calibration
