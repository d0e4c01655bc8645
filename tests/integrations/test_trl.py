"""V05Trainer in TRL, on the CPU with a tiny model, against GRPOTrainer. `make test-integrations` installs TRL."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from helpers.host_situations import STEP, TOLERANCE, FixedPrior, situations

pytest.importorskip("trl", exc_type=ImportError)
from datasets import Dataset
from trl import GRPOConfig, GRPOTrainer

from helpers.tiny_policy import tiny_model, tiny_tokenizer
from v05 import reference
from v05.energy import completion_energy
from v05.integrations.trl import EPS, V05Config, V05Trainer
from v05.methods import Calibration

pytestmark = [pytest.mark.host, pytest.mark.filterwarnings("default")]


@pytest.fixture(scope="module")
def tokenizer():
    return tiny_tokenizer()


def starts_with_a_low_digit(completions, **_):
    """A reward with success rates near 1/2 under a random policy, which learns it in a few steps."""
    return [float(completion[:1] in "01234" and completion != "") for completion in completions]


def make(kind, config, tokenizer, folder, reward=starts_with_a_low_digit, **options):
    settings = dict(
        output_dir=str(folder),
        per_device_train_batch_size=8,
        gradient_accumulation_steps=4,
        num_generations=8,
        max_completion_length=4,
        max_steps=1,
        report_to=[],
        save_strategy="no",
        logging_steps=1,
        use_cpu=True,
        seed=0,
        disable_tqdm=True,
        learning_rate=1e-2,
    )
    prompts = [{"prompt": f"{a}+{b}="} for a in range(8) for b in range(8)]
    return kind(
        model=tiny_model(),
        reward_funcs=reward,
        args=config(**settings | options.pop("settings", {})),
        train_dataset=Dataset.from_list(prompts),
        processing_class=tokenizer,
        **options,
    )


@pytest.mark.parametrize("scale", [("grpo", "group"), ("dr_grpo", "none")])
def test_parity_with_grpo_trainer(tokenizer, tmp_path, scale):
    """With the same completions, and rewards some of which are None, the advantages equal GRPOTrainer's to 1e-6."""
    method, scale_rewards = scale
    batches = []
    for kind, config, more in (
        (GRPOTrainer, GRPOConfig, {"scale_rewards": scale_rewards}),
        (V05Trainer, V05Config, {"method": method, "initial_generations": None}),
    ):
        rng = np.random.default_rng(0)

        def noisy(completions, rng=rng, **_):
            return [None if rng.random() < 0.1 else float(rng.normal()) for _ in completions]

        trainer = make(kind, config, tokenizer, tmp_path, noisy, settings=more)
        trainer.model.train()
        torch.manual_seed(1)
        batches.append(trainer._generate_and_score_completions(next(iter(trainer.get_train_dataloader()))))
    theirs, ours = batches
    assert torch.equal(ours["completion_ids"], theirs["completion_ids"])
    assert (theirs["advantages"] == 0).any()
    torch.testing.assert_close(ours["advantages"], theirs["advantages"], rtol=0, atol=1e-6)


@pytest.mark.parametrize("method", ["v05", "calibrated"])
def test_twenty_steps(tokenizer, tmp_path, method):
    """The reward rises in training, and groups have different sizes."""
    settings = {"method": method, "max_steps": 20, "initial_generations": 2}
    trainer = make(V05Trainer, V05Config, tokenizer, tmp_path, settings=settings)
    trainer.train()
    log = [entry for entry in trainer.state.log_history if "reward" in entry]
    assert len(log) == 20
    assert np.mean([entry["reward"] for entry in log[-5:]]) > np.mean([entry["reward"] for entry in log[:5]]) + 0.1
    sizes = [entry["v05/group_size"] for entry in log]
    assert 2 <= min(sizes) < max(sizes) <= 8
    assert (trainer.calibrator.calibration != Calibration()) == (method == "calibrated")  # fitted after 64 of 80 groups


def adaptive_batch(trainer):
    trainer.model.train()
    torch.manual_seed(1)
    return trainer._generate_and_score_completions(next(iter(trainer.get_train_dataloader())))


