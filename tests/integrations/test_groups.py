"""The code that the integrations share, tested without a host."""

import json
import math
import shutil

import numpy as np
import pytest
import torch
from safetensors.numpy import save_file

from helpers.host_situations import TOLERANCE, FixedPrior, situations
from v05.integrations.groups import PromptPriors, outcome_advantages, prompt_text
from v05.integrations.settings import Settings, prior_of
from v05.methods import Calibration
from v05.prior.history import HistoryPrior


def advantages_of(case, priors, **options):
    settings = Settings(case.method, case.reward_range, case.leave_one_out)
    return outcome_advantages(
        case.token_rewards,
        case.mask,
        np.array(case.ids, dtype=object),
        **dict(settings=settings, priors=priors, normalize=True, remedy="open them") | options,
    )


def opened(case, prior=None):
    """The table after the prompts of a situation were drawn. The id of a group serves as its prompt."""
    priors = PromptPriors(prior or FixedPrior(case.priors))
    groups = [group for group in dict.fromkeys(case.ids) if group != "pad0"]
    priors.open(groups, groups)
    return priors


# A padded estimator is not told which rows are of one trajectory.
@pytest.mark.parametrize("case", situations("trajectory"))
def test_padded_estimators(case):
    advantages, returns = advantages_of(case, opened(case))
    torch.testing.assert_close(advantages, case.expected_tokens, rtol=0, atol=TOLERANCE)
    assert returns is advantages


def test_a_reward_outside_the_mask_counts():
    """An agent loop may end with a tool's token, which the mask leaves out. The reward is at that token."""
    rewards, mask = torch.tensor([[0.0, 1.0], [0.0, 0.0]]), torch.tensor([[1, 0], [1, 0]])
    advantages, _ = outcome_advantages(
        rewards, mask, ["a", "a"], settings=Settings("dr_grpo"), priors=PromptPriors(), normalize=True, remedy=""
    )
    assert advantages.tolist() == [[0.5, 0.0], [-0.5, 0.0]]


def test_the_prior_learns_what_its_groups_came_to():
    prior = FixedPrior()
    priors = PromptPriors(prior)
    assert priors.open(["a", "b", "pad0"], ["x", "y", "z"]).tolist() == [0.5, 0.5, 0.5]
    rewards = torch.tensor([[1.0], [-1.0], [math.nan], [1.0], [0.5]])
    settings = Settings(reward_range=(-1.0, 1.0))
    outcome_advantages(
        rewards,
        torch.ones(5, 1),
        ["a", "b", "a", "a", "pad0"],
        settings=settings,
        priors=priors,
        normalize=True,
        remedy="",
    )
    assert prior.learnt == {"x": (2.0, 2.0), "y": (0.0, 1.0), "z": (0.0, 0.0)}
    assert np.isnan(priors.rates(["a", "b"])).all()


@pytest.mark.parametrize("dtype", [torch.bool, torch.int64, torch.float32], ids=str)
def test_a_rejected_row_has_no_say_and_teaches_nothing(dtype):
    """Hosts and users reject a rollout by a mask without a token."""
    prior = FixedPrior({"x": 0.25})
    priors = PromptPriors(prior)
    priors.open(["a", "b"], ["x", "y"])
    rewards = torch.tensor([[0.0, 1.0], [0.0, 1.0], [0.0, 0.0], [0.0, 0.0], [0.0, 1.0]])
    mask = torch.tensor([[1, 1], [0, 0], [1, 0], [1, 1], [0, 0]]).to(dtype)
    given = dict(settings=Settings("v05"), priors=priors, normalize=True, remedy="")
    advantages, _ = outcome_advantages(rewards, mask, ["a", "a", "a", "a", "b"], **given)
    expected = [[0.75, 0.75], [0.0, 0.0], [-0.25, 0.0], [-0.25, -0.25], [0.0, 0.0]]
    torch.testing.assert_close(advantages, torch.tensor(expected))
    assert prior.learnt == {"x": (1.0, 3.0), "y": (0.0, 0.0)}


@pytest.mark.parametrize("method", ["v05", "calibrated"])
def test_a_prior_may_say_nothing_of_an_open_group(method):
    """A prediction of NaN, such as V0's before the first outcomes, means no prior. A group that was never opened is an error."""
    priors = PromptPriors(FixedPrior({"x": math.nan}))
    priors.open(["a"], ["x"])
    given = dict(settings=Settings(method), priors=priors, normalize=True, remedy="")
    advantages, _ = outcome_advantages(torch.tensor([[1.0], [0.0]]), torch.ones(2, 1), ["a", "a"], **given)
    assert advantages.flatten().tolist() == pytest.approx([0.5, -0.5])


