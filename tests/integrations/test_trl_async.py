"""TRL's asynchronous rollout loop with V_0.5, on a fake vLLM server. `make test-integrations` installs TRL."""

import asyncio
import json
import multiprocessing
import queue
import warnings
from collections import defaultdict

import numpy as np
import pytest

from helpers.host_situations import TOLERANCE, FixedPrior, situations
from v05.integrations.settings import Settings
from v05.methods import Calibration
from v05.path_counting import path_counting_advantages
from v05.prior.history import HistoryPrior

pytest.importorskip("trl", exc_type=ImportError)
from accelerate import PartialState
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # TRL warns that experimental interfaces may change
    from trl.experimental.async_grpo import async_rollout_worker as host

    from v05.integrations import trl_async

pytestmark = [pytest.mark.host, pytest.mark.filterwarnings("default")]
WORDS = ["<pad>", "<eos>", "sure", "hopeless", "fair", "yes", "no"]
YES = WORDS.index("yes")


@pytest.fixture(scope="module")
def tokenizer():
    inner = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<pad>"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, pad_token="<pad>", eos_token="<eos>")
    tokenizer.chat_template = "{% for message in messages %}{{ message['content'] }} {% endfor %}"
    tokenizer.response_template = {"version": 1}  # without it TRL looks for the template of a known model
    return tokenizer


def judge(prompts, completions, answer, **_):
    assert len(prompts) == len(completions) == len(answer) == 1  # the loop scores one conversation at a time, as soon as it ends
    return [None if answer[0] == "unknown" else float(completions[0][-1]["content"] == answer[0])]


@pytest.fixture
def loop(tokenizer, monkeypatch):
    """Makes loops over the given prompts, with a server that always says yes."""

    PartialState(cpu=True)  # TRL's process does this, and its log needs it
    loops = []

    def make(prompts, prior=None, settings=None, generations=8, reward_funcs=(judge,), **more):
        rows = [{"prompt": [{"role": "user", "content": text}], "answer": answer} for text, answer in prompts]
        loop = trl_async.V05RolloutLoop(
            settings=settings or Settings(initial=2),
            reward_funcs=list(reward_funcs),
            prior=prior or FixedPrior(),
            num_generations=generations,
            model_name="none",
            dataset=Dataset.from_list(rows),
            processing_class=tokenizer,
            eos_token_ids=[1],
            rollout_buffer=queue.Queue(),
            model_version_value=multiprocessing.Value("i", 0),
            heartbeat_value=multiprocessing.Value("d", 0.0),
            failed_event=multiprocessing.Event(),
            exception_info_queue=queue.Queue(),
            metrics_queue=queue.Queue(),
            max_inflight_tasks=32,
            **more,
        )
        loops.append(loop)

        async def answer(prompt_ids):
            await asyncio.sleep(0)
            return [YES, 1], [-0.5, -0.5]

        monkeypatch.setattr(loop, "_generate_one_turn", answer)
        monkeypatch.setattr(host, "parse_response", lambda tokenizer, ids, **_: {"role": "assistant", "content": "yes"})
        return loop

    yield make
    for loop in loops:
        loop._tool_pool.shutdown()
        loop._loop.close()


def collect(loop, groups):
    """Run TRL's generation and scoring loops until the first `groups` groups are in the buffer. Returns their samples by group."""
    taken = defaultdict(list)

    async def run():
        stop = asyncio.Event()

        async def watch():
            while not taken.keys() >= set(range(groups)):  # groups arrive whole and in any order, and more follow
                await asyncio.sleep(0.01)
                while not loop.rollout_buffer.empty():
                    sample = loop.rollout_buffer.get()
                    taken[sample.group_id].append(sample)
            stop.set()

        tasks = [asyncio.create_task(t) for t in (loop._generate_loop(stop), loop._score_loop(stop), watch())]
        await asyncio.wait_for(asyncio.gather(*tasks), 60)

    loop._loop.run_until_complete(run())
    return taken


def change_version(loop):
    """Announce new weights of the policy, and open the next group."""
    loop._model_version_value.value += 1
    next(loop._repeat_iterator())


def test_the_doors_have_the_shape_they_were_written_for():
    assert trl_async.V05RolloutWorker._loop_cls is trl_async.V05RolloutLoop
    assert host._AsyncRolloutLoop._provides_rollout_reward is False
    assert "group_id" in host._AsyncRolloutLoop._generate_one.__code__.co_varnames
    assert set(trl_async.PER_CONVERSATION) <= set(host.RolloutGroup.__slots__)


def test_groups_take_what_they_need(loop):
    prior = FixedPrior({"sure": 0.95, "hopeless": 0.95, "fair": 0.5})
    made = loop([("sure", "yes"), ("hopeless", "no"), ("fair", "unknown")], prior)
    made.dataset = made.dataset.select(range(2))  # leaves "fair" for the next round
    samples = collect(made, 2)
    assert len(samples[0]) == 2
    assert len(samples[1]) == 8
    assert [sample.advantage for sample in samples[0]] == pytest.approx([0.05] * 2)
    assert all(sample.advantage < 0 for sample in samples[1])
    change_version(made)
    assert prior.learnt["sure"] == (2, 2)
    assert prior.learnt["hopeless"] == (0, 8)
    assert all(sample.completion_mask.sum() == 2 for sample in samples[1])