def test_rounds_ask_where_prior_and_rewards_disagree(tokenizer, tmp_path):
    calls = []

    def by_prompt(prompts, completions, **_):
        calls.append(list(prompts))
        return [float(int(prompt[0]) % 2) for prompt in prompts]

    prior = FixedPrior({f"{a}+{b}=": 0.95 if a % 2 else 0.9 for a in range(8) for b in range(8)})
    trainer = make(V05Trainer, V05Config, tokenizer, tmp_path, by_prompt, prior=prior, settings={"initial_generations": 2})
    batch = adaptive_batch(trainer)
    sizes = {prompt: trials for prompt, (_, trials) in prior.learnt.items()}
    assert len(sizes) == 4  # one entry for each prompt of the batch
    for prompt, (successes, trials) in prior.learnt.items():
        # A prompt that succeeds as predicted stops after 2. A prompt that fails against its prior goes on to 8.
        assert (successes, trials) == ((2, 2) if int(prompt[0]) % 2 else (0, 8)), prompt
    assert len(calls[0]) == 2 * 4
    assert sum(map(len, calls)) == sum(sizes.values())  # every completion is scored once, and no padding row is
    sampled = int(sum(sizes.values()))
    rows = len(batch["advantages"])
    assert sampled <= rows < sampled + trainer.args.steps_per_generation
    assert rows % trainer.args.steps_per_generation == 0
    padding = batch["tool_mask"].mul(batch["completion_mask"]).sum(1) == 0
    assert int(padding.sum()) == rows - sampled
    assert (batch["advantages"][padding] == 0).all()
    assert batch["num_items_in_batch"] == (batch["completion_mask"] * batch["tool_mask"]).sum()


@pytest.mark.parametrize("method", ["v05", "calibrated"])
def test_rounds_may_be_unbiased(tokenizer, tmp_path, method):
    """The advantages are those of path counting over the sampled completions, and prompts have equal weight in the loss."""
    from v05.path_counting import path_counting_advantages

    scored = {}

    def noted(prompts, completions, **_):
        rewards = starts_with_a_low_digit(completions)
        for prompt, reward in zip(prompts, rewards, strict=True):
            scored.setdefault(prompt, []).append(reward)
        return rewards

    rates = {f"{a}+{b}=": 0.98 if a % 2 else 0.5 for a in range(8) for b in range(8)}
    settings = {"method": method, "initial_generations": 2, "unbiased": True, "group_weighting": "prompt"}
    trainer = make(V05Trainer, V05Config, tokenizer, tmp_path, noted, settings=settings, prior=FixedPrior(rates))
    batch = adaptive_batch(trainer)
    sizes = {len(rewards) for rewards in scored.values()}
    assert len(sizes) > 1
    wanted = [
        advantage * 2 / len(rewards)
        for prompt, rewards in scored.items()
        for advantage in path_counting_advantages(
            rewards, [rates[prompt]], [0, len(rewards)], method=method, initial=2, maximum=8, calibration=Calibration()
        )
    ]
    trains = batch["tool_mask"].mul(batch["completion_mask"]).sum(1) > 0
    assert sorted(batch["advantages"][trains].tolist()) == pytest.approx(sorted(map(float, wanted)), abs=1e-6)
    assert trainer._metrics["train"]["v05/counted"] == [1.0]


@pytest.mark.parametrize("method", ["optimal", "otb", "opo"])
def test_energies_come_from_the_log_probabilities_that_trl_has(tokenizer, tmp_path, method):
    """TRL has log-probabilities if a batch is used for two updates."""
    adaptive = 2 if method == "optimal" else None
    settings = {"method": method, "initial_generations": adaptive, "num_iterations": 2, "leave_one_out": True}
    trainer = make(V05Trainer, V05Config, tokenizer, tmp_path, settings=settings)
    batch = adaptive_batch(trainer)
    if method == "optimal":
        energies = trainer.calibrator.state_dict()["energies"]
        mask = (batch["completion_mask"] * batch["tool_mask"]).bool()
        each = [completion_energy(row[tokens]) for row, tokens in zip(batch["old_per_token_logps"], mask, strict=True)]
        assert energies.sum() == pytest.approx(sum(each), rel=1e-6)
        assert (energies > 0).any(axis=0).all()
    assert (batch["advantages"] != 0).any()


def test_unbiased_advantages_want_rounds_and_prompts_that_weigh_alike(tokenizer, tmp_path):
    for settings in ({"group_weighting": "rollout"}, {"group_weighting": "prompt", "initial_generations": None}):
        with pytest.raises(ValueError, match=r"unbiased=True with initial_generations=.*leave_one_out=True instead"):
            make(V05Trainer, V05Config, tokenizer, tmp_path, settings={"unbiased": True, **settings})


