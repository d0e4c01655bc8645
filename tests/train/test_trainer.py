"""Whole runs of the smoke preset: every method trains, is reproducible, and logs what it spent."""

import gc
import json
import math
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch

from v05 import reference
from v05.methods import METHODS, Calibration
from v05.ops import LOSSES, Importance, loss_weights
from v05.path_counting import path_counting_advantages
from v05.prior import NoisePrior
from v05.prior.v0.logs import read_logs
from v05.reference import losses
from v05.rollout import Completion
from v05.rollout.scheduler import RolloutBatch
from v05.tasks import heldout_set, make_task
from v05.train import step_records
from v05.train.config import BudgetConfig, LossConfig, OptimizerConfig, OverlongConfig, PolicyConfig, RunConfig
from v05.train.dapo import has_signal, shaped_rewards
from v05.train.engine import engine_of_folder
from v05.train.estimator import estimate_batch
from v05.train.metrics import read_metrics
from v05.train.policy import load_policy, load_tokenizer, policy_folder
from v05.train.presets import MAX_NEW_TOKENS, PRESETS, given_policy, label_of, run_config
from v05.train.step_records import SAMPLED_COMPLETIONS, SAMPLED_GROUPS, histogram, prior_outcomes, shortened
from v05.train.trainer import Trainer

TIMES = {"seconds", "generate_seconds", "verify_seconds", "sample_seconds", "advantage_seconds", "update_seconds", "sync_seconds"}


def train(config, directory):
    for _ in Trainer(config, directory, lambda line: None).run():
        pass
    return json.loads((directory / "result.json").read_text())


def untimed(directory):
    return [{k: v for k, v in record.items() if k not in TIMES} for record in read_metrics(directory)]


@pytest.mark.parametrize("method", METHODS)
def test_every_method_runs_to_its_budget(method, tmp_path):
    config = run_config("smoke", method)
    result = train(config, tmp_path)
    steps = read_metrics(tmp_path, "step")
    assert result["rollouts"] > 256 - 64 / 2
    if not config.max_refills:
        assert min(step["prompts"] for step in steps) >= 64 / 2 / config.budget.maximum  # no step is made of a small remainder
    assert result["rollouts"] == steps[-1]["rollouts"] == sum(s["spent"] for s in steps)
    assert result["steps"] == len(steps)
    assert sum(result["heldout_successes"]) / (16 * 2) == result["accuracy_after"]
    (final,) = read_metrics(tmp_path, "final")
    assert {name: result[name] for name in ("greedy", "mean_at_k", "pass_at_k", "k")}.items() <= final.items()
    assert 0 <= result["mean_at_k"] <= result["pass_at_k"] <= 1
    assert next(e["rollouts"] for e in read_metrics(tmp_path, "evaluation")) == 0
    assert bool(read_metrics(tmp_path, "probe")) != config.budget.unbiased
    assert read_metrics(tmp_path, "evaluation")[-1]["rollouts"] == result["rollouts"]
    assert (tmp_path / "policy" / "model.safetensors").is_file()
    assert RunConfig.model_validate_json((tmp_path / "config.json").read_text()) == run_config("smoke", method)
    assert all(math.isfinite(e["entropy"]) for e in read_metrics(tmp_path, "evaluation"))
    assert any(s["grad_norm"] for s in steps)


def test_what_is_said_of_the_policy_at_the_end_is_what_its_folder_does(tmp_path):
    config = run_config("smoke", "none")
    result = train(config, tmp_path)
    model, tokenizer = load_policy(tmp_path / "policy")
    task = make_task(config.task)
    answers = []
    for prompt in heldout_set(task, config.evaluation.prompts):
        ids = tokenizer(prompt.text, add_special_tokens=False, return_tensors="pt")["input_ids"]
        out = model.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=config.policy.max_new_tokens)
        answers.append(task.verify(prompt, tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True)))
    assert result["greedy"] == np.mean(answers)
    without = run_config("smoke", "none", ["evaluation.final_samples=0"])
    assert "greedy" not in train(without, tmp_path / "without")