def test_only_padding_of_the_hosts_is_left_out():
    ids = ["padlock", "padlock", "pad7", f"pad{'0f' * 16}"]
    rewards = torch.tensor([[1.0], [0.0], [1.0], [1.0]])
    given = dict(settings=Settings("dr_grpo"), priors=PromptPriors(), normalize=True, remedy="")
    advantages, _ = outcome_advantages(rewards, torch.ones(4, 1), ids, **given)
    assert advantages.flatten().tolist() == [0.5, -0.5, 0.0, 0.0]


def test_calibrated_advantages_follow_the_groups_that_were_closed():
    """A prior that promises 0.9 where half succeed is trusted less after 100 groups."""
    priors = PromptPriors(FixedPrior({"x": 0.9}))
    rewards = torch.tensor([[1.0], [0.0], [1.0], [0.0]])
    given = dict(settings=Settings("calibrated"), priors=priors, normalize=True, remedy="")
    baselines = []
    for step in range(101):
        priors.open([f"{step}"], ["x"])
        advantages, _ = outcome_advantages(rewards, torch.ones(4, 1), [f"{step}"] * 4, **given)
        baselines.append(1.0 - advantages[0].item())
    assert baselines[0] == baselines[63] > baselines[100] > 0.49
    assert baselines[100] == pytest.approx(0.5, abs=0.02)


def test_a_calibration_is_fitted_as_the_method_that_learns_reads_it():
    """It is fitted so even if another method's settings were settled first, as in a host that names its estimator late."""
    rng = np.random.default_rng(0)
    ids = [f"{g}" for g in range(400)]
    rewards = torch.from_numpy(rng.random((400, 8)) < rng.beta(2.0, 2.0, (400, 1))).float().reshape(-1, 1)
    found = {}
    for method in ("ebpo", "calibrated"):
        priors = PromptPriors(FixedPrior())
        priors.settle(Settings())
        priors.open(ids, ids)
        given = dict(settings=Settings(method), priors=priors, normalize=True, remedy="")
        outcome_advantages(rewards, torch.ones(3200, 1), np.repeat(ids, 8), **given)
        found[method] = priors.settle(Settings(method)).calibration
    assert found["ebpo"] == Calibration(kappa=found["ebpo"].kappa)
    assert found["ebpo"].kappa == pytest.approx(4.0, rel=0.2)
    assert found["calibrated"].alpha != 0.0
    assert found["calibrated"].eps != Calibration().eps


def train(priors, steps, settings):
    """Take steps of the method "calibrated" on two prompts. Returns the predictions for both at each step, and the last
    calibration.
    """
    predicted = []
    for step in steps:
        priors.settle(settings)
        ids, prompts = [f"{step}a", f"{step}b"], ["1+1=", f"{step}+1="]
        predicted.append(priors.open(ids, prompts).tolist())
        rewards = torch.tensor([[1.0], [0.0], [1.0], [step % 2]])
        given = dict(settings=settings, priors=priors, normalize=True, remedy="open them")
        outcome_advantages(rewards, torch.ones(4, 1), np.repeat(ids, 2), **given)
    return predicted, priors.settle(settings).calibration


def test_a_run_goes_on_from_what_was_learnt(tmp_path):
    settings = Settings("calibrated", learnt=str(tmp_path / "new" / "prior.safetensors"))
    whole, calibration = train(PromptPriors(), range(50), Settings("calibrated"))
    train(PromptPriors(), range(40), settings)
    assert train(PromptPriors(), range(40, 50), settings) == (whole[40:], calibration)
    assert [file.name for file in (tmp_path / "new").iterdir()] == ["prior.safetensors"]


def test_what_another_prior_learnt_is_refused(tmp_path):
    file = tmp_path / "prior"
    settings = Settings(learnt=str(file))
    train(PromptPriors(), range(2), settings)
    held = file.read_bytes()
    mine = PromptPriors(FixedPrior())
    for _ in range(2):
        with pytest.raises(ValueError, match="prior holds what a HistoryPrior learnt, and this run's prior is a FixedPrior; give"):
            mine.settle(settings)
    assert file.read_bytes() == held
    mine.prior = HistoryPrior()
    mine.settle(settings)
    assert mine.prior.predict(["1+1="]) > 0.5
    with pytest.raises(ValueError, match="prior already stores another prior; set the prior before the settings"):
        mine.prior = HistoryPrior()


