"""The continuous loop with engines whose rewards, order and failures are known."""

import itertools

import numpy as np
import pytest

from helpers.rollout_fakes import CoinEngine, TroubleTask
from v05 import reference
from v05.budget import RolloutAllocator
from v05.rollout import Completion, Failure, Request, generate
from v05.rollout.scheduler import collect, join, select
from v05.rollout.verifier import InlineVerifier, VerifierPool
from v05.tasks import Prompt

RATES = {"easy": 1.0, "hard": 0.0, "even": 0.5}
PROMPTS = [Prompt(name, "", None) for name in RATES for _ in range(20)]
HALF = np.full(len(PROMPTS), 0.5)


class LateVerifier(InlineVerifier):
    """Holds back results at polls that do not wait, until there are more than 50."""

    most_under_way = 0

    def poll(self, *, wait):
        self.most_under_way = max(self.most_under_way, len(self._results))
        return super().poll(wait=wait) if wait or len(self._results) > 50 else []


def run(priors=HALF, engine=None, verifier=None, ready=None, ahead=(), **settings):
    allocator = RolloutAllocator(seed=3, **settings)
    tokens = [(RATES[p.text],) for p in PROMPTS]
    verifier = verifier or InlineVerifier(TroubleTask())
    engine = engine or CoinEngine()
    return collect(allocator, engine, verifier, PROMPTS, tokens, priors, first_group=100, ready=ready, ahead=ahead)


def sequential_test_holds(batch, priors):
    for g, prior in enumerate(priors):
        rewards = batch.rewards[batch.offsets[g] : batch.offsets[g + 1]]
        for k in range(4, len(rewards) + 1):
            fused = reference.shrinkage(k, 2 * rewards[:k].mean() - 1, 2 * prior - 1)
            assert reference.osla_take_more(k, fused.squared_bias) == (k < len(rewards)), (g, k)