def test_a_given_policy_has_the_limit_of_a_preset_for_language_models(tmp_path):
    limit = PRESETS["gsm"]["policy"].max_new_tokens
    assert given_policy("gsm", tmp_path) == PolicyConfig(path=tmp_path, max_new_tokens=limit)
    assert given_policy("gsm", tmp_path, 9).max_new_tokens == 9
    assert given_policy("tiny", tmp_path).max_new_tokens == MAX_NEW_TOKENS  # the limit of tiny is meant for characters
    assert run_config("gsm", "optimal@1", policy=given_policy("gsm", tmp_path)).chat
    with pytest.raises(ValueError, match=r"policy.path is None, but chat=True.* give its folder: --policy FOLDER"):
        run_config("gsm", "optimal@1")


def test_prompts_go_into_the_chat_template(tmp_path):
    config = run_config("smoke", "v05", total_rollouts=64)
    start = policy_folder(config.policy, config.task, make_task(config.task), print)
    asked = config.model_copy(update={"policy": PolicyConfig(path=tmp_path / "start", max_new_tokens=4), "chat": True})
    shutil.copytree(start, tmp_path / "start")
    with pytest.raises(ValueError, match=r"chat=True, but the tokenizer of .*start has no chat template"):
        Trainer(asked, tmp_path / "none", print)
    tokenizer = load_tokenizer(start)
    tokenizer.chat_template = "{{ messages[0]['role'] }}:{{ messages[0]['content'] }}{% if add_generation_prompt %}:{% endif %}"
    tokenizer.save_pretrained(tmp_path / "start")
    trainer = Trainer(asked, tmp_path / "run", print)
    prompt = trainer.heldout[0]
    assert tokenizer.decode(trainer.sampler.tokens_of(prompt)) == f"user:{prompt.text}:"
    for _ in trainer.run():
        pass
    assert (tmp_path / "run" / "result.json").is_file()


def test_the_same_seed_gives_the_same_run(tmp_path):
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        train(run_config("smoke", "v05", seed=seed), tmp_path / name)
    assert untimed(tmp_path / "a") == untimed(tmp_path / "b")
    assert untimed(tmp_path / "a") != untimed(tmp_path / "c")


@pytest.mark.parametrize("method", ["grpo", "v05"])
def test_training_moves_the_policy_towards_reward(method, tmp_path):
    config = run_config("smoke", method, total_rollouts=6000, rollouts_per_step=128, optimizer=OptimizerConfig(learning_rate=1e-3))
    trainer = Trainer(config, tmp_path, lambda line: None)
    trainer.task.verify = lambda prompt, completion: float(completion.startswith("1"))  # learnt within seconds
    list(trainer.run())
    steps = read_metrics(tmp_path, "step")
    assert np.mean([s["accuracy"] for s in steps[-5:]]) > np.mean([s["accuracy"] for s in steps[:5]]) + 0.3
    if method == "v05":
        errors = [s["prior_gap"] for s in steps]
        assert np.median(errors[-5:]) < errors[0] / 2  # the prior follows the policy


@pytest.mark.parametrize("spec", ["calibrated@2..8", "calibrated@2..8~3"])
def test_the_budget_follows_the_fit(spec, tmp_path):
    """Later steps allocate by the calibration fitted in earlier ones. A resumed run continues with the same fit."""
    config = run_config("smoke", spec, rollouts_per_step=256, total_rollouts=1600, checkpoint_seconds=0.0)
    trainer = Trainer(config, tmp_path / "torn", lambda line: None)
    run = trainer.run()
    while trainer.state.steps < 4:
        next(run)
    fitted = trainer.estimator.calibrator.state_dict()
    assert trainer.estimator.calibrator.calibration != Calibration()
    del run, trainer
    gc.collect()  # releases the run's files
    resumed = Trainer(config, tmp_path / "torn", lambda line: None)
    for name, value in resumed.estimator.calibrator.state_dict().items():
        np.testing.assert_array_equal(value, fitted[name])
    list(resumed.run())
    train(config, tmp_path / "whole")
    assert untimed(tmp_path / "torn") == untimed(tmp_path / "whole")
    steps = read_metrics(tmp_path / "torn", "step")
    assert steps[0]["failed_fits"] == steps[-1]["failed_fits"] == 0
    assert len({s["calibration_kappa"] for s in steps}) > 1
    assert all(s["unbiased"] == ("~" not in spec) for s in steps)
    if "~" in spec:
        assert all(s["spent"] == 3 * s["prompts"] for s in steps)


