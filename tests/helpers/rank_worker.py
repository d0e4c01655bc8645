"""One process of test_distributed.py, as a module that a fresh process can import."""

import math
import os

import numpy as np
import torch
import torch.distributed as dist

from v05.methods import Calibration
from v05.ops import fused_advantage

IDS = np.array(["a", "b", "a", "c", "b", "a", "d", "c", "a", "b", "d", "e"])
SPLITS = {  # the rank of each row, by the number of ranks; with three ranks every group but "e" is split
    2: np.array([0, 0, 0, 0, 0, 0, 1, 1, 1, 1, 1, 1]),
    3: np.array([0, 0, 0, 0, 1, 1, 1, 1, 1, 2, 2, 2]),
}
PRIOR = {"a": 0.2, "b": 0.9, "c": math.nan, "d": 0.5, "e": 0.4}
REWARDS = torch.tensor([1, 0, 0, 1, 1, 1, 0, 0, 1, 1, 1, 0], dtype=torch.float64)
LENGTHS = torch.tensor([2, 1, 0, 3, 3, 2, 1, 1, 2, 3, 1, 2])
VALID = torch.tensor([1, 1, 1, 1, 1, 0, 1, 1, 1, 1, 1, 1], dtype=torch.bool)


def arguments(rows, method):
    """The arguments of the call in a process that owns `rows`."""
    ids = IDS[rows].tolist()
    return dict(
        rewards=REWARDS[rows],
        prior=[PRIOR[i] for i in dict.fromkeys(ids)],
        group_ids=ids,
        valid=VALID[rows],
        response_mask=torch.arange(3) < LENGTHS[rows][:, None],
        method=method,
        scale="batch",
        leave_one_out=method != "grpo",
        calibration=Calibration(0.2, 0.9, 8.0, 0.3),
        dtype=torch.float64,
    )


def work(rank, folder, ranks):
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=ranks)
    last = rank == ranks - 1
    rows = np.flatnonzero(rank == SPLITS[ranks])
    results = {}
    for method in ("v05", "calibrated", "grpo"):
        out = fused_advantage(**arguments(rows, method), process_group=dist.group.WORLD)
        results[method] = (out.advantages, out.stats.count, out.stats.baseline, out.stats.prior, out.stats.mse)
    numeric = {key: i for i, key in enumerate(PRIOR)}
    out = fused_advantage(
        REWARDS[rows].float(),
        torch.tensor(list(PRIOR.values())),
        group_ids=torch.tensor([numeric[i] for i in IDS[rows]]),
        num_groups=len(PRIOR),
        cu_seqlens=[0, *LENGTHS[rows].cumsum(0).tolist()],
        process_group=dist.group.WORLD,
    )
    results["numeric, packed"] = (out.advantages, out.stats.mean)
    out = fused_advantage(
        [1.0, 0.0],
        [0.2, math.nan] if rank == 0 else [math.nan, 0.9],
        group_ids=[min(rank, 1)] * 2,
        num_groups=2,
        process_group=dist.group.WORLD,
    )
    results["priors of their own"] = out.stats.prior
    for name, call in {
        "two priors": dict(rewards=[1.0], prior=[0.1 * rank], group_ids=["x"], method="v05"),
        "no ids": dict(rewards=REWARDS[rows], group_offsets=[0, len(rows)], method="grpo"),
        "bad lengths": dict(rewards=REWARDS[:2], group_ids=["x", "x"], cu_seqlens=[0, 3, 2], method="grpo"),
        "bad value": dict(rewards=torch.full((1,), math.nan if last else 1.0), group_ids=["x"], method="grpo"),
        "one rank's shape": dict(rewards=[1.0, 0.0], group_ids=["x"] * (1 if last else 2), method="grpo"),
        "one rank without ids": dict(rewards=[1.0], group_ids=None if last else ["x"], method="grpo"),
        "one rank's surprise": dict(rewards=object() if last else [1.0], group_ids=["x"], method="grpo"),
        "one rank's lengths": dict(rewards=[1.0], group_ids=["x"], cu_seqlens=[0, -1 if last else 2], method="grpo"),
    }.items():
        try:
            fused_advantage(**call, process_group=dist.group.WORLD)
        except ValueError as error:
            results[name] = str(error)
    torch.save(results, f"{folder}/{rank}.pt")
    dist.barrier()  # a rank that leaves early closes the others' connections
    os._exit(0)  # gloo's threads sometimes abort an interpreter that is shutting down
