"""The launch of the advantage kernel, and its variants for the ahead-of-time compiler."""

from __future__ import annotations

import math
from collections.abc import Iterator
from functools import lru_cache
from typing import TYPE_CHECKING, NamedTuple

import torch

from v05.kernels.advantage.fusion import BATCH_DIVISOR, BATCH_REWARD, NEEDS_BATCH, NEEDS_GROUPS
from v05.kernels.advantage.kernel import (
    BATCH_SCALE,
    GROUP_SCALE,
    TAKE_MORE,
    UNSCALED,
    fused_advantage_kernel,
)
from v05.kernels.advantage.moments import group_moments_kernel
from v05.kernels.advantage.tokens import sum_token_rewards_kernel
from v05.kernels.launcher import Launcher
from v05.kernels.variant import GROUPS, ROLLOUTS, TOKENS, Variant
from v05.methods import BUDGET_RULES, METHODS, Baseline

if TYPE_CHECKING:
    from v05.ops.advantage.inputs import Rollouts
    from v05.ops.advantage.options import Options

STATISTIC_COLUMNS = TAKE_MORE.value + 1
BLOCK_T = 2048  # 4 warps of 32 threads; each thread loads 16 bytes of a uint8 mask
MAX_BLOCK_ROWS = 512
CALIBRATED_BLOCK_ROWS = 128  # with leave-one-out, whose registers hold the fusion of one row per thread
ENOUGH_PROGRAMS = 2048  # two or three waves on any GPU; more rollouts are looped over
MOST_ROLLOUTS = 2**31 - 1  # in a group

_advantage = Launcher(fused_advantage_kernel)
_token_sums = Launcher(sum_token_rewards_kernel)
_group_moments = Launcher(group_moments_kernel)


class KernelOptions(NamedTuple):
    """The options as the launch and the kernel read them. `numbers` and `constants` are in the kernel's order."""

    numbers: tuple[float, ...]  # low to delta1
    constants: tuple[int, ...]  # BASELINE to RAW_SINGLETON
    low: float
    high: float
    eps: float
    needs_batch: bool
    needs_groups: bool
    most_block_rows: int


def kernel_options(options: Options) -> KernelOptions:
    baseline = options.baseline
    low, high = (options.low, options.high) if baseline in BUDGET_RULES else (-math.inf, math.inf)  # others take any finite reward
    alpha, beta, kappa, eps, delta0, delta1 = options.calibration
    log_odds = math.log1p(-eps) - math.log(eps)
    trusted = (alpha, beta, kappa, log_odds, delta0, delta1)
    each_its_own = options.leave_one_out and baseline in (Baseline.CALIBRATED, Baseline.LEAST_VARIANCE)
    return KernelOptions(
        numbers=(low, high, options.eps, min(options.max_rollouts, MOST_ROLLOUTS), options.cost, *trusted),
        constants=(baseline, options.scale, options.leave_one_out, options.raw_singleton),
        low=low,
        high=high,
        eps=options.eps,
        needs_batch=options.scale == BATCH_SCALE.value or baseline in NEEDS_BATCH,
        needs_groups=baseline in NEEDS_GROUPS,
        most_block_rows=CALIBRATED_BLOCK_ROWS if each_its_own else MAX_BLOCK_ROWS,
    )