def test_paths_are_counted_where_they_can_be(tmp_path):
    trainer = Trainer(run_config("smoke", "calibrated@2..8"), tmp_path, lambda line: None)
    batch, _ = trainer.sampler.sample()
    sizes = np.diff(batch.offsets)
    assert len(set(sizes.tolist())) > 1
    estimate = estimate_batch(trainer.estimator, batch, batch.rewards)
    counted = path_counting_advantages(
        batch.rewards, batch.priors, batch.offsets, method="calibrated", initial=2, maximum=8, calibration=Calibration()
    )
    assert estimate.counted.all()
    assert torch.equal(estimate.advantages, counted.float())
    assert not estimate_batch(trainer.estimator, replace(batch, invalid=1), batch.rewards).counted.any()
    assert not estimate_batch(trainer.estimator, batch, batch.rewards * 0.5).counted.any()


@pytest.mark.parametrize("method", ["v05", "calibrated", "grpo"])
def test_steps_record_what_their_groups_came_to(method, tmp_path):
    train(run_config("smoke", method), tmp_path)
    steps = read_metrics(tmp_path, "step")
    for step in steps:
        assert sum(step["group_sizes"]) == step["prompts"]
        assert sum(size * count for size, count in enumerate(step["group_sizes"])) == step["spent"]
        histograms = {"v05": step["weights"], "calibrated": step["hallucinations"]}
        assert all(
            (sum(counts) if counts else 0) == (step["prompts"] if name == method else 0) for name, counts in histograms.items()
        )
        if method == "grpo":
            assert step["prior_outcomes"] is step["prior_rejected"] is None
        else:
            groups, priors, _ = np.sum(step["prior_outcomes"], axis=0)
            assert groups == step["prompts"]
            assert priors / groups == pytest.approx(step["prior_mean"])
            assert 0 <= step["prior_rejected"] <= 1
    tokens = np.cumsum([step["tokens"] for step in steps])
    assert [step["generated_tokens"] for step in steps] == tokens.tolist()
    assert read_metrics(tmp_path, "evaluation")[-1]["generated_tokens"] == tokens[-1]


def test_the_noise_is_that_of_the_advantages():
    """Without a baseline, the noise is the energy-weighted mean square of the rewards, even if the advantages are scaled."""
    energies, rewards = np.array([0.5, 2.0, 1.0, 4.0]), np.array([1.0, 0.0, 1.0, 1.0])
    batch = fake_batch([0, 2, 4], [one_token(energy) for energy in energies])
    assert step_records.gradient_noise(batch, rewards, rewards, False) == pytest.approx(5.5 / 7.5)
    assert step_records.gradient_noise(batch, rewards, 3 * rewards, True) == pytest.approx(5.5 / 7.5)
    assert step_records.gradient_noise(batch, rewards, rewards - 0.5, False) == pytest.approx(0.25)
    assert math.isnan(step_records.gradient_noise(batch, np.ones(4), np.zeros(4), True))  # equal rewards do not determine the scale
    assert math.isnan(step_records.gradient_noise(fake_batch([0], []), np.zeros(0), np.zeros(0), False))


def one_token(energy):
    """A completion of one token with known energy: (1 - pi)^2 + (sum of squares - pi^2)."""
    return Completion(np.zeros(1, dtype=np.int64), np.zeros(1, dtype=np.float32), True, np.array([1.0 + energy]))


def fake_batch(offsets, completions):
    return RolloutBatch(
        prompts=[None] * (len(offsets) - 1),
        prompt_tokens=[],
        priors=np.zeros(len(offsets) - 1),
        offsets=np.array(offsets),
        rewards=np.zeros(len(completions)),
        completions=completions,
        invalid=0,
        failures=[],
        in_flight=0.0,
        generate_seconds=0.0,
        verify_seconds=0.0,
    )


