"""The sequential loop with an engine whose rewards are known."""

import numpy as np
import pytest

from v05 import reference
from v05.budget import RolloutAllocator
from v05.rollout import Completion
from v05.rollout.scheduler import collect, join, select
from v05.tasks import Prompt

RATES = {"easy": 1.0, "hard": 0.0, "even": 0.5}
PROMPTS = [Prompt(name, "", None) for name in RATES for _ in range(20)]


class CoinEngine:
    """Succeeds with the rate of the prompt, by the request's seed."""

    def __init__(self):
        self.batches = []

    def generate(self, requests):
        self.batches.append(len(requests))
        draws = [np.random.default_rng(r.seed).random() < r.prompt[0] for r in requests]
        return [Completion(np.array([int(d)]), np.zeros(1, dtype=np.float32), True) for d in draws]

    def decode(self, completion):
        return str(completion.tokens[0])


class CoinTask:
    def verify(self, prompt, completion):
        return float(completion)


def run(priors, *, batch_size=64, **settings):
    engine = CoinEngine()
    allocator = RolloutAllocator(seed=3, **settings)
    tokens = [(RATES[p.text],) for p in PROMPTS]
    batch = collect(allocator, engine, CoinTask(), PROMPTS, tokens, priors, first_group=100, batch_size=batch_size)
    return batch, engine


def test_group_sizes_are_those_of_the_sequential_test():
    priors = np.tile([0.5, 0.95, 0.05, np.nan], len(PROMPTS) // 4)
    batch, _ = run(priors, rule="osla")
    assert batch.rewards.tolist() == [float(c.tokens[0]) for c in batch.completions]
    for g, prior in enumerate(priors):
        rewards = batch.rewards[batch.offsets[g] : batch.offsets[g + 1]]
        for k in range(4, len(rewards) + 1):
            fused = reference.shrinkage(k, 2 * rewards[:k].mean() - 1, 2 * prior - 1)
            assert reference.osla_take_more(k, fused.squared_bias) == (k < len(rewards)), (g, k)
    sizes = np.diff(batch.offsets)
    assert sizes.min() == 4
    assert sizes.max() == 16


@pytest.mark.parametrize("batch_size", [7, 64, 10_000])
def test_the_batch_size_changes_nothing_but_the_rounds(batch_size):
    priors = np.full(len(PROMPTS), 0.5)
    expected, _ = run(priors, rule="osla")
    batch, engine = run(priors, batch_size=batch_size, rule="osla")
    assert batch.rewards.tolist() == expected.rewards.tolist()
    assert batch.offsets.tolist() == expected.offsets.tolist()
    assert batch.rounds == len(engine.batches)
    assert max(engine.batches) <= batch_size


def test_uniform_takes_one_round():
    batch, engine = run(np.full(len(PROMPTS), np.nan), batch_size=10_000, rule="uniform", initial=8, maximum=8)
    assert engine.batches == [8 * len(PROMPTS)]
    assert set(np.diff(batch.offsets)) == {8}


def test_select_and_join():
    batch, _ = run(np.full(len(PROMPTS), 0.5), rule="osla")
    keep = np.arange(len(PROMPTS)) % 3 == 0
    kept, rest = select(batch, keep), select(batch, ~keep)
    assert kept.prompts == [p for p, k in zip(batch.prompts, keep, strict=True) if k]
    both = join([kept, rest])
    assert sorted(both.rewards.tolist()) == sorted(batch.rewards.tolist())
    assert both.offsets[-1] == len(both.rewards) == len(both.completions)
    for part in (kept, rest, both):
        assert part.rewards.tolist() == [float(c.tokens[0]) for c in part.completions]
    assert len(select(batch, np.zeros(len(PROMPTS), dtype=bool)).rewards) == 0