@pytest.mark.parametrize("method", ["v05", "calibrated"])
def test_rounds_may_be_unbiased(loop, method):
    """Advantages count paths by the method's rule, with the calibration from the time when the group was opened."""
    settings = Settings(method, initial=2, unbiased=True, group_weighting="prompt")
    prior = FixedPrior({"hopeless": 0.9})
    made = loop([("hopeless", "no"), ("sure", "yes")], prior, settings)
    samples = collect(made, 2)
    for group, reward in ((0, 0.0), (1, 1.0)):
        size = len(samples[group])
        rate = [0.9 if group == 0 else 0.5]
        budget = dict(method=method, initial=2, maximum=8, calibration=Calibration())
        wanted = path_counting_advantages([reward] * size, rate, [0, size], **budget) * 2 / size
        assert [sample.advantage for sample in samples[group]] == pytest.approx(wanted.tolist(), abs=1e-6)
    assert len(samples[0]) > 2


def test_energies_come_from_the_tokens_that_are_trained_on(loop):
    made = loop([("sure", "yes"), ("hopeless", "no")], FixedPrior(), Settings("optimal", initial=2))
    samples = collect(made, 2)
    change_version(made)
    energies = made._estimator.calibrator.state_dict()["energies"]
    of_one = 2 * 2 * (1 - np.exp(-0.5)) ** 2  # energy of one completion: both tokens count
    assert energies.sum(axis=0)[:2] == pytest.approx([of_one * len(samples[0]), of_one * len(samples[1])])


def test_a_method_without_a_test_is_refused(loop):
    with pytest.raises(ValueError, match="settings: method='grpo' has no test of its own; choose a method with a prior"):
        loop([("fair", "yes")], settings=Settings("grpo"))


def test_a_prompts_own_past_outlives_an_epoch(loop):
    """The prior forgets with every step that it learns. A step is a version of the policy here, not a group."""
    prior = HistoryPrior()
    prompts = [(f"{a}+{b}=", "yes" if (a + b) % 2 else "no") for a in range(8) for b in range(8)]
    made = loop(prompts, prior)
    collect(made, len(prompts))
    assert prior.state_dict()["step"] == 0
    change_version(made)
    learnt = prior.state_dict()
    assert learnt["step"] == 1
    assert set(json.loads(learnt["past_prompts"].tobytes())) == {text for text, _ in prompts}
    assert (learnt["past_trials"] >= 2).all()
    change_version(made)
    assert prior.state_dict()["step"] == 1  # nothing was scored in between


def test_a_new_process_goes_on_from_what_was_learnt(loop, tmp_path):
    settings = Settings(initial=2, learnt=str(tmp_path / "prior.safetensors"))
    prompts = [("sure", "yes"), ("hopeless", "no")]
    made = loop(prompts, HistoryPrior(), settings)
    collect(made, len(prompts))
    change_version(made)
    again = loop(prompts, HistoryPrior(), settings)
    predicted = again._estimator.prior.predict(["sure", "hopeless"])
    assert predicted[0] > 0.5 > predicted[1]
    assert predicted.tolist() == made._estimator.prior.predict(["sure", "hopeless"]).tolist()


class Game:
    """An environment that computes its own reward."""

    def reset(self, **_):
        return None

    def get_reward(self):
        return 1.0


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"environment_factory": Game}, "environment_factory: Game has a get_reward, which TRL calls only after V_0.5's test"),
        ({"reward_funcs": []}, r"reward_funcs=\[\]: V_0.5 tests rewards while it samples; give functions that score"),
    ],
    ids=["by an environment", "by nothing"],
)
def test_rewards_that_would_train_on_nothing_are_refused(loop, given, message):
    with pytest.raises(ValueError, match=message):
        loop([("fair", "yes")], **given)


# The worker's method is v05. With a prior that agrees, rows of one trajectory get the same advantages as with the group's mean.
REACHED = [case for case in situations("padding") if case.values[0].method == "v05" or case.values[0].trajectories]


@pytest.mark.parametrize("case", REACHED)
def test_situations(loop, case):
    """The loop's own scoring of the first group of each situation. Rows of one trajectory are sequences of one conversation."""
    first = [i for i, group in enumerate(case.groups) if group == case.groups[0]]
    conversations = list(dict.fromkeys(first if case.trajectories is None else case.trajectories))
    made = loop([("fair", "yes")], FixedPrior({"fair": case.priors.get(case.groups[0], 0.5)}), generations=len(conversations))
    next(made._repeat_iterator())
    rows = {c: [i for i in first if (i if case.trajectories is None else case.trajectories[i]) == c] for c in conversations}
    trained = [0 if length == 0 else 1 for length in case.lengths or [2] * len(case.rewards)]
    sequences = [[host.TrainingSequence([2, 5], [0, trained[i]], [0.0, -0.5], str(c)) for i in rows[c]] for c in conversations]
    rewards = [case.rewards[rows[c][0]] for c in conversations]
    group = host.RolloutGroup(
        prompts=[[]] * len(conversations),
        reward_kwargs={},
        completions=[[{"role": "assistant", "content": "yes"}]] * len(conversations),
        completions_ids=[[5]] * len(conversations),
        completions_sequences=sequences,
        tool_call_counts=[0] * len(conversations),
        tool_failure_counts=[0] * len(conversations),
        model_version=0,
        group_id=0,
        env_rewards=[],
        rollout_rewards=[None if np.isnan(reward) else reward for reward in rewards],
    )
    samples = asyncio.run(made._score_group(group))
    assert [sample.advantage for sample in samples] == pytest.approx([case.expected[i] for i in first], abs=TOLERANCE)