def test_what_reward_functions_log_stands_in_its_rows(tokenizer, tmp_path):
    """TRL's table of completions after rounds: columns are complete, and each value is beside the completion for which it was
    logged.
    """
    calls = []

    def logging(prompts, completions, log_extra, **_):
        calls.append(prompts)
        log_extra("seen", list(completions))
        if len(calls) > 1:
            log_extra("late", list(prompts))
        return starts_with_a_low_digit(completions)

    settings = {"initial_generations": 2, "log_completions": True}
    make(V05Trainer, V05Config, tokenizer, tmp_path, logging, settings=settings, prior=FixedPrior()).train()
    (file,) = (tmp_path / "completions").glob("*.parquet")
    table = Dataset.from_parquet(str(file), cache_dir=str(tmp_path / "cache")).to_list()
    assert len(table) == 4 * 8
    sampled = [row for row in table if row["seen"] is not None]
    assert len(sampled) == sum(map(len, calls)) < len(table)
    assert all(row["seen"] == row["completion"] for row in sampled)
    assert all(row["completion"] == "" for row in table if row["seen"] is None)
    late = [row for row in table if row["late"] is not None]
    assert len(late) == sum(map(len, calls[1:])) > 0
    assert all(row["late"] == row["prompt"] for row in late)


def test_a_column_with_too_few_values_is_refused(tokenizer, tmp_path):
    def logging(completions, log_extra, **_):
        log_extra("seen", completions[:1])
        return starts_with_a_low_digit(completions)

    with pytest.raises(ValueError, match=r"log_extra\('seen', \.\.\.\): 1 values for 16 completions; give one for each"):
        adaptive_batch(make(V05Trainer, V05Config, tokenizer, tmp_path, logging))


def test_padding_rows_change_neither_loss_nor_gradient(tokenizer, tmp_path):
    def random_reward(completions, **_):
        return [float(len(completion) % 2) for completion in completions]

    settings = {"initial_generations": 2, "per_device_train_batch_size": 32, "gradient_accumulation_steps": 1}
    trainer = make(V05Trainer, V05Config, tokenizer, tmp_path, random_reward, settings=settings, prior=FixedPrior())
    kept = []
    trainer._without_padding = lambda output, padding: kept.append(padding) or output  # keeps all padding rows
    batch = adaptive_batch(trainer)
    (padding,) = kept
    assert 0 < padding.sum() < 32
    trainer.current_gradient_accumulation_steps = 1

    def loss_and_gradient(inputs):
        trainer.model.zero_grad()
        loss = trainer._compute_loss(trainer.model, inputs)
        loss.backward()
        return loss.item(), torch.cat([p.grad.flatten() for p in trainer.model.parameters()])

    with_padding, without = loss_and_gradient(batch), loss_and_gradient(V05Trainer._without_padding(trainer, batch, padding))
    assert with_padding[0] == pytest.approx(without[0], abs=1e-7)
    torch.testing.assert_close(with_padding[1], without[1], rtol=1e-5, atol=1e-8)
    assert with_padding[1].abs().max() > 0


# In TRL, groups have one size and adjacent rows, and each row is a rollout. Sizes differ only after rounds and for missing rewards.
@pytest.mark.parametrize(
    "case", situations("uneven", "singleton", "adjacent", "trajectory", "padding", "reject", "all alike", "nearly")
)
def test_situations(tokenizer, tmp_path, case):
    size = len(case.rewards) // len(set(case.groups))
    tolerance = 5e-4 if case.method == "grpo" else TOLERANCE  # covers TRL's eps
    assert situated(case, size, tokenizer, tmp_path) == pytest.approx(case.expected, abs=tolerance)


def test_nearly_equal_rewards_at_a_large_offset(tokenizer, tmp_path):
    (case,) = (parameter.values[0] for parameter in situations() if "nearly" in parameter.id)
    scaled = STEP / (STEP + EPS)
    assert situated(case, 3, tokenizer, tmp_path) == pytest.approx([-scaled, 0, scaled], abs=TOLERANCE)


def situated(case, size, tokenizer, folder):
    """V05Trainer's advantages if the completions of a batch get the rewards of a situation."""
    count = len(case.rewards)
    settings = {
        "method": case.method,
        "initial_generations": None,
        "leave_one_out": case.leave_one_out,
        "reward_range": list(case.reward_range),
        "num_generations": size,
        "per_device_train_batch_size": count,
        "gradient_accumulation_steps": 1,
    }

    def given(completions, **_):
        return [None if np.isnan(reward) else reward for reward in case.rewards]

    trainer = make(V05Trainer, V05Config, tokenizer, folder, given, settings=settings, prior=FixedPrior())
    return adaptive_batch(trainer)["advantages"].tolist()


