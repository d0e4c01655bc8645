"""The first rollouts of a step may be sampled during the step before, by the older policy. They are the same rollouts otherwise."""

import json

import numpy as np
import pytest

from v05.rollout import Completion
from v05.train.config import EngineConfig, LossConfig, OptimizerConfig
from v05.train.metrics import read_metrics
from v05.train.overlap import PromptQueue, packed, places, requests_ahead, unpacked
from v05.train.presets import run_config
from v05.train.trainer import Trainer

TIMED = ("seconds", "in_flight", "sampled_ahead", "unbiased")
STILL = OptimizerConfig(learning_rate=1e-30)


def train(directory, spec="v05@2..4", **fields):
    config = run_config("smoke", spec, total_rollouts=640, **fields)
    list(Trainer(config, directory, lambda line: None).run())
    return read_metrics(directory, "step")


def untimed(steps):
    return [{k: v for k, v in step.items() if not any(name in k for name in TIMED)} for step in steps]


def test_of_a_policy_that_stands_still_the_rollouts_are_the_same(tmp_path):
    plain = train(tmp_path / "plain", "v05@4", optimizer=STILL)
    ahead = train(tmp_path / "ahead", "v05@4", optimizer=STILL, overlap=True)
    assert untimed(ahead) == untimed(plain)
    assert [step["sampled_ahead"] for step in ahead] == [0] + [64] * (len(ahead) - 2) + [0]
    assert all(step["sampled_ahead"] == 0 for step in plain)


def test_what_was_sampled_ahead_is_of_the_policy_before_its_update(tmp_path):
    plain = train(tmp_path / "plain", loss=LossConfig(importance_cap=2.0))
    steps = train(tmp_path / "ahead", loss=LossConfig(importance_cap=2.0), overlap=True)
    assert all(step["mismatch"] < 1e-5 for step in plain)
    assert all((step["mismatch"] > 1e-4) == (step["sampled_ahead"] > 0) for step in steps)
    assert all(step["mismatch_ratio"] == pytest.approx(1, abs=0.05) for step in steps)
    assert sum(step["sampled_ahead"] > 0 for step in steps) >= len(steps) - 3
    assert sum(step["spent"] for step in steps) == json.loads((tmp_path / "ahead" / "result.json").read_text())["rollouts"]


def test_ratios_are_to_the_policy_that_was_sampled_from(tmp_path):
    """From the second step on the ratios are to an older policy, so that some are clipped even with one update a step."""
    steps = train(tmp_path, overlap=True, optimizer=OptimizerConfig(learning_rate=3e-2))
    assert steps[0]["clip_fraction"] == 0
    assert max(step["clip_fraction"] or 0 for step in steps[1:]) > 0


def test_paths_are_not_counted_over_two_policies(tmp_path):
    steps = train(tmp_path, "calibrated@2..4", overlap=True)
    assert any(step["sampled_ahead"] for step in steps)
    assert not any(step["unbiased"] for step in steps if step["sampled_ahead"])


def test_where_it_does_not_go():
    with pytest.raises(ValueError, match="overlap=True with max_refills"):
        run_config("smoke", "dapo", overlap=True)
    with pytest.raises(ValueError, match=r"overlap=True with engine.kind='vllm' needs loss.importance_cap"):
        run_config("smoke", "v05", overlap=True, engine=EngineConfig(kind="vllm"))
    run_config("smoke", "v05", overlap=True, engine=EngineConfig(kind="vllm"), loss=LossConfig(importance_cap=2.0))


def test_prompts_are_looked_at_and_then_drawn():
    queue = PromptQueue(iter([(i, f"prompt {i}") for i in range(9)]))
    assert [n for n, _ in queue.look(3)] == [0, 1, 2]
    assert [n for n, _ in queue.draw(2)] == [0, 1]
    assert [n for n, _ in queue.look(4)] == [2, 3, 4, 5]
    assert [n for n, _ in queue.draw(5)] == [2, 3, 4, 5, 6]


def test_requests_have_the_seeds_that_the_allocator_will_give(tmp_path):
    trainer = Trainer(run_config("smoke", "v05@2..4", seed=5), tmp_path, lambda line: None)
    made = requests_ahead([(1,), (2,), (3,)], 17, 2, seed=5)
    trainer.sampler.allocator.open(np.arange(17, 20), np.full(3, 0.5))
    leases = trainer.sampler.allocator.lease(6)
    expected = {(g, i): seed for g, i, seed in zip(leases.group.tolist(), leases.index.tolist(), leases.seed.tolist(), strict=True)}
    assert [request.seed for request in made] == [expected[17 + i // 2, i % 2] for i in range(6)]
    assert [request.prompt for request in made] == [(1,), (1,), (2,), (2,), (3,), (3,)]


@pytest.mark.parametrize("squares", [True, False])
@pytest.mark.parametrize("missing", [[], [0], [2, 4], [0, 1, 2, 3, 4]])
def test_checkpoints_keep_completions(squares, missing):
    random = np.random.default_rng(0)
    completions = [
        Completion(random.integers(9, size=n), random.random(n, dtype=np.float32), n > 2, random.random(n) if squares else None)
        for n in (3, 1, 4, 2, 5)
    ]
    given = [None if i in missing else completion for i, completion in enumerate(completions)]
    found = unpacked(packed(given))
    assert [c is None for c in found] == [c is None for c in given]
    for one, other in zip(found, given, strict=True):
        if other is not None:
            assert one.tokens.tolist() == other.tokens.tolist()
            assert one.logprobs.tolist() == other.logprobs.tolist()
            assert one.finished is other.finished
            assert (one.sum_pi_squared is None) == (other.sum_pi_squared is None)
            assert one.energy == other.energy
    assert unpacked(packed([])) == []
    assert sorted(places(given, 2)) == [divmod(i, 2) for i in range(5) if i not in missing]
