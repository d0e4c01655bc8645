"""What a run refuses before it samples, where completions end, and how a diverging policy is stopped."""

import json
import math

import numpy as np
import pytest
import torch
from transformers import Qwen3_5ForCausalLM, Qwen3_5TextConfig, RwkvConfig, RwkvForCausalLM

from helpers.rollout_fakes import FakeServer
from helpers.tiny_policy import tiny_model, tiny_tokenizer
from v05.rollout import NotFiniteError
from v05.tasks import JsonlConfig, split_of
from v05.train import trainer as trainer_module
from v05.train.checkpoint import find_checkpoints, read_checkpoint
from v05.train.config import EngineConfig, LossConfig, OptimizerConfig, PolicyConfig, VerifierConfig
from v05.train.engine import make_engine, sync_weights
from v05.train.metrics import read_metrics
from v05.train.policy import load_policy
from v05.train.presets import run_config
from v05.train.trainer import Trainer


@pytest.fixture
def folder(tmp_path):
    path = tmp_path / "policy"
    tiny_model().save_pretrained(path)
    tiny_tokenizer().save_pretrained(path)
    return path


@pytest.fixture
def trainer_of(tmp_path, folder):
    """Makes trainers of the policy in `folder`, on a JSON-lines file of sums or of other prompts."""

    def make(prompts=tuple(f"{i}+1=" for i in range(40)), method="grpo@4", **overrides):
        rows = [{"prompt": prompt, "answer": "1"} for prompt in prompts]
        (tmp_path / "sums.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        inline = VerifierConfig(workers=0)  # a test can change its task
        overrides = {"policy": PolicyConfig(path=folder, max_new_tokens=4), "verifier": inline} | overrides
        config = run_config("smoke", method, task=JsonlConfig(path=tmp_path / "sums.jsonl"), **overrides)
        return Trainer(config, tmp_path / "run", lambda line: None)

    return make


def edit(path, **values):
    settings = json.loads(path.read_text())
    path.write_text(json.dumps({k: v for k, v in (settings | values).items() if v is not None}))


def test_an_architecture_whose_state_is_not_kept(folder, trainer_of):
    torch.manual_seed(0)
    sizes = dict(vocab_size=15, hidden_size=32, attention_hidden_size=32, num_hidden_layers=2, eos_token_id=1, bos_token_id=0)
    RwkvForCausalLM(RwkvConfig(**sizes)).save_pretrained(folder)
    with pytest.raises(ValueError, match="model_type='rwkv': the embedded engine cannot keep this architecture's state"):
        trainer_of()


def test_a_hybrid_policy_is_trained_on_what_it_sampled(folder, trainer_of):
    torch.manual_seed(0)
    layers = dict(layer_types=["linear_attention", "full_attention"], linear_num_key_heads=2, linear_num_value_heads=4)
    sizes = dict(vocab_size=15, hidden_size=32, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2, head_dim=8)
    ends = dict(max_position_embeddings=64, pad_token_id=0, eos_token_id=1, bos_token_id=None)
    heads = dict(num_key_value_heads=2, linear_key_head_dim=8, linear_value_head_dim=8)
    Qwen3_5ForCausalLM(Qwen3_5TextConfig(**layers, **sizes, **heads, **ends)).save_pretrained(folder)
    learning = {"optimizer": OptimizerConfig(learning_rate=1e-2), "loss": LossConfig(importance_cap=2.0)}
    trainer = trainer_of(policy=PolicyConfig(path=folder, max_new_tokens=12), total_rollouts=640, **learning)
    trainer.task.verify = lambda prompt, completion: float(completion.startswith("1"))
    list(trainer.run())
    steps = read_metrics(trainer.directory, "step")
    assert all(0 < step["mismatch"] < 1e-5 for step in steps)
    assert steps[-1]["accuracy"] > steps[0]["accuracy"] + 0.2


def test_prompts_that_leave_no_room(folder, trainer_of, monkeypatch):
    long = next(text for text in ("1+" * 31 + f"{i}=" for i in range(10)) if split_of(text) == "train")
    with pytest.raises(ValueError, match=r"max_new_tokens=4 after a prompt of 64 tokens .* 64 positions; shorten .*'1\+1\+"):
        trainer_of([*(f"{i}+1=" for i in range(40)), long])
    with pytest.raises(ValueError, match=r"max_new_tokens=62 after a prompt of [345] tokens does not fit the model's 64 positions"):
        trainer_of(policy=PolicyConfig(path=folder, max_new_tokens=62))
    monkeypatch.setattr(trainer_module, "CHECKED_PROMPTS", 0)  # a long prompt is then refused only when it is drawn
    trainer = trainer_of([*(f"{i}+1=" for i in range(40)), long], total_rollouts=10_000)
    with pytest.raises(ValueError, match="max_new_tokens=4 after a prompt of 64 tokens does not fit the model's 64 positions"):
        list(trainer.run())


def test_tokens_that_a_tokenizer_lacks(folder, trainer_of):
    edit(folder / "tokenizer_config.json", eos_token=None, pad_token=None)
    _, tokenizer = load_policy(folder)
    assert tokenizer.pad_token_id == 1  # any token will do, because it is masked
    trainer_of()
    edit(folder / "generation_config.json", eos_token_id=None)
    edit(folder / "config.json", eos_token_id=None)
    with pytest.raises(ValueError, match=r"the tokenizer of .*policy has no end-of-sequence token, .* set eos_token in"):
        load_policy(folder)


def test_completions_end_at_every_id_of_the_generation_config(folder, trainer_of):
    edit(folder / "generation_config.json", eos_token_id=[1, 5, 6])
    trainer = trainer_of(method="v05+oracle", policy=PolicyConfig(path=folder, max_new_tokens=30))
    trainer.task.verify = lambda prompt, completion: float(completion == prompt.answer)
    _, completions = trainer.evaluator.true_rewards(trainer.heldout, 40, seed=1)
    assert {int(c.tokens[-1]) for c in completions if c.finished} == {1, 5, 6}
    assert not any(set(c.tokens[:-1]) & {1, 5, 6} for c in completions)
    prompt = trainer.heldout[0]
    rates, _ = trainer.evaluator.true_rewards([prompt], 4000, seed=2)
    (chance,) = trainer.sampler.predict([prompt])  # the end may be any of the three ids
    assert abs(rates.mean() - chance) < 5 * math.sqrt(chance * (1 - chance) / 4000)
    with FakeServer() as server:
        config = trainer.config.model_copy(update={"engine": EngineConfig(kind="vllm_server", url=server.url)})
        engine = make_engine(config, folder, trainer.directory, trainer.learner.model, trainer.tokenizer)
        engine.submit([0], [trainer.probe_requests()[0]])
        engine.poll()
        assert server.calls[-1][1]["stop_token_ids"] == [1, 5, 6]


def test_a_policy_that_diverges_is_explained_and_the_checkpoint_stays(trainer_of):
    trainer = trainer_of(checkpoint_seconds=0.0, total_rollouts=1000, optimizer=OptimizerConfig(learning_rate=3.0))
    update = trainer.learner.update

    def diverging(*arguments):
        figures = update(*arguments)
        if trainer.state.steps == 2:
            with torch.no_grad():
                trainer.learner.model.lm_head.weight.fill_(float("nan"))
        return figures

    trainer.learner.update = diverging
    message = r"step 3: the policy is not finite: .*; start the run over with a lower optimizer.learning_rate \(3\) or optimizer"
    with pytest.raises(RuntimeError, match=message):
        list(trainer.run())
    newest = read_checkpoint(find_checkpoints(trainer.directory)[-1])
    assert newest.state["run"]["steps"] == 2
    assert all(tensor.isfinite().all() for tensor in newest.tensors["policy"].values())
    assert not (trainer.directory / "result.json").exists()


@pytest.mark.parametrize("learning_rate", [1e15, 1e30])
def test_a_learning_rate_that_is_far_too_high(trainer_of, learning_rate):
    trainer = trainer_of(total_rollouts=1000, optimizer=OptimizerConfig(learning_rate=learning_rate))
    trainer.task.verify = lambda prompt, completion: float(len(completion) % 2)
    with pytest.raises(NotFiniteError, match=r"step \d+: the policy is not finite"):
        list(trainer.run())


def test_a_gradient_that_is_not_finite_moves_nothing(trainer_of):
    trainer = trainer_of()
    trainer.task.verify = lambda prompt, completion: float(len(completion) % 2)
    before = {name: value.clone() for name, value in trainer.learner.model.state_dict().items()}
    scorer = trainer.learner.scorer
    trainer.learner.scorer = lambda *arguments: scorer(*arguments) * float("inf")
    with pytest.raises(NotFiniteError, match="step 0: the policy is not finite: the gradient's norm is nan"):
        list(trainer.run())
    assert all(torch.equal(value, before[name]) for name, value in trainer.learner.model.state_dict().items())


def test_no_engine_is_given_weights_that_are_not_finite(trainer_of):
    trainer = trainer_of()
    with torch.no_grad():
        trainer.learner.model.lm_head.weight.fill_(np.nan)
    trainer.engine.update_weights = lambda state: pytest.fail("weights were handed over")
    with pytest.raises(NotFiniteError, match="the policy is not finite: the token after a prompt has no log-probability"):
        sync_weights(trainer.engine, trainer.learner.model, trainer.probe_requests(), 0, 1e-3)
