"""The Ray engine on a local cluster of two nodes. `make test-vllm` installs Ray."""

import functools
import os
import time

import numpy as np
import pytest
import torch

from helpers.rollout_fakes import TroubleTask
from v05.budget import RolloutAllocator
from v05.rollout import Completion, Failure, Request, generate
from v05.rollout.ray_engine import RayEngine
from v05.rollout.scheduler import collect
from v05.rollout.transformers_engine import TransformersEngine
from v05.rollout.verifier import InlineVerifier
from v05.tasks import Prompt
from v05.train.config import PolicyConfig
from v05.train.metrics import read_metrics
from v05.train.policy import character_decoder, character_tokenizer
from v05.train.presets import run_config
from v05.train.trainer import train

pytest.importorskip("ray.cluster_utils")  # a folder that happens to be named ray does not have this
import ray

pytestmark = [pytest.mark.ray, pytest.mark.filterwarnings("default")]
TOKENIZER = character_tokenizer()
REQUESTS = [Request(tuple(TOKENIZER(f"{i % 7}+1=")["input_ids"]), seed) for seed, i in enumerate(range(64))]


def model_of(seed):
    torch.manual_seed(seed)
    config = PolicyConfig(hidden_size=32, layers=2, heads=2, intermediate_size=64)
    return character_decoder(config, len(TOKENIZER))


def embedded(model):
    return TransformersEngine(model, TOKENIZER, max_new_tokens=6, capacity=16)


def make_embedded():
    return embedded(model_of(0))


class SlowCoins:
    """Rollouts of a tenth of a second, one after another. Their results depend on their seeds alone."""

    capacity, reproducible = 4, True

    def __init__(self):
        self.in_flight = []

    def submit(self, keys, requests):
        self.in_flight += zip(keys, requests, strict=True)

    def poll(self, timeout=None):
        time.sleep(0.1)
        key, request = self.in_flight.pop(0)
        success = np.random.default_rng(request.seed).random() < 0.5
        return [(key, Completion(np.array([int(success)]), np.zeros(1, dtype=np.float32), True))]

    def update_weights(self, state):
        pass


class HangsOnce(SlowCoins):
    """The first instance hangs at its third poll. A file tells the instances which one is first."""

    def __init__(self, file):
        super().__init__()
        try:
            file.touch(exist_ok=False)
            self.polls_left = 2
        except FileExistsError:
            self.polls_left = -1

    def poll(self, timeout=None):
        if self.polls_left == 0:
            time.sleep(3600)
        self.polls_left -= 1
        return super().poll(timeout)


class Broken:
    def __init__(self):
        raise RuntimeError("no such policy")


class Coins(RayEngine):
    def decode(self, completion):
        return str(completion.tokens[0])


class CoinsHere(SlowCoins):
    decode = Coins.decode


@pytest.fixture
def cluster():
    from ray.cluster_utils import Cluster

    # Workers find this file's classes by name, as those of an installed package.
    os.environ["PYTHONPATH"] = os.pathsep.join([os.path.dirname(__file__), os.path.dirname(os.path.dirname(__file__))])
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1})
    second = cluster.add_node(num_cpus=1)
    ray.init(address=cluster.address, log_to_driver=False)
    cluster.wait_for_nodes()
    yield cluster, second
    ray.shutdown()
    cluster.shutdown()


