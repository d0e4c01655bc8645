"""How the Ray engine treats an actor's answers, without a cluster. tests/rollout/test_ray_engine.py uses a cluster."""

from types import SimpleNamespace

import numpy as np
import pytest

from v05.rollout import Completion, Failure
from v05.rollout.ray_engine import RayEngine


class RayError(Exception):
    pass


def engine_with(answer):
    """An engine whose only actor had rollouts 1 and 2 and gave this answer."""

    def get(polled):
        if isinstance(polled, Exception):
            raise polled
        return polled

    engine = RayEngine.__new__(RayEngine)
    actor = SimpleNamespace(handle=None, due={1: 0.0, 2: 0.0}, polling=answer)
    engine._ray = SimpleNamespace(get=get, kill=lambda handle: None, exceptions=SimpleNamespace(RayError=RayError))
    engine._actors, engine._start = [actor], lambda: "another"
    return engine, actor


COMPLETION = Completion(np.array([1]), np.zeros(1, dtype=np.float32), True)


def test_a_rollout_that_was_asked_for():
    engine, actor = engine_with([(2, COMPLETION)])
    assert engine._take(actor) == [(2, COMPLETION)]
    assert engine._actors == [actor]
    assert list(actor.due) == [1]


@pytest.mark.parametrize(
    ("answer", "why"),
    [
        ([(3, COMPLETION)], r"it answered for the rollouts \[3\], and had \[1, 2\]"),
        ([(1, COMPLETION), (1, COMPLETION)], r"it answered for the rollouts \[1, 1\], and had"),
        ([], "it has none of its rollouts"),
        (RayError("\x1b[36mray::_Actor\x1b[39m died\x07"), r"ray::_Actor died\\x07"),
    ],
)
def test_an_actor_that_answers_for_others_is_replaced(answer, why):
    engine, actor = engine_with(answer)
    results = engine._take(actor)
    assert [key for key, _ in results] == [1, 2]
    assert engine._actors == ["another"]
    for _, result in results:
        assert isinstance(result, Failure)
        with pytest.raises(RuntimeError, match=f"a rollout actor was lost: {why}"):
            raise RuntimeError(result.error)