@pytest.mark.parametrize("method", ["rloo@4", "grpo@4", "calibrated@2", "prior@1"])
def test_the_probed_baseline_is_the_one_that_was_subtracted(method, tmp_path, monkeypatch):
    """With made-up rewards and true rates, the logged error is that of the group's other rewards, of the group's mean, or of the
    prior.
    """
    config = run_config("smoke", method, evaluation={"probe_prompts": 4, "probe_samples": 2, "prompts": 4, "evaluations": 1})
    trainer = Trainer(config, tmp_path, print)
    sample_step = trainer.sampler.sample

    def sample():
        batch, thrown_away = sample_step()
        batch.rewards[:] = np.arange(len(batch.rewards)) % 2
        if trainer.estimator.of.needs_prior:
            batch.priors[:] = 0.3
        return batch, thrown_away

    def true_rewards(prompts, samples, seed):
        return np.full((len(prompts), samples), 0.25), []

    monkeypatch.setattr(trainer.sampler, "sample", sample)
    monkeypatch.setattr(trainer.evaluator, "true_rewards", true_rewards)
    trainer.step(probe=True)
    (probe,) = read_metrics(tmp_path, "probe")
    alone, _ = reference.advantages([0.0, 1.0], [0, 0], [0.3], method="calibrated", leave_one_out=True)  # not fitted yet
    expected = {
        "rloo@4": np.mean([(2 / 3 - 0.25) ** 2, (1 / 3 - 0.25) ** 2]),  # for a reward 0 and for a reward 1
        "grpo@4": 0.25**2,
        "prior@1": 0.05**2,
        "calibrated@2": np.mean(([0.0, 1.0] - alone - 0.25) ** 2),
    }[method]
    assert probe["baseline_mse"] == pytest.approx(expected)


def test_completions_are_recorded_after_evaluations(tmp_path, monkeypatch):
    monkeypatch.setattr(step_records, "SAMPLED_CHARACTERS", 4)
    config = run_config("smoke", "v05", total_rollouts=64 * 6)
    train(config, tmp_path)
    groups = read_metrics(tmp_path, "group")
    probed = [probe["rollouts"] for probe in read_metrics(tmp_path, "probe")]
    assert len(probed) < len(read_metrics(tmp_path, "step"))
    assert sorted({group["rollouts"] for group in groups}) == probed
    assert all(sum(group["rollouts"] == rollouts for group in groups) <= SAMPLED_GROUPS for rollouts in probed)
    for group in groups:
        completions = group["completions"]
        assert len(completions) == min(group["size"], SAMPLED_COMPLETIONS)
        assert all(c["advantage"] == pytest.approx(c["reward"] - group["baseline"], abs=1e-6) for c in completions)
        if group["size"] <= SAMPLED_COMPLETIONS:
            assert np.mean([c["reward"] for c in completions]) == pytest.approx(group["mean"])
        assert group["prompt"].endswith("=")
    assert shortened("abcdef") == "ab [... 2 characters ...] ef"
    assert shortened("abcd") == "abcd"


def test_a_groups_outcome_is_that_of_its_first_rollouts(tmp_path):
    trainer = Trainer(run_config("smoke", "v05"), tmp_path, lambda line: None)
    batch, _ = trainer.sampler.sample()
    batch = replace(
        batch,
        prompts=batch.prompts[:4],
        priors=np.array([0.0, 0.05, 1.0, np.nan]),
        offsets=np.array([0, 2, 6, 7, 9]),
        rewards=np.array([1.0, 0.0, 0.0, 0.0, 1.0, 1.0, 1.0, 1.0, 1.0]),
    )
    bins = prior_outcomes(batch, 2)
    assert bins[0] == [2, 0.05, 0.5]  # the later rewards of the second group do not count
    assert bins[9] == [1, 1.0, 1.0]  # a group of one rollout
    assert sum(groups for groups, _, _ in bins) == 3  # the last group has no prior
    assert histogram(torch.tensor([0.0, 0.09, 0.1, 1.0, torch.nan])) == [2, 1, 0, 0, 0, 0, 0, 0, 0, 1]


