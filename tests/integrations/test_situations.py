"""The op in the situations that trainers computed wrongly. Other tests in this folder put their hosts into the same situations."""

import numpy as np
import pytest
import torch

from helpers.host_situations import SITUATIONS, TOLERANCE, situations
from v05.ops import fused_advantage
from v05.rollout import Completion
from v05.rollout.scheduler import RolloutBatch
from v05.tasks import Prompt
from v05.train.config import OverlongConfig
from v05.train.dapo import has_signal, shaped_rewards


def options(case):
    return dict(
        prior=case.prior,
        group_ids=case.ids,
        valid=np.array(case.valid),
        trajectory_ids=case.trajectories,
        method=case.method,
        leave_one_out=case.leave_one_out,
        reward_range=case.reward_range,
        nonfinite="exclude",
    )


@pytest.mark.parametrize("case", situations())
def test_the_op_per_rollout(case):
    assert fused_advantage(case.rewards, **options(case)).advantages.tolist() == pytest.approx(case.expected, abs=TOLERANCE)


@pytest.mark.parametrize("case", situations())
def test_the_op_padded_and_packed(case):
    padded = fused_advantage(case.rewards, response_mask=case.mask, **options(case)).advantages
    torch.testing.assert_close(padded, case.expected_tokens, rtol=0, atol=TOLERANCE)
    packed = fused_advantage(case.rewards, cu_seqlens=[0, *case.mask.sum(1).cumsum(0).tolist()], **options(case)).advantages
    assert torch.equal(packed, padded[case.mask.bool()])


def test_nothing_explodes():
    for case in SITUATIONS:
        assert fused_advantage(case.rewards, **options(case)).advantages.abs().max() <= 2.0 + TOLERANCE, case.name


def test_dapos_filter_reads_the_verifiers_score():
    """Shaping gives different rewards to rollouts that differ only in length. A group that the verifier scores alike has no signal
    all the same.
    """
    lengths = [2, 8, 2, 8]
    batch = RolloutBatch(
        prompts=[Prompt("easy", "1", None), Prompt("fair", "1", None)],
        prompt_tokens=[(0,), (0,)],
        priors=np.full(2, np.nan),
        offsets=np.array([0, 2, 4]),
        rewards=np.array([1.0, 1.0, 1.0, 0.0]),
        completions=[Completion(np.zeros(n, dtype=np.int64), np.zeros(n, dtype=np.float32), n < 8) for n in lengths],
        invalid=0,
        failures=[],
        in_flight=0.0,
        generate_seconds=0.0,
        verify_seconds=0.0,
    )
    shaped = shaped_rewards(batch.rewards, batch.completions, OverlongConfig(buffer=4), limit=8)
    assert shaped.tolist() == [1.0, 0.0, 1.0, -1.0]
    assert has_signal(batch).tolist() == [False, True]
