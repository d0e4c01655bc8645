"""The loss against the papers' formulas written out."""

import itertools

import numpy as np
import pytest
import torch

from v05.train.loss import importance_weights, mismatch, policy_loss, rollout_weights, token_weights

OFFSETS = torch.tensor([0, 4, 4, 6, 12])  # uneven, one group empty
LENGTHS = torch.tensor([3, 1, 5, 2, 4, 4, 1, 2, 3, 4, 5, 5])
MASK = torch.arange(6) < LENGTHS[:, None]


@pytest.fixture
def batch():
    generator = torch.Generator().manual_seed(0)
    old = -torch.rand(12, 6, generator=generator)
    new = old + 0.5 * torch.randn(12, 6, generator=generator)
    advantages = torch.randn(12, 1, generator=generator) * MASK
    return new, old, advantages


def surrogate(new, old, advantages, low, high):
    ratio = (new - old).exp()
    return torch.minimum(ratio * advantages, ratio.clamp(1 - low, 1 + high) * advantages)


def test_every_prompt_counts_once_or_every_rollout_does():
    weights = rollout_weights(OFFSETS, "prompt")
    sums = [weights[a:b].sum().item() for a, b in itertools.pairwise(OFFSETS)]
    assert sums == pytest.approx([1 / 3, 0, 1 / 3, 1 / 3])
    assert rollout_weights(OFFSETS, "rollout").tolist() == pytest.approx([1 / 12] * 12)


def test_sequence_aggregation_is_grpos(batch):
    new, old, advantages = batch
    weights = token_weights(rollout_weights(OFFSETS, "rollout"), MASK, "sequence")
    loss = policy_loss(new, old, advantages, weights, clip_low=0.2, clip_high=0.2)
    per_rollout = (surrogate(new, old, advantages, 0.2, 0.2) * MASK).sum(-1) / LENGTHS
    assert loss.total.item() == pytest.approx(-per_rollout.mean().item(), rel=1e-5)


def test_token_aggregation_is_dapos(batch):
    new, old, advantages = batch
    weights = token_weights(rollout_weights(OFFSETS, "rollout"), MASK, "token")
    loss = policy_loss(new, old, advantages, weights, clip_low=0.2, clip_high=0.28)
    expected = -(surrogate(new, old, advantages, 0.2, 0.28) * MASK).sum() / LENGTHS.sum()
    assert loss.total.item() == pytest.approx(expected.item(), rel=1e-5)


@pytest.mark.parametrize("aggregation", ["token", "sequence"])
@pytest.mark.parametrize("weighting", ["prompt", "rollout"])
def test_weights_sum_to_one(aggregation, weighting):
    weights = token_weights(rollout_weights(OFFSETS, weighting), MASK, aggregation)
    assert weights.sum().item() == pytest.approx(1.0)
    assert (weights[~MASK] == 0).all()


def test_an_empty_response_is_harmless():
    mask = MASK.clone()
    mask[2] = False
    for aggregation in ("token", "sequence"):
        assert token_weights(rollout_weights(OFFSETS, "prompt"), mask, aggregation).isfinite().all()


def test_clipping_stops_the_gradient_on_the_far_side_only():
    old = torch.zeros(4, 1)
    new = torch.tensor([0.5, -0.5, 0.5, -0.5]).reshape(4, 1).requires_grad_()  # ratios 1.65, 0.61
    advantages = torch.tensor([1.0, 1.0, -1.0, -1.0]).reshape(4, 1)
    loss = policy_loss(new, old, advantages, torch.full((4, 1), 0.25), clip_low=0.2, clip_high=0.28)
    loss.total.backward()
    assert (new.grad.flatten() != 0).tolist() == [False, True, True, False]
    assert loss.clipped.item() == 2