@pytest.mark.parametrize("initial", [None, 2])
def test_completions_that_are_masked_have_no_say(tokenizer, tmp_path, initial):
    """On request TRL masks completions that are cut off. Their rewards are hidden from the budget rule too."""

    def succeed(completions, **_):
        return [1.0] * len(completions)

    settings = {"mask_truncated_completions": True, "initial_generations": initial, "max_completion_length": 1}
    prior = FixedPrior()
    trainer = make(V05Trainer, V05Config, tokenizer, tmp_path, succeed, settings=settings, prior=prior)
    trainer.eos_token_ids = list(range(0, trainer.model.config.vocab_size, 2))  # half of the completions end in time
    batch = adaptive_batch(trainer)
    trained = (batch["completion_mask"] * batch.get("tool_mask", 1)).any(dim=1)
    assert trained.any()
    assert not trained.all()
    assert (batch["advantages"][~trained] == 0).all()
    assert sum(trials for _, trials in prior.learnt.values()) == trained.sum()


def test_an_interrupted_run_keeps_its_prior(tokenizer, tmp_path):
    settings = {"max_steps": 2, "save_strategy": "steps", "save_steps": 1, "initial_generations": 2}
    first = make(V05Trainer, V05Config, tokenizer, tmp_path, settings=settings)
    first.train()
    second = make(V05Trainer, V05Config, tokenizer, tmp_path, settings=settings | {"max_steps": 3})
    resumed = []
    second.prior.load_state_dict = lambda state: resumed.append(state)
    second.train(resume_from_checkpoint=True)
    assert resumed[0].keys() == first.prior.state_dict().keys()
    for name, learnt in first.prior.state_dict().items():
        np.testing.assert_array_equal(resumed[0][name], learnt)


def test_groups_split_over_processes(tmp_path):
    """Every process judges whole groups and passes on its own rows. All learn the same, and resume from one checkpoint."""
    script = Path(__file__).with_name("trl_rank_script.py")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(script), str(tmp_path)]
    paths = os.pathsep.join(filter(None, sys.path))
    result = subprocess.run(command, env=os.environ | {"PYTHONPATH": paths}, capture_output=True, text=True, timeout=240)
    assert result.returncode == 0, result.stderr
    first, second = (torch.load(tmp_path / f"{rank}.pt", weights_only=False) for rank in range(2))
    assert len(first["batches"]) == len(second["batches"]) == 3
    for (rates, rewards, mine), (their_rates, their_rewards, theirs) in zip(first["batches"], second["batches"], strict=True):
        assert rates == their_rates
        assert len(rewards) == 2 * len(mine) == 2 * len(theirs) == 8
        assert torch.equal(rewards, their_rewards)
        expected = reference.advantages(rewards.double().numpy(), np.zeros(8, dtype=int), np.array(rates))[0]
        assert torch.cat((mine, theirs)).tolist() == pytest.approx(expected.tolist(), abs=TOLERANCE)
    assert len({tuple(rewards.tolist()) for _, rewards, _ in first["batches"]}) > 1
    assert torch.equal(first["weights"], second["weights"])
    assert int(first["learnt"]["step"]) == 3
    assert int(first["resumed"]["step"]) == 4
    for kept in ("learnt", "resumed"):
        assert first[kept].keys() == second[kept].keys()
        for name, learnt in first[kept].items():
            np.testing.assert_array_equal(second[kept][name], learnt)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"method": "grpo"}, r"initial_generations=4 with method='grpo'; choose a method with a prior, or give None"),
        ({"loss_type": "grpo"}, r"initial_generations=4 with loss_type='grpo'; choose dapo or cispo or vespo, or give None"),
        ({"method": "gpro"}, r"method='gpro' is unknown"),
        ({"multi_objective_aggregation": "normalize_then_sum"}, "V_0.5 works on sums of rewards"),
    ],
)
def test_what_does_not_go_together_is_refused(tokenizer, tmp_path, settings, message):
    with pytest.raises(ValueError, match=message):
        make(V05Trainer, V05Config, tokenizer, tmp_path, settings=settings)


def test_another_configuration_is_refused(tokenizer, tmp_path):
    with pytest.raises(ValueError, match="args: GRPOConfig; give V05Trainer a V05Config"):
        make(V05Trainer, GRPOConfig, tokenizer, tmp_path)