def test_what_no_prior_learnt_is_refused(tmp_path):
    file = tmp_path / "file"
    settings = Settings(learnt=str(file))
    for write, message in (
        (lambda: file.write_bytes(b""), r"file cannot be read \(.*\); delete it, or give another path"),
        (lambda: save_file({"weight": np.zeros(2)}, file), "file does not hold the state of a prior; give another path"),
    ):
        write()
        held = file.read_bytes()
        with pytest.raises(ValueError, match=message):
            PromptPriors().settle(settings)
        assert file.read_bytes() == held
    with pytest.raises(ValueError, match=r"v05\.learnt='prior' is relative, and hosts .*; give an absolute path"):
        Settings.read({"learnt": "prior"})


def test_a_file_that_cannot_be_written_is_refused_at_once_and_endured_later(tmp_path, caplog):
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match=r"file/prior cannot be written \(.*\); make room or give write access"):
        PromptPriors().settle(Settings(learnt=str(tmp_path / "file" / "prior")))
    settings, priors = Settings(learnt=str(tmp_path / "folder" / "prior")), PromptPriors()
    train(priors, range(1), settings)
    shutil.rmtree(tmp_path / "folder")
    (tmp_path / "folder").touch()
    train(priors, range(1, 2), settings)
    assert "what the prior learnt of this batch is not kept" in caplog.text
    (tmp_path / "folder").unlink()
    train(priors, range(2, 3), settings)
    assert train(PromptPriors(), range(3, 4), settings) == train(priors, range(3, 4), settings)


def test_a_group_that_an_earlier_process_finished_is_judged_by_its_mean(caplog):
    """A resumed host may hand over groups that it sampled before."""
    priors = PromptPriors(FixedPrior({"x": 0.9}))
    priors.open(["new"], ["x"])
    advantages, _ = outcome_advantages(
        torch.tensor([[1.0], [0.0], [1.0]]),
        torch.ones(3, 1),
        ["old", "old", "new"],
        settings=Settings(),
        priors=priors,
        normalize=True,
        remedy="open them",
    )
    assert advantages.flatten().tolist() == pytest.approx([0.5, -0.5, 0.1])
    assert "prior: none for 1 of 2 groups, the first is 'old'; their own means are used instead" in caplog.text


def test_a_group_keeps_its_prediction_while_it_is_open():
    prior = FixedPrior({"x": 0.2})
    priors = PromptPriors(prior, capacity=2)
    priors.open(["a", "a"], ["x", "x"])
    prior.rates["x"] = 0.9
    assert priors.open(["a"], ["x"]).tolist() == [0.2]
    priors.open(["b", "c"], ["x", "x"])  # more groups than the table holds: the oldest is dropped
    assert priors.rates(["a", "b", "c"]).tolist() == pytest.approx([math.nan, 0.9, 0.9], nan_ok=True)


def test_a_group_that_was_dropped_opens_anew():
    prior = FixedPrior({"x": 0.2})
    priors = PromptPriors(prior)
    priors.open(["a"], ["x"])
    prior.rates["x"] = 0.9
    assert priors.open(["a", "a"], ["x", "x"], anew=True).tolist() == [0.9, 0.9]
    priors.close(Settings().estimator(prior), ["a"], np.array([1.0]), np.array([2.0]))
    assert prior.learnt == {"x": (1.0, 2.0)}


def test_a_prior_of_other_settings_is_refused():
    priors = PromptPriors()
    priors.open(["a", "b"], ["x", "y"])  # without settings, the prior is that of the defaults
    given = dict(priors=priors, normalize=True, remedy="")
    for settings in (Settings(outcomes="eval.jsonl"), Settings(prior="v0")):
        with pytest.raises(
            ValueError,
            match=r"v05\.(outcomes='eval.jsonl': the prior in PRIORS was made with None|prior='v0': .* with 'history'); give",
        ):
            outcome_advantages(torch.ones(1, 1), torch.ones(1, 1), ["a"], settings=settings, **given)
    settings = Settings(chunk=2, reward_range=(-1.0, 1.0))  # these settings make the same prior
    advantages, _ = outcome_advantages(torch.ones(1, 1), torch.ones(1, 1), ["a"], settings=settings, **given)
    assert advantages.tolist() == [[1.0]]
    priors.prior = FixedPrior()  # a prior of the user's own is checked against no settings
    outcome_advantages(torch.ones(1, 1), torch.ones(1, 1), ["b"], settings=Settings(outcomes="eval.jsonl"), **given)