def test_kl_is_the_unbiased_estimator(batch):
    new, old, advantages = batch
    reference = old - 0.1
    weights = token_weights(rollout_weights(OFFSETS, "prompt"), MASK, "token")
    plain = policy_loss(new, old, advantages, weights, clip_low=0.2, clip_high=0.2)
    assert plain.kl is None
    loss = policy_loss(new, old, advantages, weights, clip_low=0.2, clip_high=0.2, reference_logprobs=reference, kl_coefficient=0.5)
    d = reference - new
    assert loss.kl.item() == pytest.approx((weights * (d.exp() - d - 1)).sum().item(), rel=1e-5)
    assert loss.total.item() == pytest.approx(plain.total.item() + 0.5 * loss.kl.item(), rel=1e-5)


def test_padding_may_hold_anything(batch):
    new, old, advantages = batch
    weights = token_weights(rollout_weights(OFFSETS, "prompt"), MASK, "token")
    clean = policy_loss(new, old, advantages, weights, clip_low=0.2, clip_high=0.2).total
    dirty = torch.where(MASK, new, 1e30)
    assert policy_loss(dirty, old, advantages, weights, clip_low=0.2, clip_high=0.2).total.item() == clean.item()


def test_truncated_importance_weights_multiply_the_surrogate(batch):
    new, old, advantages = batch
    engine = old + 0.3 * torch.randn(old.shape, generator=torch.Generator().manual_seed(1))
    weights = token_weights(rollout_weights(OFFSETS, "rollout"), MASK, "token")
    importance = importance_weights(old.requires_grad_(), engine, cap=1.1)
    assert not importance.requires_grad
    assert importance.max().item() == pytest.approx(1.1)
    expected = torch.minimum((old - engine).exp(), torch.tensor(1.1)) * surrogate(new, old, advantages, 0.2, 0.2)
    loss = policy_loss(new, old, advantages, weights, clip_low=0.2, clip_high=0.2, importance=importance)
    assert loss.total.item() == pytest.approx(-(expected * MASK).sum().item() / LENGTHS.sum().item(), rel=1e-5)
    same = importance_weights(old, old.detach(), cap=1.1)
    plain = policy_loss(new, old, advantages, weights, clip_low=0.2, clip_high=0.2)
    assert (
        policy_loss(new, old, advantages, weights, clip_low=0.2, clip_high=0.2, importance=same).total.item() == plain.total.item()
    )


def test_importance_weights_make_up_for_the_engines_own_policy():
    # The expected gradient under the engine's samples, weighted, is the policy's own; unweighted it is not.
    logits = torch.tensor([0.3, -0.2, 0.9], requires_grad=True)
    advantages = torch.tensor([1.0, -0.5, 0.2])
    engine = torch.log_softmax(torch.tensor([0.1, 0.5, 0.4]), dim=0)
    policy = torch.log_softmax(logits, dim=0)

    def expected_gradient(sampled_from, importance):
        loss = policy_loss(
            policy[:, None], policy.detach()[:, None], advantages[:, None], sampled_from.exp()[:, None],
            clip_low=0.2, clip_high=0.2, importance=importance,
        )  # fmt: skip
        (gradient,) = torch.autograd.grad(loss.total, logits, retain_graph=True)
        return gradient

    right = expected_gradient(policy.detach(), None)
    weighted = expected_gradient(engine, importance_weights(policy[:, None], engine[:, None], cap=10.0))
    torch.testing.assert_close(weighted, right)
    assert (expected_gradient(engine, None) - right).abs().max() > 0.01


def test_mismatch_figures():
    trainer = [np.log(np.array([0.5, 0.3], dtype=np.float32)), np.log(np.array([0.9], dtype=np.float32))]
    engine = [np.log(np.array([0.25, 0.3], dtype=np.float32)), np.log(np.array([1.0], dtype=np.float32))]
    figures = mismatch(trainer, engine, cap=1.5)
    assert figures["mismatch"] == pytest.approx((np.log(2) - np.log(0.9)) / 3, rel=1e-5)
    assert figures["mismatch_ratio"] == pytest.approx((2 + 1 + 0.9) / 3, rel=1e-5)
    assert figures["capped_fraction"] == pytest.approx(1 / 3)
    assert mismatch(trainer, engine, cap=None)["capped_fraction"] == 0.0
    assert all(np.isnan(value) for value in mismatch(None, engine, cap=1.5).values())