def test_dynamic_sampling_throws_away_and_counts(tmp_path):
    trainer = Trainer(run_config("smoke", "dapo"), tmp_path, lambda line: None)
    batch, thrown_away = trainer.sampler.sample()
    assert has_signal(batch).all()
    assert trainer.state.rollouts == len(batch.rewards) + thrown_away
    assert trainer.state.groups >= len(batch.prompts)


@pytest.mark.parametrize("cap", [None, 2.0])
def test_nothing_but_equal_groups_is_survived(cap, tmp_path):
    # The policy always fails. Every group is thrown away, and each step goes on with an empty batch.
    config = run_config("smoke", "dapo", loss={"clip_high": 0.28, "importance_cap": cap})
    trainer = Trainer(config, tmp_path, lambda line: None)
    trainer.task.verify = lambda prompt, completion: 0.0
    list(trainer.run())
    steps = read_metrics(tmp_path, "step")
    assert all(s["prompts"] == 0 and s["thrown_away"] == s["spent"] for s in steps)
    assert all(s["grad_norm"] is None for s in steps)
    assert steps[-1]["rollouts"] > config.total_rollouts - config.rollouts_per_step / 2


def test_overlong_shaping_is_daposs_ramp():
    def completion(length, finished=True):
        return Completion(np.zeros(length, dtype=np.int64), np.zeros(length, dtype=np.float32), finished)

    completions = [completion(1), completion(7), completion(8), completion(8, finished=False)]  # the end token does not count
    shaped = shaped_rewards(np.ones(4), completions, OverlongConfig(buffer=2), limit=8)
    assert shaped.tolist() == [1.0, 1.0, 0.5, 0.0]
    assert shaped_rewards(np.ones(4), completions, None, limit=8).tolist() == [1.0] * 4


def test_leaving_out_rollouts_without_advantage_is_exact(tmp_path):
    gradients = []
    for split, tokens in ((True, 80), (False, 100_000)):
        config = run_config("smoke", "dr_grpo", rollouts_per_step=256, optimizer={"tokens_per_backward": tokens})
        trainer = Trainer(config, tmp_path / str(split), lambda line: None)
        batch, _ = trainer.sampler.sample()
        advantages = torch.from_numpy(batch.rewards - 0.5 * (np.arange(len(batch.rewards)) % 2)).float()
        if not split:  # this side makes one pass over all rows; the other makes many micro-batches, without rows of advantage 0
            advantages = torch.where(advantages == 0, 1e-30, advantages)
        parameters = list(trainer.learner.model.parameters())
        trainer.learner.optimizer.step = lambda p=parameters: gradients.append(torch.cat([each.grad.flatten() for each in p]))
        trainer.learner.update(batch, advantages)
        assert all(each.grad is None for each in parameters)  # sampling has their memory
    assert (gradients[0] - gradients[1]).norm() < 1e-5 * gradients[1].norm()


def test_kl_and_several_updates_a_step(tmp_path):
    config = run_config(
        "smoke",
        "grpo",
        loss=LossConfig(kl_coefficient=0.1, aggregation="sequence"),
        optimizer=OptimizerConfig(learning_rate=1e-2, updates_per_step=2),
    )
    train(config, tmp_path)
    steps = read_metrics(tmp_path, "step")
    assert steps[-1]["kl"] > 0
    assert any(s["clip_fraction"] > 0 for s in steps)  # the second update of a step is off-policy


def test_clip_fraction_is_that_of_the_updates(tmp_path):
    optimizer = OptimizerConfig(updates_per_step=2, tokens_per_backward=60)
    trainer = Trainer(run_config("smoke", "v05@4", optimizer=optimizer), tmp_path, lambda line: None)
    batch, _ = trainer.sampler.sample()
    for completion in batch.completions:  # as if sampled by a policy of the opposite opinion: every ratio is huge
        completion.logprobs[:] -= 10
    assert trainer.learner.update(batch, torch.ones(len(batch.rewards)))["clip_fraction"] == pytest.approx(1.0)


