"""The timed cases. A case is a call on a batch, the tensors that it has to read and write, and the expected result."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from peers import inline

from on_gpu.batch import Batch
from v05 import reference
from v05.ops import AdvantageOutput, fused_advantage
from v05.ops.advantage.stats import STATISTICS

PEER_TOLERANCE = 1e-4  # peers compute in float32 throughout


@dataclass(frozen=True)
class Case:
    """One row of the table.

    Attributes:
        call: the call that is timed.
        reads, writes: names of the batch's tensors. Their bytes and the table of statistics are the least that the call moves.
        method, leave_one_out: the options of `v05.reference` for the expected advantages. With method None, `wanted` gives the
            values.
        ids: the name of the batch's ids that the call uses.
        layout: the layout of the result.
        tolerance: relative and absolute tolerance.
        graphed: whether a CUDA graph can capture the call. A call that waits for the device cannot be captured.
    """

    name: str
    call: Callable[[Batch], Any]
    reads: tuple[str, ...]
    writes: tuple[str, ...]
    method: str | None = "v05"
    leave_one_out: bool = False
    ids: Literal["ids", "any_ids"] = "ids"
    layout: Literal["padded", "packed", "rows"] = "padded"
    tolerance: float = 1e-6
    stats: bool = False
    wanted: Callable[[Batch], torch.Tensor] | None = None
    graphed: bool = True

    def floor_bytes(self, batch: Batch) -> int:
        given = sum(getattr(batch, name).nbytes for name in (*self.reads, *self.writes))
        return given + (8 * len(STATISTICS) * batch.shape.groups if self.stats else 0)


COPY, FILL = "copy", "fill"
PADDED, FRESH, IDS = "v05 padded out=", "v05 padded fresh", "v05 padded ids"
HALF, PACKED, ROLLOUTS = "v05 padded bf16", "v05 packed", "v05 rollouts"
TOKEN_REWARDS, LONG_MASK = "v05 token rewards", "v05 token rewards int64 mask (verl's)"
CALIBRATED = "calibrated padded loo"
ON_VERLS = "v05 on verl's tensors"
VERL_VECTORIZED, VERL_LOOP = "verl vectorized", "verl loop"


def cases(compiler: Callable[[Any], Any]) -> list[Case]:
    """The cases for every shape. `compiler` is torch.compile, for the compiled plain versions."""
    padded = {"reads": ("rewards", "offsets", "prior", "mask"), "writes": ("out",)}
    given = {"stats": True, **padded}
    grpo = {"reads": ("rewards", "ids", "mask"), "writes": ("out",), "tolerance": PEER_TOLERANCE, "method": "grpo"}
    v05 = {**padded, "tolerance": PEER_TOLERANCE}
    plain_grpo, plain_v05 = grpo_in_torch, v05_in_torch
    compiled_grpo, compiled_v05 = compiler(plain_grpo), compiler(plain_v05)
    token_rewards = ("token_rewards", "offsets", "prior")
    return [
        Case(PADDED, lambda b: fused(b, response_mask=b.mask, out=b.out), **given),
        Case("v05 padded out=, no statistics", lambda b: fused(b, response_mask=b.mask, out=b.out, stats=False), **padded),
        Case(FRESH, lambda b: fused(b, response_mask=b.mask), **given),
        Case(
            IDS,
            lambda b: fused_advantage(
                b.rewards,
                b.prior,
                group_ids=b.any_ids,
                num_groups=b.shape.groups,
                response_mask=b.mask,
                out=b.out,
                backend=b.backend,
            ),
            ("rewards", "any_ids", "prior", "mask"),
            ("out",),
            ids="any_ids",
            stats=True,
        ),
        Case(
            HALF,
            lambda b: fused(b, response_mask=b.mask, out=b.half_out, dtype=torch.bfloat16),
            padded["reads"],
            ("half_out",),
            tolerance=2**-7,
            stats=True,
        ),
        Case(
            TOKEN_REWARDS,
            lambda b: fused(b, b.token_rewards, response_mask=b.mask, out=b.out),
            (*token_rewards, "mask"),
            ("out",),
            stats=True,
        ),
        Case(
            LONG_MASK,
            lambda b: fused(b, b.token_rewards, response_mask=b.long_mask, out=b.out),
            (*token_rewards, "long_mask"),
            ("out",),
            stats=True,
        ),
        Case(
            PACKED,
            lambda b: fused(b, cu_seqlens=b.cu_seqlens, out=b.packed_out),
            ("rewards", "offsets", "prior", "cu_seqlens"),
            ("packed_out",),
            layout="packed",
            stats=True,
        ),
        Case(ROLLOUTS, fused, ("rewards", "offsets", "prior"), ("rows_out",), layout="rows", stats=True),
        Case(
            "grpo padded out=",
            lambda b: fused_advantage(
                b.rewards, group_offsets=b.offsets, response_mask=b.mask, out=b.out, method="grpo", backend=b.backend
            ),
            ("rewards", "offsets", "mask"),
            ("out",),
            method="grpo",
            stats=True,
        ),
        Case(
            CALIBRATED,
            lambda b: fused(b, response_mask=b.mask, out=b.out, method="calibrated", leave_one_out=True),
            **given,
            method="calibrated",
            leave_one_out=True,
        ),
        Case("optimal padded", lambda b: fused(b, response_mask=b.mask, out=b.out, method="optimal"), **given, method="optimal"),
        Case("plain torch grpo", lambda b: plain_grpo(b.rewards, b.ids, b.shape.groups, b.mask), **grpo),
        Case("compiled torch grpo", lambda b: compiled_grpo(b.rewards, b.ids, b.shape.groups, b.mask), **grpo),
        Case("plain torch v05", lambda b: plain_v05(b.rewards, b.prior, b.shape.group_size, b.mask), **v05),
        Case("compiled torch v05", lambda b: compiled_v05(b.rewards, b.prior, b.shape.group_size, b.mask), **v05),
        Case(COPY, lambda b: b.out.copy_(b.source), ("source",), ("out",), method=None, wanted=lambda b: b.source),
        Case(FILL, lambda b: b.out.fill_(0.5), (), ("out",), method=None, wanted=lambda b: torch.full_like(b.out, 0.5)),
    ]


def verl_cases(verl: dict[str, Callable[..., Any]]) -> list[Case]:
    """Whole calls on tensors as in verl's trainer: token rewards, an int64 mask, and ids as strings.

    `verl` holds verl's own functions under the names of `peers.verl_wheel`; missing ones are left out. The case of "grpo" does the
    same work as verl's functions; the case of `v05` also takes a prior.
    """
    held = {"reads": ("token_rewards", "long_mask"), "writes": ("out",), "graphed": False}

    def ours(batch: Batch, prior: torch.Tensor | None, method: str) -> AdvantageOutput:
        return fused_advantage(
            batch.token_rewards,
            prior,
            group_ids=batch.uid,
            response_mask=batch.long_mask,
            out=batch.out,
            method=method,
            backend=batch.backend,
        )

    def theirs(function: Callable[..., Any]) -> Callable[[Batch], Any]:
        return lambda b: function(token_level_rewards=b.token_rewards, response_mask=b.long_mask, index=b.uid)

    return [
        Case(ON_VERLS, lambda b: ours(b, b.prior, "v05"), **held),
        Case("grpo on verl's tensors", lambda b: ours(b, None, "grpo"), **held, method="grpo"),
        *(Case(name, theirs(function), **held, method="grpo", tolerance=PEER_TOLERANCE) for name, function in verl.items()),
    ]


def fused(batch: Batch, rewards: torch.Tensor | None = None, **options: Any) -> AdvantageOutput:
    """`fused_advantage` with the batch's prior and group offsets, as in most cases."""
    given = batch.rewards if rewards is None else rewards
    return fused_advantage(given, batch.prior, group_offsets=batch.offsets, backend=batch.backend, **options)


