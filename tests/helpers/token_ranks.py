"""One process of test_token_statistics_ranks.py, as a module that a fresh process can import."""

import os

import torch
import torch.distributed as dist

from helpers.token_statistics import draw, ids
from v05.ops import token_statistics
from v05.ops.token_statistics import IGNORED

TOKENS, WIDTH, VOCABULARY = 7, 5, 12


def layer():
    return draw(0, TOKENS, WIDTH, scale=1.0), draw(1, VOCABULARY, WIDTH), draw(2, VOCABULARY)


def logits():
    """(TOKENS, VOCABULARY) logits. Some rows have finite logits on one rank only, and one row has its maximum on two ranks."""
    x = draw(3, TOKENS, VOCABULARY)
    x[0, : VOCABULARY // 2] = -torch.inf
    x[1, VOCABULARY // 2 :] = -torch.inf
    x[2, 0] = x[2, -1] = 9.0
    x[3, 1] = torch.nan
    x[4] = -torch.inf
    return x


def targets():
    y = ids(4, VOCABULARY, TOKENS)
    y[0], y[5] = VOCABULARY - 1, IGNORED
    return y


def results(tensors, part, group):
    """Statistics and gradients for a rank's part of the vocabulary, from the logits and then from the hidden states."""
    x = logits()[:, part].clone().requires_grad_()
    made = [statistics_and(x, {}, (x,), group)]
    hidden, weight, bias = tensors
    hidden, *own = hidden.clone().requires_grad_(), weight[part].clone().requires_grad_(), bias[part].clone().requires_grad_()
    made.append(statistics_and(hidden, {"weight": own[0], "bias": own[1], "chunk": 3}, (hidden, *own), group))
    return made


def statistics_and(x, options, leaves, group):
    out = token_statistics(x, targets(), temperature=0.8, process_group=group, **options)
    (out.logprob.nan_to_num(neginf=0.0) * torch.arange(TOKENS) + out.entropy.nan_to_num()).sum().backward()
    return *(tensor.detach() for tensor in out), *(leaf.grad for leaf in leaves)


def work(rank, folder, ranks):
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=ranks)
    size = VOCABULARY // ranks
    made = results(layer(), slice(rank * size, (rank + 1) * size), dist.group.WORLD)
    errors = []
    for x, y in ((torch.zeros(1, 3 + rank), torch.zeros(1, dtype=torch.int64)), (torch.zeros(1, 3), torch.tensor([6]))):
        try:
            token_statistics(x, y, process_group=dist.group.WORLD)
        except ValueError as error:
            errors.append(str(error))
    torch.save((made, errors), f"{folder}/{rank}.pt")
    dist.barrier()  # a rank that leaves early closes the others' connections
    os._exit(0)  # gloo's threads sometimes abort an interpreter that is shutting down