@pytest.mark.parametrize("kind", LOSSES)
def test_every_loss_is_that_of_its_row(kind, tmp_path):
    settings = LossConfig(kind=kind, importance_cap=1.1, importance_level="sequence")
    trainer = Trainer(run_config("smoke", "v05@4", loss=settings), tmp_path, lambda line: None)
    batch, _ = trainer.sampler.sample()
    learner, random = trainer.learner, np.random.default_rng(0)
    rescored = learner.rescore(batch)  # log-probabilities under the policy that is updated
    for completion in batch.completions:
        completion.logprobs[:] += 0.1 * random.normal(size=len(completion.logprobs))
    old = [row + 0.3 * random.normal(size=len(row)).astype(np.float32) for row in rescored]
    advantages = torch.from_numpy(random.normal(size=len(batch.rewards)))
    row, limit = LOSSES[kind], trainer.config.policy.max_new_tokens
    weights = loss_weights(
        torch.tensor([len(completion.tokens) for completion in batch.completions]),
        aggregation=row.aggregation,
        group_offsets=torch.from_numpy(batch.offsets),
        length=limit if row.aggregation == "constant" else None,
    )
    wanted, _, figures = losses.policy_loss(
        [values.tolist() for values in rescored],
        [values.tolist() for values in old],
        advantages.tolist(),
        weights.tolist(),
        row,
        samplers=[completion.logprobs.tolist() for completion in batch.completions],
        importance=Importance(cap=1.1, level="sequence"),
    )
    got = learner.update(batch, advantages, old)
    assert got["loss"] == pytest.approx(wanted, rel=1e-4)
    assert got["clip_fraction"] == pytest.approx(figures["clip_fraction"], abs=1e-6)
    assert got["grad_norm"] > 0


def test_verifier_processes_change_no_figure(tmp_path):
    for workers in (0, 2):
        train(run_config("smoke", "v05", verifier={"workers": workers, "time_limit": 60.0}), tmp_path / str(workers))
    assert untimed(tmp_path / "0") == untimed(tmp_path / "2")


def test_rescoring_the_engines_rollouts_changes_rounding_only(tmp_path):
    for cap in (None, 2.0):
        train(run_config("smoke", "v05", loss=LossConfig(importance_cap=cap), total_rollouts=128), tmp_path / str(cap))
    plain, weighted = (read_metrics(tmp_path / str(cap), "step") for cap in (None, 2.0))
    assert all(s["mismatch"] is None for s in plain)
    assert all(0 < s["mismatch"] < 1e-5 and s["capped_fraction"] == 0 for s in weighted)
    assert all(s["mismatch_ratio"] == pytest.approx(1, abs=1e-5) for s in weighted)
    for a, b in zip(plain, weighted, strict=True):
        assert a["accuracy"] == b["accuracy"]
        assert (a["grad_norm"] or 0) == pytest.approx(b["grad_norm"] or 0, rel=1e-3)


def test_the_value_model_is_the_prior_and_runs_leave_logs_for_it(tmp_path):
    train(run_config("smoke", "v05", prior="v0"), tmp_path)
    first, *later = read_metrics(tmp_path, "step")
    assert first["prior_mean"] is None  # there is no prior before the first outcome
    assert all(0 < s["prior_mean"] < 1 for s in later)
    before, *after = read_metrics(tmp_path, "evaluation")
    assert before["prior_brier"] is None
    assert all(0 <= e["prior_brier"] < 0.3 and e["prior_cross_entropy"] > 0 for e in after)
    logs = sorted((tmp_path / "outcomes").iterdir())
    assert len(logs) == 1 + len(after)
    rows = read_logs(logs)
    assert {row.model for row in rows} == {"v05@4..16+v0-seed0"}
    assert sum(row.rate for row in rows if row.step == 0) / 16 == pytest.approx(before["accuracy"])


