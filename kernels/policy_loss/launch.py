"""The launch of the policy loss, and its variants for the ahead-of-time compiler."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch

from v05.kernels.launcher import Launcher
from v05.kernels.policy_loss.kernel import SUMS, policy_loss_kernel
from v05.kernels.variant import ROLLOUTS, TOKENS, Variant

if TYPE_CHECKING:
    from v05.ops.policy_loss.compute import Options, Results, Rollouts, Tokens

# 4 warps, whose threads each load 16 bytes of float32. An AMD warp has 64 threads.
BLOCK_T = {"cuda": 512, "hip": 1024}

_policy_loss = Launcher(policy_loss_kernel)


def launch(tokens: Tokens, rollouts: Rollouts, options: Options) -> Results:
    """Return (loss, gradient, figures). `v05.ops.policy_loss` calls this. It takes one launch and the zeroing of one number.

    Raises:
        ValueError: CPU tensors without the interpreter.
    """
    device, n = tokens.logprob.device, len(rollouts.advantages)
    t = 0 if tokens.mask is None else tokens.mask.shape[1]
    gradient = torch.empty_like(tokens.logprob)
    loss = torch.empty((), dtype=torch.float32, device=device)
    figures = torch.empty(SUMS.value - 1, dtype=torch.float64, device=device)
    if n == 0:
        return loss.zero_(), gradient, figures.fill_(torch.nan)
    sums = torch.empty((n, SUMS.value), dtype=torch.float32, device=device)
    arrived = torch.zeros(1, dtype=torch.int32, device=device)
    edges = tokens.mask is None or t % 16 != 0
    low, high = 1 - options.clip_low, 1 + options.clip_high
    _policy_loss(
        (n, 1, 1),
        device,
        (
            tokens.logprob,
            tokens.old,
            tokens.sampler if options.importance else None,
            tokens.reference if options.kl else None,
            tokens.mask,
            tokens.cu_seqlens,
            *rollouts,
            gradient,
            sums,
            arrived,
            loss,
            figures,
        ),
        (n, t, low, high, options.clip_dual, options.cap, options.floor, options.kl_coefficient),
        (
            options.surrogate,
            options.of_sequence,
            options.importance,
            options.masks_beyond,
            options.kl,
            edges,
            BLOCK_T["hip" if torch.version.hip else "cuda"],
        ),
    )
    return loss, gradient, figures


def variants() -> Iterator[Variant]:
    """Yield both layouts of the plain loss, then each option once for padded tokens. The last two have the block size of AMD."""
    tokens = {"p_logprob": "fp32", "p_old": "fp32", "p_gradient": "fp32"}
    rollouts = {"p_advantages": "fp32", "p_weights": "fp32", "p_sums": "fp32", "p_arrived": "i32"}
    out = {"p_loss": "fp32", "p_figures": "fp64"}
    plain = {
        "SURROGATE": 0,
        "OF_SEQUENCE": False,
        "IMPORTANCE_LEVEL": 0,
        "MASKS_BEYOND": False,
        "KL_ESTIMATOR": 0,
        "EDGES": False,
        "BLOCK_T": BLOCK_T["cuda"],
    }
    padded = Variant("padded", policy_loss_kernel, tokens | rollouts | out | {"p_mask": "u8"}, plain)
    yield padded
    yield Variant("packed", policy_loss_kernel, tokens | rollouts | out | {"p_cu_seqlens": "i64"}, plain | {"EDGES": True})
    yield padded.but("padded-int64-mask", p_mask="i64")
    yield padded.but("padded-weighted", {"SURROGATE": 1})
    yield padded.but("padded-sequence", {"OF_SEQUENCE": True})
    yield padded.but("padded-importance", {"IMPORTANCE_LEVEL": 1}, p_sampler="fp32")
    yield padded.but("padded-importance-sequence", {"IMPORTANCE_LEVEL": 2, "MASKS_BEYOND": True}, p_sampler="fp32")
    yield padded.but("padded-kl", {"KL_ESTIMATOR": 3}, p_reference="fp32")
    everything = {"OF_SEQUENCE": True, "IMPORTANCE_LEVEL": 2, "KL_ESTIMATOR": 3}
    yield padded.but("padded-everything", everything, p_sampler="fp32", p_reference="fp32")
    wide = {"BLOCK_T": BLOCK_T["hip"]}
    yield padded.but("padded-wide", wide)
    yield padded.but("padded-wide-sequence", wide | {"OF_SEQUENCE": True})


def traffic(variant: Variant) -> tuple[int, int]:
    """(bytes, floor_bytes) of one launch on ROLLOUTS x TOKENS. Sequence-level ratios and weights read their terms twice."""
    size = variant.element_bytes()
    of_token = sum(size.get(name, 0) for name in ("p_logprob", "p_old", "p_sampler", "p_reference", "p_mask", "p_gradient"))
    of_rollout = size["p_advantages"] + size["p_weights"] + size.get("p_cu_seqlens", 0)
    floor = ROLLOUTS * (TOKENS * of_token + of_rollout) + size["p_loss"] + (SUMS.value - 1) * size["p_figures"]
    summed = sum(size.get(name, 0) for name in ("p_logprob", "p_old", "p_sampler", "p_mask"))
    twice = variant.constants["OF_SEQUENCE"] or variant.constants["IMPORTANCE_LEVEL"] == 2
    again = ROLLOUTS * TOKENS * summed if twice else 0
    return floor + again + ROLLOUTS * (2 * SUMS.value * size["p_sums"] + size.get("p_cu_seqlens", 0)), floor
