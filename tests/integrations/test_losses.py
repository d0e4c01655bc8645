"""The losses, importance weights and KL estimators against verl's and TRL's own code, as the tables of docs/losses.md pair them."""

import ast
import shlex

import pytest
import torch

from helpers.documents import ROOT, table
from v05.ops import LOSSES, Importance, policy_loss

pytestmark = [pytest.mark.host, pytest.mark.filterwarnings("default")]
PAGE = ROOT / "docs" / "losses.md"
ROLLOUTS, LENGTH = 8, 12
TOKEN = 5  # any token would do


def evaluated(cell):
    """The arguments of `policy_loss` in a cell."""
    return eval(f"dict({cell.strip('`')})", {"Importance": Importance})


def words(cell):
    """The options of a host in a cell; None where the host has no such loss."""
    return {name: number_or_text(value) for name, value in (word.split("=") for word in shlex.split(cell.strip("`")))} or None


def number_or_text(value):
    try:
        return ast.literal_eval(value)
    except (SyntaxError, ValueError):
        return value


LOSS_ROWS, OPTION_ROWS = (
    [{"ours": evaluated(ours), "verl": words(verl), "trl": words(trl)} for ours, verl, trl in table(PAGE, name)]
    for name in ("hosts", "options")
)


def cases(host):
    """(arguments, options of the host) of each loss, alone and with each further option."""
    pairs = [(loss, option) for loss in LOSS_ROWS for option in ({"ours": {}, host: {}}, *OPTION_ROWS) if option[host] is not None]
    return [
        pytest.param(
            loss["ours"] | option["ours"],
            loss[host] | option[host],
            id="-".join(map(str, [loss["ours"]["loss"], *option["ours"].values()])),
        )
        for loss, option in pairs
    ]


def test_every_loss_is_compared():
    assert [row["ours"]["loss"] for row in LOSS_ROWS] == list(LOSSES)
    assert all(row["verl"] and row["trl"] for row in LOSS_ROWS)


class Batch:
    """Rollouts: one has a hole in its mask, one has no tokens, and some have ratios near 1, where the bounds of gspo lie."""

    def __init__(self):
        generator = torch.Generator().manual_seed(0)

        def noise(size):
            return size * torch.randn(ROLLOUTS, LENGTH, generator=generator)

        self.mask = (torch.arange(LENGTH) < torch.tensor([[12], [3], [7], [12], [0], [9], [12], [1]])).long()
        self.mask[0, 4:6] = 0
        self.old = -0.05 - 3 * torch.rand(ROLLOUTS, LENGTH, generator=generator)
        self.new = self.old + noise(0.6)
        self.new[5:] = self.old[5:] + noise(1e-3)[5:]
        self.new[2] += 1.5  # beyond the bounds of cispo and of the dual clip
        self.sampler, self.reference = self.old + noise(0.6), self.new + noise(0.5)
        self.advantages = torch.tensor([1.0, -0.5, -1.5, -0.7, 0.3, 0.0, 0.9, -0.4])

    def ours(self, *, importance=None, kl_coefficient=0.0, **options):
        """(loss, gradient, figures) of `policy_loss` on the batch."""
        if importance is not None:
            options |= {"sampler_logprob": self.sampler, "importance": importance}
        if kl_coefficient:
            options |= {"reference_logprob": self.reference, "kl_coefficient": kl_coefficient}
        new = self.new.clone().requires_grad_()
        out = policy_loss(new, self.old, self.advantages, mask=self.mask, **options)
        out.loss.backward()
        return out.loss.detach(), new.grad, out.figures


def assert_equal(ours, theirs):
    torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-6)


def test_the_batch_meets_every_bound():
    batch = Batch()
    for row in LOSS_ROWS:
        assert 0 < batch.ours(**row["ours"])[2].clip_fraction < 1
    assert 0 < batch.ours(loss="dual_clip")[2].dual_clip_fraction < 1
    for row in OPTION_ROWS:
        if "importance" in row["ours"]:
            assert 0 < batch.ours(**row["ours"])[2].beyond_fraction < 1