def test_what_is_missing_is_named():
    case = situations()[1].values[0]
    with pytest.raises(ValueError, match="prior: none for 2 of 2 groups, the first is 'a'; open them"):
        advantages_of(case, PromptPriors(FixedPrior()))
    with pytest.raises(
        ValueError,
        match=r"v05\.inital=3 is not a setting; choose from adapter, backbone, chunk, group_weighting, initial",
    ):
        Settings.read({"inital": 3})
    for given in (1.0, [0], ["low", "high"]):
        with pytest.raises(ValueError, match=r"v05\.reward_range=.* is not two numbers; give \[lowest, highest\]"):
            Settings.read({"reward_range": given})
    with pytest.raises(ValueError, match="reward"):
        advantages_of(case, opened(case), settings=Settings(case.method, reward_range=(0.0, 0.5)))


def test_settings_and_texts():
    assert Settings.read(None) == Settings()
    assert Settings.read({"reward_range": [-1, 1], "chunk": 2}) == Settings(reward_range=(-1.0, 1.0), chunk=2)
    assert Settings.read({"chunk": "look"}).estimator(maximum=16).allocator().would_ask([4], [0], [1.0]).tolist() == [12]
    assert Settings.read({"method": "ebpo"}).prior == "mean"  # the prior that EBPO's paper shrinks to
    assert Settings.read({"prior": "history"}, method="ebpo").prior == "history"
    assert prompt_text("2+2=") == "2+2="
    parts = [{"type": "text", "text": "2+2="}]
    messages = [{"role": "system", "content": "Add."}, {"role": "user", "content": "2+2="}, {"role": "user", "content": parts}]
    assert prompt_text(messages) == "Add.\n2+2=\n2+2="
    calls = [{"role": "assistant", "content": None, "tool_calls": []}, {"role": "assistant", "tool_calls": []}]
    assert prompt_text([*calls, *messages[:1]]) == "Add."
    image = {"type": "image", "text": None}  # the form in which Arrow returns a part without text
    assert prompt_text([{"role": "user", "content": [image, *parts]}]) == "2+2="


def test_settings_of_the_prior():
    with pytest.raises(ValueError, match=r"v05\.prior='v1' is unknown; choose one of history, mean, spo, v0"):
        Settings.read({"prior": "v1"})
    with pytest.raises(ValueError, match=r"v05\.adapter='a' belongs to prior 'v0', not to 'history'; leave it out"):
        Settings.read({"adapter": "a"})
    with pytest.raises(ValueError, match=r"backbone=absent: no config\.json there"):
        prior_of(Settings.read({"prior": "v0", "backbone": "absent"}))


@pytest.fixture(params=["history", "spo", "v0"])
def prior_settings(request, tmp_path, monkeypatch):
    """Settings that make a prior of each kind."""
    from helpers.tiny_policy import tiny_model, tiny_tokenizer

    if request.param != "v0":
        return {"prior": request.param}
    monkeypatch.setenv("V05_CACHE", str(tmp_path / "cache"))
    tiny_model().save_pretrained(tmp_path / "model")
    tiny_tokenizer().save_pretrained(tmp_path / "model")
    return {"prior": "v0", "backbone": str(tmp_path / "model")}


def test_the_prior_of_the_settings_knows_the_outcomes_given(prior_settings, tmp_path):
    rows = [
        {"policy": "p", "prompt": f"{a}{sign}{b}=", "score": score, "trials": 8}
        for a in range(6)
        for b in range(6)
        for sign, score in (("+", 1.0), ("=", -1.0))
    ]
    (tmp_path / "outcomes.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    settings = Settings.read(prior_settings | {"outcomes": str(tmp_path / "outcomes.jsonl")})
    priors = PromptPriors()
    priors.settle(settings)
    messages = [[{"role": "user", "content": prompt}] for prompt in ("1+1=", "1=1=")]
    sure, hopeless = priors.open(["a", "b"], messages)
    assert sure > 0.65
    assert hopeless < 0.35
    mine = FixedPrior()
    priors.prior = mine
    priors.settle(settings)
    assert priors.prior is mine


def test_either_prior_goes_on_from_its_file(prior_settings, tmp_path):
    settings = Settings.read(prior_settings | {"learnt": str(tmp_path / "learnt")})
    first = PromptPriors()
    estimator = first.settle(settings)
    prompts = [f"{a}+{b}=" for a in range(6) for b in range(6)]
    first.open(prompts, prompts)
    first.close(estimator, prompts, np.array([4.0 * (prompt < "3") for prompt in prompts]), np.full(len(prompts), 4.0))
    second = PromptPriors()
    second.settle(settings)
    rates = second.open(["a", "b"], ["1+1=", "5+5="])
    assert rates[0] > 0.6 > 0.4 > rates[1]
    assert rates.tolist() == first.open(["a", "b"], ["1+1=", "5+5="]).tolist()