def launch(
    rollouts: Rollouts,
    valid: torch.Tensor | None,
    counted: torch.Tensor | None,
    offsets: torch.Tensor,
    order: torch.Tensor | None,
    prior: torch.Tensor | None,
    options: KernelOptions,
    out: torch.Tensor,
    table: torch.Tensor | None,
) -> None:
    """Write the advantages into `out` and the statistics into `table`, unless it is None. `v05.ops.fused_advantage` calls this.

    Shapes and dtypes are those of `fused_advantage_kernel`; rewards may also be (N, T). Non-finite rewards of valid rows are
    excluded and counted. For a baseline with a prior, rewards and priors outside [low, high] are clipped and counted.

    Args:
        valid: (N,) bool, used in place of `rollouts.valid`; None if all rows are valid.
        counted: (N,) bool, the rows that count in the statistics; None if all valid rows do.
        offsets, order: (G + 1,) and (N,) int64. Group g has the rows order[offsets[g]] .. order[offsets[g + 1] - 1], or without an
            order the rows offsets[g] .. offsets[g + 1] - 1.

    Raises:
        ValueError: CPU tensors without the interpreter.
    """
    rewards, mask, cu_seqlens, _, _, energy = rollouts
    device, N, G = rewards.device, rewards.shape[0], offsets.shape[0] - 1
    if G == 0:  # rows without a group have advantage 0
        out.zero_()
        return
    T = 0 if mask is None else mask.shape[1]
    if rewards.ndim == 2:
        assert mask is not None
        rewards, mask = _sum_token_rewards(rewards, mask, N, T, device)
    row_length = None if mask is None else T
    if cu_seqlens is not None:
        row_length = -(-out.shape[0] // max(N, 1))
    block_rows, splits, chunks = launch_shape(N, G, row_length, options.most_block_rows, BLOCK_T, ENOUGH_PROGRAMS)
    batch, of_groups = None, None
    if options.needs_batch:
        batch = _batch_moments(rewards, valid if counted is None else counted, energy, options.low, options.high, options.eps)
    if options.needs_groups:
        groups = torch.empty(3, G, dtype=torch.float64, device=device)
        read = (rewards, offsets, order, valid, counted, groups)
        _group_moments((G, 1, 1), device, read, (options.low, options.high), (block_rows,))
        of_groups = _moments_of_groups(*groups)
    _advantage(
        (G, splits, chunks),
        device,
        (rewards, offsets, order, prior, mask, cu_seqlens, valid, counted, energy, batch, of_groups, out, table),
        (G, T, *options.numbers),
        (*options.constants, block_rows, BLOCK_T),
    )


@lru_cache(maxsize=64)
def launch_shape(
    N: int, G: int, row_length: int | None, most_block_rows: int, block_t: int, enough_programs: int
) -> tuple[int, int, int]:
    """(BLOCK_ROWS, splits, chunks) for N rollouts in G groups with rows of `row_length` tokens, None for per-rollout output.

    They suit groups and rows of average size and are right for any size. Plain integer arithmetic is used because Triton's helpers
    are slow, and results are cached because shapes repeat at every step.
    """
    group_size = -(-N // G)
    block_rows = min(max(1 << (group_size - 1).bit_length(), 16), most_block_rows)
    if row_length is None:
        return block_rows, max(-(-group_size // block_rows), 1), 1
    chunks = min(max(-(-row_length // block_t), 1), enough_programs)
    return block_rows, max(min(group_size, enough_programs // (G * chunks)), 1), chunks


def _sum_token_rewards(
    token_rewards: torch.Tensor, mask: torch.Tensor, N: int, T: int, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor]:
    """The (N,) float64 rewards of rollouts, and the mask with one bit per token, (N, words_of(T)) uint32."""
    rewards = token_rewards.new_empty(N, dtype=torch.float64)
    bits = token_rewards.new_empty(N, -(-T // 32), dtype=torch.uint32)
    if N > 0:
        _token_sums((N, 1, 1), device, (token_rewards, mask, rewards, bits), (T,), (BLOCK_T,))
    return rewards, bits


def _batch_moments(
    rewards: torch.Tensor, counted: torch.Tensor | None, energy: torch.Tensor | None, low: float, high: float, eps: float
) -> torch.Tensor:
    """The (5,) float64 statistics of all finite rewards that count, BATCH_DIVISOR to BATCH_WEIGHTED of `fusion.py`.

    They are the standard deviation (ddof = 1) + eps, or 1 if all rewards are equal; the number of rewards; their mean, NaN if there
    are none; and the two sums of energies. Torch computes them, because no program of the launch reads all rewards.
    """
    values = rewards.to(torch.float64)
    if values.numel() == 0:
        nothing = values.new_zeros(5)  # torch.tensor of a list would be copied from the host
        nothing[BATCH_DIVISOR.value].fill_(1.0)
        nothing[BATCH_REWARD.value].fill_(math.nan)
        return nothing
    usable = values.isfinite() if counted is None else values.isfinite() & counted
    values = values.clamp(low, high)
    unequal = torch.where(usable, values, math.inf).amin() < torch.where(usable, values, -math.inf).amax()
    n = usable.sum()
    mean = torch.where(usable, values, 0.0).sum() / n.clamp(min=1)
    deviations = torch.where(usable, values - mean, 0.0)
    divisor = (deviations.square().sum() / (n - 1).clamp(min=1)).sqrt() + eps
    divisor = torch.where(unequal & (divisor != 0.0), divisor, 1.0)
    weights = torch.zeros_like(values) if energy is None else torch.where(usable & (energy > 0) & energy.isfinite(), energy, 0.0)
    mean_if_any = torch.where(n > 0, mean, math.nan)
    return torch.stack((divisor, n.to(torch.float64), mean_if_any, weights.sum(), (weights * deviations).sum()))


def _moments_of_groups(count: torch.Tensor, mean: torch.Tensor, variance: torch.Tensor) -> torch.Tensor:
    """The (5,) float64 statistics GROUPS_COUNT to GROUPS_NOISE_OF_OTHERS of `fusion.py`, from (G,) moments of groups."""

    def mean_over(groups: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
        return torch.where(groups, values, 0.0).sum() / groups.sum()  # NaN without any group

    some, several = count > 0, count > 1
    mean_of_means = mean_over(some, mean)
    squares = torch.where(some, mean - mean_of_means, 0.0).square().sum()
    var_of_means = squares / (some.sum() - 1).clamp(min=1)
    noise, noise_of_others = mean_over(several, variance / count), mean_over(several, variance / (count - 1))
    return torch.stack((some.sum().to(torch.float64), mean_of_means, var_of_means, noise, noise_of_others))


def variants() -> Iterator[Variant]:
    """Yield every layout with every baseline in float32, then every other choice once, mostly for padded shrinkage.

    Calibrated fusion under leave-one-out, whose baseline differs among the rollouts of a group, is compiled for small and for the
    largest blocks.
    """
    statistics = {"p_table": "fp64"}
    inputs = {"p_rewards": "fp32", "p_offsets": "i64", "p_order": "i64", "p_prior": "fp64"}
    layouts = {"padded": {"p_mask": "u8"}, "packed": {"p_cu_seqlens": "i64"}, "per-rollout": {}}
    weighed = {method.baseline for method in METHODS.values() if method.weight}
    plain = {
        "SCALE": UNSCALED.value,
        "LEAVE_ONE_OUT": False,
        "RAW_SINGLETON": False,
        "BLOCK_ROWS": 16,
        "BLOCK_T": BLOCK_T,
    }
    made = {}
    for layout, pointers in layouts.items():
        for baseline in Baseline:
            name = f"{layout}-{baseline.name.lower().replace('_', '-')}"
            batch = {"p_batch": "fp64"} if baseline in NEEDS_BATCH else {}
            batch |= {"p_groups": "fp64"} if baseline in NEEDS_GROUPS else {}
            energy = {"p_energy": "fp64"} if baseline in weighed else {}
            made[name] = Variant(
                name,
                fused_advantage_kernel,
                inputs | statistics | pointers | batch | energy | {"p_out": "fp32"},
                plain | {"BASELINE": int(baseline)},
            )
    yield from made.values()
    base = made["padded-shrinkage"]
    yield base.but("padded-shrinkage-valid-counted", p_valid="u8", p_counted="u8")
    yield base.but("padded-shrinkage-leave-one-out", {"LEAVE_ONE_OUT": True})
    yield base.but("padded-shrinkage-group-scale", {"SCALE": GROUP_SCALE.value})
    yield base.but("padded-shrinkage-batch-scale", {"SCALE": BATCH_SCALE.value}, p_batch="fp64")
    yield base.but("padded-shrinkage-large-groups", {"BLOCK_ROWS": MAX_BLOCK_ROWS})
    yield base.but("padded-shrinkage-int64-mask", p_mask="i64")
    yield base.but("padded-shrinkage-float32-mask", p_mask="fp32")
    yield base.but("padded-shrinkage-bits-mask", p_mask="u32", p_rewards="fp64")
    yield base.but("padded-shrinkage-bfloat16", p_out="bf16")
    yield base.but("padded-shrinkage-float64", p_rewards="fp64", p_out="fp64")
    yield made["padded-calibrated"].but("padded-calibrated-leave-one-out", {"LEAVE_ONE_OUT": True})
    blocks = {"LEAVE_ONE_OUT": True, "BLOCK_ROWS": CALIBRATED_BLOCK_ROWS}
    yield made["per-rollout-calibrated"].but("per-rollout-calibrated-leave-one-out", blocks)
    of_groups = {"p_rewards": "fp32", "p_offsets": "i64", "p_order": "i64", "p_moments": "fp64"}
    yield Variant("groups", group_moments_kernel, of_groups, {"BLOCK_ROWS": 16})
    yield Variant("large-groups", group_moments_kernel, of_groups, {"BLOCK_ROWS": MAX_BLOCK_ROWS})
    for mask, element in {"uint8": "u8", "int64": "i64", "float32": "fp32"}.items():
        yield Variant(
            f"{mask}-mask",
            sum_token_rewards_kernel,
            {"p_token_rewards": "fp32", "p_mask": element, "p_rewards": "fp64", "p_bits": "u32"},
            {"BLOCK_T": BLOCK_T},
        )


def traffic(variant: Variant) -> tuple[int, int]:
    """(bytes, floor_bytes) of one launch on ROLLOUTS x TOKENS in GROUPS equal groups, derived from the kernel's source."""
    size = variant.element_bytes()
    tokens = ROLLOUTS * TOKENS
    if variant.kernel is sum_token_rewards_kernel:
        once = tokens * (size["p_token_rewards"] + size["p_mask"]) + tokens // 8 + ROLLOUTS * size["p_rewards"]
        return once, once
    if variant.kernel is group_moments_kernel:
        once = ROLLOUTS * (size["p_rewards"] + size["p_order"]) + GROUPS * (2 * size["p_offsets"] + 3 * size["p_moments"])
        return once + ROLLOUTS * (size["p_rewards"] + size["p_order"]), once  # two passes over a group
    per_rollout = not {"p_mask", "p_cu_seqlens"} & variant.pointers.keys()
    row_length = None if per_rollout else TOKENS
    _, splits, chunks = launch_shape(ROLLOUTS, GROUPS, row_length, MAX_BLOCK_ROWS, BLOCK_T, ENOUGH_PROGRAMS)
    row = sum(size.get(name, 0) for name in ("p_rewards", "p_order", "p_valid", "p_energy"))  # bytes read for a rollout
    group = 2 * size["p_offsets"] + size.get("p_prior", 0)
    mask_bytes = tokens // 8 if variant.pointers.get("p_mask") == "u32" else tokens * size.get("p_mask", 0)
    outputs = (ROLLOUTS if per_rollout else tokens) * size["p_out"] + mask_bytes
    outputs += GROUPS * STATISTIC_COLUMNS * size["p_table"]
    lengths = ROLLOUTS * chunks * 2 * size.get("p_cu_seqlens", 0)
    statistics = 2 * ROLLOUTS // GROUPS * (row + size.get("p_counted", 0)) + group  # two passes over a group
    asked = GROUPS * splits * chunks * statistics + ROLLOUTS * chunks * row + lengths + outputs
    floor = ROLLOUTS * (row + size.get("p_counted", 0)) + GROUPS * group + lengths // (2 * chunks) + outputs
    return asked, floor