def test_the_history_prior_is_scored_on_held_out_prompts(tmp_path):
    train(run_config("smoke", "v05"), tmp_path / "v05")
    train(run_config("smoke", "grpo"), tmp_path / "grpo")
    evaluations = read_metrics(tmp_path / "v05", "evaluation")
    assert evaluations[0]["prior_brier"] == pytest.approx(np.mean([(0.5 - row.rate) ** 2 for row in first_rows(tmp_path / "v05")]))
    assert all("prior_auc" not in e for e in read_metrics(tmp_path / "grpo", "evaluation"))


def first_rows(directory):
    return read_logs([directory / "outcomes" / "00000000.jsonl"])


def replica(trainer, factor=1.0):
    """The embedded engine with a copy of the policy, like an engine in another process. `factor` falsifies the weights that it is
    sent.
    """
    folder = policy_folder(trainer.config.policy, trainer.config.task, trainer.task, lambda line: None)
    engine = engine_of_folder("transformers", trainer.config, folder, {"max_new_tokens": 4, "capacity": 512})
    update = engine.update_weights
    engine.update_weights = lambda state: update((name, tensor * factor) for name, tensor in state)
    return engine


def test_an_engine_with_its_own_weights_trains_the_same_policy(tmp_path):
    config = run_config("smoke", "v05")
    train(config, tmp_path / "shared")
    trainer = Trainer(config, tmp_path / "apart", lambda line: None)
    trainer.engine, trainer.own_weights = replica(trainer), True
    list(trainer.run())
    shared, apart = (read_metrics(tmp_path / name, "step") for name in ("shared", "apart"))
    assert all(s["sync_difference"] < 1e-4 for s in apart)
    assert all(s["sync_difference"] is None for s in shared)
    assert [s["accuracy"] for s in shared] == [s["accuracy"] for s in apart]
    assert shared[0]["grad_norm"] == pytest.approx(apart[0]["grad_norm"], rel=1e-3)


def test_an_engine_of_another_policy_is_refused(tmp_path):
    trainer = Trainer(run_config("smoke", "v05"), tmp_path, lambda line: None)
    trainer.engine, trainer.own_weights = replica(trainer, factor=1.05), True
    with pytest.raises(RuntimeError, match=r"engine.tolerance=0.001: after a sync, log-probabilities of engine and trainer differ"):
        next(trainer.run())


def test_an_error_closes_engine_and_verifier(tmp_path):
    trainer = Trainer(run_config("smoke", "v05"), tmp_path, lambda line: None)
    closed = []
    trainer.engine.close = lambda: closed.append("engine")
    trainer.verifier.close = lambda: closed.append("verifier")
    trainer.learner.update = lambda *arguments: 1 / 0
    with pytest.raises(ZeroDivisionError):
        list(trainer.run())
    assert sorted(closed) == ["engine", "verifier"]
    assert not (tmp_path / "result.json").exists()