def test_group_sizes_are_those_of_the_sequential_test():
    priors = np.tile([0.5, 0.95, 0.05, np.nan], len(PROMPTS) // 4)
    batch = run(priors)
    assert batch.rewards.tolist() == [float(c.tokens[0]) for c in batch.completions]
    sequential_test_holds(batch, priors)
    sizes = np.diff(batch.offsets)
    assert sizes.min() == 4
    assert sizes.max() == 16


@pytest.mark.parametrize("capacity", [1, 7, 10_000])
@pytest.mark.parametrize("order", [None, 0, 1])
def test_capacity_and_order_of_arrival_change_nothing(capacity, order):
    expected = run()
    engine = CoinEngine(capacity, order=order, reproducible=order is None)
    batch = run(engine=engine, verifier=None if order is None else LateVerifier(TroubleTask()))
    assert batch.rewards.tolist() == expected.rewards.tolist()
    assert batch.offsets.tolist() == expected.offsets.tolist()
    assert engine.most_in_flight <= capacity


def test_the_engine_is_kept_full_and_tested_groups_go_first():
    engine = CoinEngine(8)
    prompts = [Prompt(str(i), "", None) for i in range(50)]
    priors = np.full(50, 0.999)
    priors[0] = 0.05  # prompt 0 succeeds against its prior and gets 16 rollouts; the other prompts stop at 4
    tokens = [(1.0, i) for i in range(50)]
    verifier = InlineVerifier(TroubleTask())
    batch = collect(RolloutAllocator(), engine, verifier, prompts, tokens, priors, first_group=0)
    assert np.diff(batch.offsets).tolist() == [16] + [4] * 49
    places = [i for i, prompt in enumerate(engine.submitted) if prompt[1] == 0]
    assert len(places) == 16
    assert places[-1] < len(engine.submitted) / 2  # most prompts have not begun then
    assert batch.in_flight > 7


def test_a_slow_verifier_holds_no_more_than_the_engine():
    engine, verifier = CoinEngine(8, reproducible=False), LateVerifier(TroubleTask())
    run(engine=engine, verifier=verifier)
    assert 8 < verifier.most_under_way <= 16


def test_failed_rollouts_are_tried_again_with_the_same_seed():
    expected = run()
    engine = CoinEngine(fails=lambda request, attempts: attempts < request.seed % 3)
    batch = run(engine=engine)
    assert batch.rewards.tolist() == expected.rewards.tolist()
    assert batch.offsets.tolist() == expected.offsets.tolist()
    assert batch.invalid == 0
    assert len(batch.failures) == sum(seed % 3 for seed in engine.attempts) > 0


def test_rollouts_that_always_fail_are_left_out():
    engine = CoinEngine(fails=lambda request, attempts: request.seed % 2 == 0)
    batch = run(engine=engine)
    assert 0 < batch.invalid < len(engine.attempts)
    assert len(batch.failures) == 3 * batch.invalid
    assert len(batch.rewards) == batch.offsets[-1] == len(batch.completions) == len(engine.attempts) - batch.invalid
    assert batch.rewards.tolist() == [float(c.tokens[0]) for c in batch.completions]
    assert np.diff(batch.offsets).min() >= 1


def test_a_prompt_without_a_rollout_is_left_out():
    engine = CoinEngine(fails=lambda request, attempts: request.prompt[0] == 1.0)
    batch = run(engine=engine, rule="uniform", initial=2, maximum=2)
    assert {p.text for p in batch.prompts} == {"hard", "even"}
    assert len(batch.prompts) == len(batch.prompt_tokens) == len(batch.priors) == 40
    assert batch.invalid == 40


def test_nothing_but_failures_ends_the_run():
    with pytest.raises(RuntimeError, match="none of 240 rollouts succeeded; the last failure: the coin rolled under the table"):
        run(engine=CoinEngine(fails=lambda request, attempts: True))


class FickleEngine(CoinEngine):
    """Gives another completion at every attempt."""

    def __init__(self):
        super().__init__(order=0, reproducible=False)
        self.draws = itertools.count()

    def result(self, request):
        return Completion(np.array([next(self.draws) % 2]), np.zeros(1, dtype=np.float32), True)


class ImpatientAllocator(RolloutAllocator):
    """Lets all leases expire before every fifth report."""

    reports = 0

    def report(self, lease_ids, rewards):
        self.reports += len(lease_ids) > 0
        if self.reports % 5 == 0:
            self.expire(0.0)
        super().report(lease_ids, rewards)


def test_of_leases_that_expire_the_report_that_counted_is_kept():
    allocator, engine, verifier = ImpatientAllocator(max_attempts=1000), FickleEngine(), LateVerifier(TroubleTask())
    for first_group in (0, 100):  # rollouts that the first call left in flight would come back in the second
        batch = collect(allocator, engine, verifier, PROMPTS, [(0,)] * len(PROMPTS), HALF, first_group=first_group)
        assert batch.rewards.tolist() == [float(c.tokens[0]) for c in batch.completions]
        assert engine.in_flight == []
        assert verifier.poll(wait=True) == []
        assert batch.invalid == 0
    assert allocator.counts()["expired"] > 0
    assert allocator.counts()["late"] > 0


def test_nothing_but_expired_leases_ends_the_run():
    allocator = RolloutAllocator(max_attempts=1)
    allocator.report = lambda lease_ids, rewards: allocator.expire(0.0)
    with pytest.raises(RuntimeError, match="none of 240 rollouts succeeded; the last failure: their leases expired"):
        collect(allocator, CoinEngine(), InlineVerifier(TroubleTask()), PROMPTS, [(0,)] * len(PROMPTS), HALF, first_group=0)


class WordEngine(CoinEngine):
    """Its completions decode first to the texts in `words`, which cause trouble in the verifier."""

    def decode(self, completion):
        return self.words.pop(0) if self.words else super().decode(completion)


def test_a_verifier_that_hangs_or_dies_costs_its_items():
    engine = WordEngine()
    engine.words = ["1.0", "hang", "0.0", "die", "raise", "1.0"]
    pool = VerifierPool(TroubleTask, workers=2, time_limit=1.5)
    try:
        batch = run(engine=engine, verifier=pool, rule="uniform", initial=4, maximum=4)
    finally:
        pool.close()
    assert (pool.timed_out, pool.crashed) == (1, 1)
    assert batch.failures == []  # no completion is verified again: it caused the trouble itself
    assert batch.invalid == 0
    assert set(np.diff(batch.offsets)) == {4}
    assert batch.rewards[:6].tolist() == [1.0, 0.0, 0.0, 0.0, 0.0, 1.0]


def test_a_completion_ends_no_run():
    engine = WordEngine()
    engine.words = ["SystemExit", "1.0", "GeneratorExit", "MemoryError", "return nan"]
    batch = run(engine=engine, rule="uniform", initial=4, maximum=4)
    assert batch.rewards[:5].tolist() == [0.0, 1.0, 0.0, 0.0, 0.0]
    assert batch.failures == []


def test_generate_keeps_order_and_retries():
    requests = [Request((0.5,), seed) for seed in range(100)]
    expected = [c.tokens[0] for c in generate(CoinEngine(), requests)]
    engine = CoinEngine(9, order=0, fails=lambda request, attempts: attempts < request.seed % 3)
    assert [c.tokens[0] for c in generate(engine, requests)] == expected
    assert engine.most_in_flight <= 9
    with pytest.raises(RuntimeError, match="failed 3 times; the last error: the coin"):
        generate(CoinEngine(fails=lambda request, attempts: request.seed == 50), requests)
    assert generate(CoinEngine(), []) == []


AHEAD = [Request((0.5,), 10**6 + i) for i in range(40)]


@pytest.mark.parametrize("capacity", [1, 7, 300])
def test_coming_rollouts_are_sampled_where_there_is_room(capacity):
    expected, engine = run(), CoinEngine(capacity)
    batch = run(engine=engine, ahead=AHEAD)
    assert batch.rewards.tolist() == expected.rewards.tolist()
    assert batch.offsets.tolist() == expected.offsets.tolist()
    assert [c.tokens.tolist() for c in batch.ahead] == [c.tokens.tolist() for c in generate(CoinEngine(), AHEAD)]
    assert engine.most_in_flight <= capacity
    assert not engine.in_flight


def test_coming_rollouts_wait_for_the_first_rewards_and_give_way():
    engine = CoinEngine(300)
    run(engine=engine, ahead=[Request((2.0,), 7 + i) for i in range(40)])
    first, *others = [i for i, prompt in enumerate(engine.submitted) if prompt == (2.0,)]
    assert first >= 4 * len(PROMPTS)  # after the initial rollouts of every group
    assert others[-1] < len(engine.submitted) - 1  # but before all other rollouts are done


def test_what_is_ready_is_verified_and_not_sampled_again():
    expected = run()
    places = [(g, i) for g, (a, b) in enumerate(itertools.pairwise(expected.offsets)) for i in range(b - a)]
    done = dict(zip(places, expected.completions, strict=True))
    ready = {place: completion for place, completion in done.items() if place[1] < 4 and place != (3, 2)}
    engine = CoinEngine(7)
    batch = run(engine=engine, ready=ready)
    assert batch.rewards.tolist() == expected.rewards.tolist()
    assert len(engine.submitted) == len(expected.rewards) - len(ready)


def test_a_coming_rollout_that_fails_is_missing():
    engine = CoinEngine(fails=lambda request, attempts: request.seed == AHEAD[3].seed)
    batch = run(engine=engine, ahead=AHEAD)
    assert [i for i, completion in enumerate(batch.ahead) if completion is None] == [3]
    assert not batch.failures


def test_select_and_join():
    batch = run(engine=CoinEngine(fails=lambda request, attempts: request.seed % 5 == 0))
    keep = np.arange(len(PROMPTS)) % 3 == 0
    kept, rest = select(batch, keep), select(batch, ~keep)
    assert kept.prompts == [p for p, k in zip(batch.prompts, keep, strict=True) if k]
    both = join([kept, rest])
    assert sorted(both.rewards.tolist()) == sorted(batch.rewards.tolist())
    assert both.offsets[-1] == len(both.rewards) == len(both.completions)
    for part in (kept, rest, both):
        assert part.rewards.tolist() == [float(c.tokens[0]) for c in part.completions]
    assert both.invalid == 2 * batch.invalid
    assert len(select(batch, np.zeros(len(PROMPTS), dtype=bool)).rewards) == 0
    assert isinstance(batch.failures[0], str)
    assert Failure("x") == Failure("x")
