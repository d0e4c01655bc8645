"""The policy loss on both backends against the specification in float64, and as torch's operators and autograd see it."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from helpers.loss_batches import Batch, assert_specified
from v05.ops import LOSSES, Importance, loss_weights, policy_loss

BACKENDS = ("torch", "triton")


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("layout", ["padded", "packed"])
@pytest.mark.parametrize("loss", LOSSES)
def test_every_loss_of_the_table(loss, layout, backend):
    assert_specified(Batch(), layout, backend, loss)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("layout", ["padded", "packed"])
@pytest.mark.parametrize("level", ["token", "sequence"])
@pytest.mark.parametrize("beyond", ["truncate", "mask"])
@pytest.mark.parametrize("loss", ["ppo", "gspo", "cispo"])
def test_importance_weights(loss, beyond, level, layout, backend):
    assert_specified(Batch(), layout, backend, loss, Importance(cap=1.3, floor=0.6, level=level, beyond=beyond))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("layout", ["padded", "packed"])
@pytest.mark.parametrize("estimator", ["k1", "k2", "k3"])
def test_divergence_from_a_reference(estimator, layout, backend):
    assert_specified(Batch(), layout, backend, kl_estimator=estimator)
    assert_specified(Batch(), layout, backend, "gspo", Importance(cap=1.1), estimator)


@settings(max_examples=25, deadline=None)
@given(
    lengths=st.lists(st.integers(0, 70), min_size=1, max_size=9).filter(any),
    seed=st.integers(0, 1000),
    loss=st.sampled_from(sorted(LOSSES)),
    layout=st.sampled_from(["padded", "packed"]),
    backend=st.sampled_from(BACKENDS),
)
def test_rows_of_any_length(lengths, seed, loss, layout, backend):
    batch = Batch(tuple(lengths), max(lengths), seed, spread=1.0)
    assert_specified(batch, layout, backend, loss, Importance(), "k3", clip_low=0.3, clip_high=0.5)


@pytest.mark.parametrize("backend", BACKENDS)
def test_blocks_of_long_rows_and_many_rollouts(backend):
    assert_specified(Batch((1500, 3, 513), 1504), "padded", backend, "gspo", Importance(level="sequence"))
    assert_specified(Batch((2,) * 300, 3), "packed", backend)  # more rows of partial sums than one step adds up


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_clip_stops_the_gradient_on_the_far_side_only(backend):
    new = torch.tensor([0.5, -0.5, 0.5, -0.5]).reshape(4, 1).requires_grad_()  # ratios 1.65, 0.61
    out = policy_loss(
        new, torch.zeros(4, 1), torch.tensor([1.0, 1.0, -1.0, -1.0]), mask=torch.ones(4, 1, dtype=torch.long), loss="dapo",
        backend=backend,
    )  # fmt: skip
    out.loss.backward()
    assert (new.grad.flatten() != 0).tolist() == [False, True, True, False]
    assert out.figures.clip_fraction.item() == 0.5


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("far", [50.0, -50.0, 1e30])
def test_a_ratio_that_would_overflow_is_bounded(far, backend):
    old, sign = torch.zeros(3, 2), torch.tensor([1.0, -1.0, 0.0])
    new = torch.full((3, 2), far).requires_grad_()
    out = policy_loss(new, old, sign, mask=torch.ones(3, 2, dtype=torch.bool), backend=backend)
    out.loss.backward()
    assert out.loss.isfinite()
    assert (new.grad == 0).all()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("what", ["new", "old", "advantages"])
def test_what_is_not_finite_spreads_to_the_loss(what, backend):
    batch = Batch()
    getattr(batch, what)[0] = math.nan
    out = policy_loss(batch.new, batch.old, batch.advantages, cu_seqlens=batch.cu_seqlens, backend=backend)
    assert out.loss.isnan()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("n", [0, 2])
def test_nothing_to_learn_from(n, backend):
    empty = torch.zeros(0, requires_grad=True)
    out = policy_loss(empty, empty, torch.zeros(n), cu_seqlens=torch.zeros(n + 1, dtype=torch.long), backend=backend)
    out.loss.backward()
    assert out.loss.item() == 0
    assert out.figures.ratio.isnan()


@pytest.mark.parametrize("backend", BACKENDS)
def test_micro_batches_add_up(backend):
    batch = Batch()
    whole = policy_loss(batch.new, batch.old, batch.advantages, cu_seqlens=batch.cu_seqlens, backend=backend).loss
    parts = []
    for first, end in ((0, 2), (2, 6)):
        a, b = batch.cu_seqlens[first], batch.cu_seqlens[end]
        cu_seqlens = batch.cu_seqlens[first : end + 1] - a
        part = policy_loss(
            batch.new[a:b], batch.old[a:b], batch.advantages[first:end], cu_seqlens=cu_seqlens, weights=batch.weights[first:end],
            backend=backend,
        )  # fmt: skip
        parts.append(part.loss)
    torch.testing.assert_close(sum(parts), whole)


@pytest.mark.parametrize("level", ["token", "sequence"])
def test_importance_weights_make_up_for_the_engines_own_policy(level):
    """The weighted expected gradient under the engine's samples is the policy's own. Without weights it differs."""
    logits = torch.tensor([0.3, -0.2, 0.9], requires_grad=True)
    advantages = torch.tensor([1.0, -0.5, 0.2])
    engine = torch.log_softmax(torch.tensor([0.1, 0.5, 0.4]), dim=0)
    policy = torch.log_softmax(logits, dim=0)

    def expected_gradient(sampled_from, **importance):
        out = policy_loss(
            policy,
            policy.detach(),
            advantages,
            cu_seqlens=torch.arange(4),
            weights=sampled_from.exp(),
            **importance,
        )
        (gradient,) = torch.autograd.grad(out.loss, logits, retain_graph=True)
        return gradient

    right = expected_gradient(policy.detach())
    weighted = expected_gradient(engine, sampler_logprob=engine, importance=Importance(cap=10.0, level=level))
    torch.testing.assert_close(weighted, right)
    assert (expected_gradient(engine) - right).abs().max() > 0.01


def test_weights_of_tokens():
    lengths, offsets = torch.tensor([2, 6, 1, 3]), torch.tensor([0, 3, 3, 4])
    torch.testing.assert_close(loss_weights(lengths), torch.full((4,), 1 / 12))
    torch.testing.assert_close(loss_weights(lengths, aggregation="sequence"), 1 / (4 * lengths.float()))
    torch.testing.assert_close(loss_weights(lengths, aggregation="constant", length=8), torch.full((4,), 1 / 32))
    by_prompt = loss_weights(lengths, aggregation="sequence", group_offsets=offsets)
    torch.testing.assert_close(by_prompt * lengths, torch.tensor([1 / 6, 1 / 6, 1 / 6, 1 / 2]))
    by_prompt = loss_weights(lengths, group_offsets=offsets)
    torch.testing.assert_close(by_prompt[3] / by_prompt[0], torch.tensor(3.0))
    torch.testing.assert_close((by_prompt * lengths).sum(), torch.tensor(1.0))


def test_the_operator_as_torch_sees_it():
    batch = Batch()
    row = (0, False, 0.2, 0.2, math.inf, 1, False, 2.0, 0.0, 3, 0.1)
    tokens = (batch.new.requires_grad_(), batch.old, batch.sampler, batch.reference, None, batch.cu_seqlens)
    torch.library.opcheck(torch.ops.v05.policy_loss.default, (*tokens, batch.advantages, batch.weights, *row, "torch"))


def test_torch_compiles_the_call_whole():
    batch = Batch()

    def loss_of(new, old, advantages, mask):
        return policy_loss(new, old, advantages, mask=mask, loss="dapo")

    padded = batch.laid_out(batch.new, "padded").requires_grad_(), batch.laid_out(batch.old, "padded")
    wanted = loss_of(*padded, batch.advantages, batch.mask)
    got = torch.compile(loss_of, fullgraph=True, backend="aot_eager")(*padded, batch.advantages, batch.mask)
    torch.testing.assert_close(got.loss, wanted.loss)
    got.loss.backward()
    assert padded[0].grad[batch.mask].abs().sum() > 0


@pytest.mark.parametrize(
    ("changed", "named"),
    [
        ({"loss": "pppo"}, "loss='pppo' is unknown"),
        ({"mask": None}, "exactly one of mask"),
        ({"mask": torch.ones(6, 3, dtype=torch.bool)}, r"mask: .* of shape \(6, 3\)"),
        ({"old_logprob": torch.zeros(6, 3)}, r"old_logprob: torch.float32 of shape \(6, 3\)"),
        ({"advantages": torch.zeros(6, 40)}, r"advantages: .* give floats of shape \(6,\)"),
        ({"advantages": torch.zeros(5)}, r"\(5, T\) with a mask"),
        ({"clip_low": -1.0}, "clip_low=-1.0"),
        ({"clip_dual": 0.5}, "clip_dual=0.5"),
        ({"aggregation": "constant"}, "length=None with aggregation='constant'"),
        ({"aggregation": "token", "weights": torch.ones(6)}, "weights: aggregation"),
        ({"importance": Importance()}, "give sampler_logprob"),
        ({"kl_coefficient": 0.1}, "give reference_logprob"),
        ({"backend": "cuda"}, "backend='cuda' is unknown"),
    ],
)
def test_errors_name_what_is_wrong(changed, named):
    good = {
        "logprob": torch.zeros(6, 40),
        "old_logprob": torch.zeros(6, 40),
        "advantages": torch.zeros(6),
        "mask": torch.ones(6, 40, dtype=torch.bool),
    }
    with pytest.raises(ValueError, match=named):
        policy_loss(**(good | changed))


@pytest.mark.parametrize("cu_seqlens", [[1, 2, 4], [0, 5, 4], [0, 2, 3]])
def test_packed_rollouts_that_do_not_hold_the_tokens(cu_seqlens):
    with pytest.raises(ValueError, match="do not rise from 0 to the 4 tokens"):
        policy_loss(torch.zeros(4), torch.zeros(4), torch.zeros(2), cu_seqlens=torch.tensor(cu_seqlens))


def test_bounds_of_importance_weights_are_in_order():
    with pytest.raises(ValueError, match="floor=3"):
        Importance(cap=2.0, floor=3.0)