def test_actors_sample_as_the_embedded_engine_does_and_follow_its_weights(cluster):
    engine = RayEngine(make_embedded, TOKENIZER, actors=2)
    assert engine.capacity == 32
    for model in (model_of(0), model_of(1)):
        engine.update_weights(model.state_dict().items())
        for mine, theirs in zip(generate(embedded(model), REQUESTS), generate(engine, REQUESTS), strict=True):
            assert mine.tokens.tolist() == theirs.tokens.tolist()
            np.testing.assert_allclose(mine.logprobs, theirs.logprobs, atol=1e-4)
            assert mine.energy == pytest.approx(theirs.energy, rel=1e-3)
            assert engine.decode(theirs) == embedded(model).decode(mine)
    engine.submit([0], REQUESTS[:1])
    with pytest.raises(ValueError, match="rollouts are in flight"):
        engine.update_weights([])
    # An actor that dies returns its rollout, and restarts with the weights of the last sync.
    victim = next(actor for actor in engine._actors if actor.due)
    ray.kill(victim.handle)
    ((key, result),) = engine.poll()
    assert key == 0
    if isinstance(result, Failure):  # otherwise the rollout was quicker than the kill
        assert "a rollout actor was lost" in result.error
    deadline = time.monotonic() + 120
    while len(engine._working()) < 2 and time.monotonic() < deadline:
        time.sleep(0.2)
    expected = generate(embedded(model_of(1)), REQUESTS)
    assert [c.tokens.tolist() for c in generate(engine, REQUESTS)] == [c.tokens.tolist() for c in expected]
    engine.close()


def collected(engine, kill=lambda: None):
    prompts = [Prompt(str(i), "", None) for i in range(10)]

    class Watching(InlineVerifier):
        verified = 0

        def submit(self, items):
            super().submit(items)
            before, self.verified = self.verified, self.verified + len(items)
            if before < 10 <= self.verified:
                kill()

    verifier = Watching(TroubleTask())
    return collect(RolloutAllocator(seed=1), engine, verifier, prompts, [(1,)] * 10, np.full(10, 0.5), first_group=0)


def test_a_node_lost_in_mid_step_costs_no_rollout(cluster):
    nodes, second = cluster
    engine = Coins(SlowCoins, TOKENIZER, actors=2, options={"num_cpus": 1})
    while len(engine._working()) < 2:
        time.sleep(0.2)
    undisturbed = collected(engine)
    assert undisturbed.failures == []
    hit = collected(engine, kill=functools.partial(nodes.remove_node, second, allow_graceful=False))
    assert hit.failures
    assert all("a rollout actor was lost" in failure for failure in hit.failures)
    assert hit.invalid == 0
    assert hit.rewards.tolist() == undisturbed.rewards.tolist()
    assert hit.offsets.tolist() == undisturbed.offsets.tolist()
    assert len(engine._working()) == 1  # the other actor has no room until a node joins
    nodes.add_node(num_cpus=1)
    deadline = time.monotonic() + 120
    while len(engine._working()) < 2 and time.monotonic() < deadline:
        time.sleep(0.2)
    assert len(engine._working()) == 2
    engine.close()


def test_an_actor_that_hangs_costs_no_rollout(cluster, tmp_path):
    undisturbed = collected(CoinsHere())
    engine = Coins(functools.partial(HangsOnce, tmp_path / "hung"), TOKENIZER, actors=1, time_limit=2.0)
    hit = collected(engine)
    assert hit.failures
    assert all("it did not finish a rollout in 2 seconds" in failure for failure in hit.failures)
    assert hit.invalid == 0
    assert hit.rewards.tolist() == undisturbed.rewards.tolist()
    assert hit.offsets.tolist() == undisturbed.offsets.tolist()
    assert len(generate(engine, REQUESTS[:4])) == 4
    engine.close()


def test_a_training_run(cluster, tmp_path, monkeypatch):
    monkeypatch.setenv("V05_CACHE", str(tmp_path / "cache"))
    for engine in ({"kind": "transformers"}, {"kind": "ray", "actors": 2}):
        train(run_config("smoke", "v05", engine=engine, total_rollouts=128), tmp_path / engine["kind"])
    embedded, spread = (read_metrics(tmp_path / name, "step") for name in ("transformers", "ray"))
    assert all(s["sync_difference"] < 1e-4 and s["mismatch"] < 1e-4 for s in spread)
    assert [s["accuracy"] for s in embedded] == [s["accuracy"] for s in spread]
    assert [s["group_size"] for s in embedded] == [s["group_size"] for s in spread]


def test_an_engine_that_cannot_be_made_is_an_error(cluster):
    with pytest.raises(RuntimeError, match=r"3 rollout actors in a row failed to start(.|\n)*no such policy"):
        RayEngine(Broken, TOKENIZER, actors=1)
