"""Groups split over processes give the result of one process."""

import numpy as np
import pytest
import torch
import torch.multiprocessing as mp

from helpers.rank_worker import IDS, LENGTHS, PRIOR, REWARDS, SPLITS, arguments, work
from v05.ops import fused_advantage


@pytest.fixture(scope="module", params=SPLITS, ids="{} ranks".format)
def ranks(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("ranks")
    mp.spawn(work, (str(folder), request.param), nprocs=request.param)
    return [torch.load(folder / f"{rank}.pt") for rank in range(request.param)]


@pytest.mark.parametrize("method", ["v05", "calibrated", "grpo"])
def test_split_groups_are_judged_whole(ranks, method):
    whole = fused_advantage(**arguments(np.arange(len(IDS)), method))
    order = list(dict.fromkeys(IDS))
    for rank, results in enumerate(ranks):
        rows = np.flatnonzero(rank == SPLITS[len(ranks)])
        advantages, count, baseline, prior, mse = results[method]
        torch.testing.assert_close(advantages, whole.advantages[rows], rtol=0, atol=0)
        groups = [order.index(i) for i in dict.fromkeys(IDS[rows])]
        torch.testing.assert_close(count, whole.stats.count[groups])
        torch.testing.assert_close(baseline, whole.stats.baseline[groups], rtol=0, atol=0)
        torch.testing.assert_close(prior, whole.stats.prior[groups], equal_nan=True)
        torch.testing.assert_close(mse, None if mse is None else whole.stats.mse[groups], rtol=0, atol=0)


def test_numeric_ids_and_packed_output(ranks):
    numeric = torch.tensor([list(PRIOR).index(i) for i in IDS])
    whole = fused_advantage(REWARDS.float(), torch.tensor(list(PRIOR.values())), group_ids=numeric, num_groups=len(PRIOR))
    for rank, results in enumerate(ranks):
        rows = np.flatnonzero(rank == SPLITS[len(ranks)])
        advantages, mean = results["numeric, packed"]
        torch.testing.assert_close(advantages, whole.advantages[rows].repeat_interleave(LENGTHS[rows]), rtol=0, atol=0)
        torch.testing.assert_close(mean, whole.stats.mean, rtol=0, atol=0)


def test_a_prior_known_to_one_rank_is_known_to_all(ranks):
    for results in ranks:
        assert results["priors of their own"].tolist() == [0.2, 0.9]
        assert "prior: rank 1 gave 0.1 for a group that an earlier rank gave 0.0" in results["two priors"]


def test_errors_reach_every_rank(ranks):
    for results in ranks:
        assert "group_ids: needed with process_group" in results["no ids"]
        assert "cu_seqlens: falls after position 1" in results["bad lengths"]
        assert f"rewards: not finite in rows {len(ranks) - 1} (nan)" in results["bad value"]
        last = f"(on rank {len(ranks) - 1} of the process group)"
        assert results["one rank's shape"] == f"group_ids: 1 ids for 2 rollouts; give one id a rollout {last}"
        assert results["one rank without ids"].startswith("group_ids: needed with process_group")
        assert results["one rank's surprise"].endswith(last)
        assert "cu_seqlens: falls after position 0" in results["one rank's lengths"]
        assert last in results["one rank's lengths"]