def grpo_in_torch(rewards: torch.Tensor, ids: torch.Tensor, groups: int, mask: torch.Tensor) -> torch.Tensor:
    """GRPO in plain torch: index_add for the moments, a gather, and a multiplication by the mask."""
    return inline.plain_torch(rewards, ids, groups)[:, None] * mask


def v05_in_torch(rewards: torch.Tensor, prior: torch.Tensor, group_size: int, mask: torch.Tensor) -> torch.Tensor:
    """V_0.5 in plain torch, for contiguous groups of one size and rewards in (0, 1)."""
    centred, belief = rewards.view(-1, group_size) * 2 - 1, prior.float() * 2 - 1
    difference = centred.mean(1) - belief
    statistic = group_size * difference * difference
    weight = (1 - 1 / statistic.clamp_min(1)).clamp_min(0)
    baseline = belief + weight * difference
    return ((centred - baseline[:, None]) / 2).reshape(-1, 1) * mask


class Truth:
    """The reference's results for one batch. Each method is computed once."""

    def __init__(self, batch: Batch) -> None:
        self.batch = batch
        self._kept: dict[tuple[Any, ...], tuple[torch.Tensor, list[reference.GroupStatistics]]] = {}

    def of(self, case: Case) -> tuple[torch.Tensor, list[reference.GroupStatistics]]:
        """(N,) float64 advantages on the batch's device, and the statistics of its groups."""
        key = (case.method, case.leave_one_out, case.ids)
        if key not in self._kept:
            b = self.batch
            rows, stats = reference.advantages(
                b.rewards.double().cpu().numpy(),
                getattr(b, case.ids).cpu().numpy(),
                b.prior.cpu().numpy(),
                method=str(case.method),
                leave_one_out=case.leave_one_out,
            )
            self._kept[key] = torch.from_numpy(rows).to(b.rewards.device), stats
        return self._kept[key]


def refuse_wrong(case: Case, truth: Truth) -> None:
    """Call the case once with buffers full of NaN. Raise AssertionError unless result and statistics are as expected."""
    batch = truth.batch
    for name in case.writes:
        getattr(batch, name).fill_(float("nan"))
    result = case.call(batch)
    got = result[0] if isinstance(result, tuple) else result
    if case.wanted is not None:
        wanted = case.wanted(batch)
    else:
        rows, stats = truth.of(case)
        if case.layout == "padded":
            wanted = torch.where(batch.mask, rows.float()[:, None], 0.0)
        else:
            wanted = rows.repeat_interleave(batch.cu_seqlens.diff()) if case.layout == "packed" else rows
        if case.stats:
            close(result.stats.count, torch.tensor([group.count for group in stats]), 0.0)
            close(result.stats.baseline, torch.tensor([group.baseline for group in stats], dtype=torch.float64), 1e-9)
    close(got, wanted, case.tolerance)


def close(got: torch.Tensor, wanted: torch.Tensor, tolerance: float) -> None:
    seen = got.float() if got.dtype in (torch.bfloat16, torch.float32) else got
    torch.testing.assert_close(seen, wanted.to(seen), rtol=tolerance, atol=tolerance)