@pytest.fixture
def verl():
    """A function that gives (loss, gradient, verl's logged metrics) of a batch under options of verl, computed as by verl's
    workers.
    """
    pytest.importorskip("verl", exc_type=ImportError)
    from verl.trainer.ppo.core_algos import agg_loss, get_policy_loss_fn, kl_penalty
    from verl.trainer.ppo.rollout_corr_helper import compute_rollout_correction_weights
    from verl.workers.config import ActorConfig, PolicyLossConfig

    def compute(batch, loss_mode, **options):
        correction = {name: options.pop(name) for name in list(options) if name.startswith("rollout_is")}
        config = ActorConfig(
            strategy="fsdp",
            rollout_n=1,
            ppo_micro_batch_size_per_gpu=1,
            policy_loss=PolicyLossConfig(loss_mode=loss_mode),
            use_kl_loss="kl_loss_coef" in options,
            **options,
        )
        config.global_batch_info.update(
            dp_size=1,
            batch_num_tokens=int(batch.mask.sum()),
            global_batch_size=ROLLOUTS,
            loss_scale_factor=config.loss_scale_factor,
        )
        new, mask = batch.new.clone().requires_grad_(), batch.mask.bool()
        weights = compute_rollout_correction_weights(batch.old - batch.sampler, mask, **correction)[0] if correction else None
        loss, logged = get_policy_loss_fn(config.policy_loss.loss_mode)(
            old_log_prob=batch.old,
            log_prob=new,
            advantages=batch.advantages[:, None] * mask,
            response_mask=mask,
            loss_agg_mode=config.loss_agg_mode,
            config=config,
            rollout_is_weights=weights,
        )
        if config.use_kl_loss:
            estimates = kl_penalty(new, batch.reference, config.kl_loss_type)
            loss = loss + config.kl_loss_coef * agg_loss(estimates, mask, config.loss_agg_mode, **config.global_batch_info)
        loss.backward()
        return loss.detach(), new.grad, logged

    return compute


@pytest.mark.parametrize(("arguments", "options"), cases("verl"))
def test_equals_verl(verl, arguments, options):
    batch = Batch()
    loss, gradient, figures = batch.ours(**arguments)
    their_loss, their_gradient, logged = verl(batch, **options)
    assert_equal(loss, their_loss)
    assert_equal(gradient, their_gradient)
    for ours, theirs in (("clip_fraction", "pg_clipfrac"), ("dual_clip_fraction", "pg_clipfrac_lower"), ("approx_kl", "ppo_kl")):
        assert getattr(figures, ours).item() == pytest.approx(logged[f"actor/{theirs}"], rel=1e-6, abs=1e-6), ours


@pytest.fixture
def trl(tmp_path):
    """A function that gives (loss, gradient) of a batch under options of TRL. TRL's trainer gets a model and an engine that return
    the batch's numbers.
    """
    pytest.importorskip("trl", exc_type=ImportError)
    from datasets import Dataset
    from trl import GRPOConfig, GRPOTrainer

    from helpers.tiny_policy import tiny_model, tiny_tokenizer

    tiny_model().save_pretrained(tmp_path / "model")

    def compute(batch, **options):
        args = GRPOConfig(
            output_dir=str(tmp_path / "out"),
            per_device_train_batch_size=ROLLOUTS,
            num_generations=ROLLOUTS,
            report_to=[],
            use_cpu=True,
            **options,
        )
        trainer = GRPOTrainer(
            model=str(tmp_path / "model"),
            reward_funcs=lambda completions, **_: [0.0] * len(completions),
            args=args,
            train_dataset=Dataset.from_list([{"prompt": "1+1="}]),
            processing_class=tiny_tokenizer(),
        )
        trainer.use_vllm = "vllm_importance_sampling_mode" in options
        trainer.current_gradient_accumulation_steps = 1
        new = batch.new.clone().requires_grad_()
        logprobs = {trainer.model: batch.old, trainer.ref_model: batch.reference}
        tokens = [[TOKEN] * LENGTH] * ROLLOUTS
        sampled = ([[TOKEN]] * ROLLOUTS, tokens, batch.mask.tolist(), [""] * ROLLOUTS, batch.sampler.tolist(), {}, None, [])
        trainer._generate = lambda _: sampled
        trainer._get_per_token_logps_and_entropies = lambda model, *_, **__: (logprobs[model], torch.zeros_like(new), None)
        trainer.model.train()
        inputs = trainer._generate_and_score_completions([{"prompt": "1+1="}] * ROLLOUTS)
        inputs |= {"advantages": batch.advantages, "old_per_token_logps": batch.old}
        logprobs[trainer.model] = new
        loss = trainer._compute_loss(trainer.model, inputs)
        loss.backward()
        return loss.detach(), new.grad

    return compute


@pytest.mark.parametrize(("arguments", "options"), cases("trl"))
def test_equals_trl(trl, arguments, options):
    batch = Batch()
    loss, gradient, _ = batch.ours(**arguments)
    their_loss, their_gradient = trl(batch, **options)
    assert_equal(loss, their_loss)
    importance = arguments.get("importance")
    if arguments["loss"] == "gspo" and importance is not None and importance.level == "token":
        # TRL's ratio of a rollout spreads the gradient of each token's weight over all tokens.
        gradient = (gradient.sum(1) / batch.mask.sum(1).clamp(min=1))[:, None] * batch.mask
    assert_equal(gradient, their_gradient)


def test_bnpo_is_ppo_in_one_micro_batch(trl):
    batch = Batch()
    assert_equal(batch.ours(loss="ppo")[:2], trl(batch, loss_type="bnpo", epsilon=0.2))
