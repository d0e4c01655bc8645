"""A vocabulary in shards over several processes gives the statistics and gradients of one process."""

import pytest
import torch
import torch.multiprocessing as mp

from helpers.token_ranks import VOCABULARY, layer, results, work

RANKS = 2


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ranks")
    mp.spawn(work, (str(folder), RANKS), nprocs=RANKS)
    return [torch.load(folder / f"{rank}.pt") for rank in range(RANKS)]


def test_shards_make_the_whole(ranks):
    (statistics, of_logits), (of_hidden_states, of_layer) = ((made[:4], made[4:]) for made in results(layer(), slice(None), None))
    for rank, (made, _) in enumerate(ranks):
        own = slice(rank * VOCABULARY // RANKS, (rank + 1) * VOCABULARY // RANKS)
        torch.testing.assert_close(made[0][:4], statistics, rtol=1e-6, atol=1e-6, equal_nan=True)
        torch.testing.assert_close(made[0][4], of_logits[0][:, own], rtol=1e-5, atol=1e-6, equal_nan=True)
        torch.testing.assert_close(made[1][:4], of_hidden_states, rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(made[1][4], of_layer[0], rtol=1e-5, atol=1e-5)
        for gradient, whole in zip(made[1][5:], of_layer[1:], strict=True):
            torch.testing.assert_close(gradient, whole[own], rtol=1e-5, atol=1e-5)


def test_errors(ranks):
    for _, errors in ranks:
        assert errors[0] == "process_group: shards of [3, 4] tokens of the vocabulary; pad it so that every rank has as many"
        assert errors[1].startswith("targets: 6 at position 0 is no id of a vocabulary of 6")