def test_specs_and_presets():
    assert label_of(run_config("tiny", "v05")) == "v05@4..16"
    assert label_of(run_config("tiny", "ebpo")) == "ebpo@4"  # its own prior is not part of the label
    assert label_of(run_config("tiny", "ebpo", prior="history")) == "ebpo@4+history"
    assert run_config("tiny", "v05@4").budget == BudgetConfig(rule="uniform", initial=4, maximum=4)
    assert run_config("tiny", "v05@2..8").budget == BudgetConfig(rule="osla", initial=2, maximum=8)
    assert label_of(run_config("tiny", "grpo")) == "grpo@16"
    assert label_of(run_config("tiny", "calibrated")) == "calibrated@4..16"
    assert run_config("tiny", "calibrated@2..16").budget == BudgetConfig(rule="calibrated", initial=2, maximum=16, unbiased=True)
    assert label_of(run_config("tiny", "calibrated@2..16~3.5")) == "calibrated@2..16~3.5"
    assert run_config("tiny", "optimal@1..16").budget == BudgetConfig(rule="variance", initial=1, maximum=16, unbiased=True)
    assert run_config("tiny", "v05@4..16+weighting=rollout").loss == LossConfig(clip_high=0.28, group_weighting="rollout")
    assert run_config("tiny", "grpo@16+clip=10").optimizer == OptimizerConfig(max_grad_norm=10)
    for spec in ("v05@4..16+weighting=rollout", "grpo@16+clip=10", "v05@4..16+noise+cost=0.01+weighting=rollout+clip=2"):
        assert label_of(run_config("tiny", spec)) == spec
    assert [OverlongConfig().tokens(limit) for limit in (6, 512)] == [1, 32]
    with pytest.raises(ValueError, match="max_refills=3: the prior of method='v05' would only see groups of mixed rewards"):
        run_config("tiny", "v05", max_refills=3)
    assert run_config("tiny", "v05@2..16~4").budget == BudgetConfig(rule="total", initial=2, maximum=16, mean=4.0)
    with pytest.raises(ValueError, match="overlong: its penalty takes rewards out of"):
        run_config("tiny", "v05", overlong=OverlongConfig())
    for spec, message in {
        "ppo": "method='ppo' is unknown; choose one of v05, grpo",
        "v05@": "method='v05@' is malformed",
        "grpo@4..16": "budget.rule='osla' tests a prior, which method='grpo' does not have; fix its group size",
        "dr_grpo@4..16~6": "budget.rule='total' tests a prior, which method='dr_grpo' does not",
        "calibrated@4..16~3": "budget.mean=3.0 is not between budget.initial=4 and budget.maximum=16",
        "v05@8..4": "budget.maximum=4 is below budget.initial=8",
        "v05@1000": "rollouts_per_step=512 is less than one prompt's budget.initial=1000",
    }.items():
        with pytest.raises(ValueError, match=message):
            run_config("tiny", spec)
    with pytest.raises(ValueError, match=r"rule='variance' needs the energies that only method='optimal' learns, not 'calibrated'"):
        run_config("tiny", "calibrated", budget=BudgetConfig(rule="variance", initial=1))
    with pytest.raises(ValueError, match=r"budget.unbiased works for methods .* not for method='v05' with rule='uniform'"):
        run_config("tiny", "v05", budget=BudgetConfig(unbiased=True))
    with pytest.raises(ValueError, match=r"budget.unbiased with scale='group'"):
        run_config("tiny", "calibrated", scale="group")
    with pytest.raises(ValueError, match=r"budget.rule='calibrated' needs the fit of method='calibrated', not 'v05'"):
        run_config("tiny", "v05", budget=BudgetConfig(rule="calibrated"))
    assert run_config("tiny", "v05@4..16", ["budget.chunk=look"]).budget.chunk == "look"
    with pytest.raises(ValueError, match=r"budget.chunk='look' with budget.rule='total', which has no cost to look ahead by"):
        run_config("tiny", "v05@4..16~6", ["budget.chunk=look"])
    with pytest.raises(ValueError, match=r"budget.mean=5.0 with budget.rule='uniform'"):
        run_config("tiny", "v05", budget=BudgetConfig(mean=5.0))
    with pytest.raises(ValueError, match="preset='huge' is unknown; choose one of tiny, arithmetic, symbols, hard, demo, smoke"):
        run_config("huge", "v05")


def test_the_oracle_knows_the_success_rate(tmp_path):
    trainer = Trainer(run_config("smoke", "v05+oracle"), tmp_path, lambda line: None)
    prompts = trainer.heldout[:8]
    rewards, _ = trainer.evaluator.true_rewards(prompts, 1024, seed=1)
    rates = rewards.mean(-1)
    assert np.abs(trainer.sampler.predict(prompts) - rates).max() < 4 * 0.5 / np.sqrt(1024)
    assert rates.max() > 0.02


def test_the_useless_prior_is_useless_and_always_the_same(tmp_path):
    config = run_config("smoke", "v05@4+noise", seed=3)
    trainer, again = (Trainer(config, tmp_path / name, lambda line: None) for name in "ab")
    predicted = trainer.sampler.predict(trainer.heldout)
    assert np.array_equal(predicted, again.sampler.predict(again.heldout))
    assert ((predicted > 0) & (predicted < 1)).all()
    assert 0.2 < predicted.std() < 0.4
    assert not np.array_equal(predicted, NoisePrior(4).predict([prompt.text for prompt in trainer.heldout]))
