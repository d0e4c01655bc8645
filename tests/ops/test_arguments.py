"""Arguments that the op, the allocator and the methods accept, and the message for those that they refuse."""

import contextlib
import math
import threading
import uuid
from decimal import Decimal
from fractions import Fraction

import numpy as np
import pytest
import torch
import torch.distributed as dist

from helpers.advantage_columns import columns
from v05.budget import RolloutAllocator, predicted_counts
from v05.methods import Calibration
from v05.ops import factorize, fused_advantage
from v05.path_counting import path_counting_advantages

R4 = [1.0, 0.0, 0.0, 1.0]


def call(rewards=R4, prior=None, **options):
    grouped = {} if options.keys() & {"group_ids", "group_offsets"} else {"group_offsets": [0, 4]}
    return fused_advantage(rewards, prior, **{"method": "dr_grpo"} | grouped | options)


def paths(**options):
    return path_counting_advantages(R4, [0.5], [0, 4], **dict(method="v05", initial=4, maximum=4) | options)


HUGE = 10**5000  # Python refuses to print so many digits
REFUSED = {
    "leave_one_out a string": (lambda: call(leave_one_out="no"), "leave_one_out='no'; give True or False"),
    "leave_one_out a number": (lambda: call(leave_one_out=1), "leave_one_out=1; give True or False"),
    "leave_one_out None": (lambda: call(leave_one_out=None), "leave_one_out=None; give True or False"),
    "stats": (lambda: call(stats="yes"), "stats='yes'; give True or False"),
    "nonfinite": (lambda: call(nonfinite=True), "nonfinite=True is unknown; choose one of raise, exclude"),
    "singleton": (lambda: call(singleton=None), "singleton=None is unknown; choose one of zero, raw"),
    "scale": (lambda: call(scale=3), "scale=3 is unknown; choose one of none, group, batch"),
    "method": (lambda: call(method=["v05"]), r"method=\['v05'\] is unknown; choose one of v05, grpo"),
    "backend": (lambda: call(backend=1), "backend=1 is unknown; choose one of cpp, triton"),
    "backend a list": (lambda: call(backend=["cpp"]), r"backend=\['cpp'\] is unknown"),
    "eps a string": (lambda: call(eps="a"), "eps='a'; give 0 or more"),
    "eps a flag": (lambda: call(eps=True), "eps=True; give 0 or more"),
    "eps negative": (lambda: call(eps=-1e-9), "eps=-1e-09; give 0 or more"),
    "eps beyond floats": (lambda: call(eps=HUGE), "eps=a int of very many digits; give 0 or more"),
    "cost": (lambda: call(cost=[1]), r"cost=\[1\]; give 0 or more, or None for the budget rule's own"),
    "max_rollouts": (lambda: call(max_rollouts=2**70), "max_rollouts=1180591620717411303424; give an integer from 1 to 92233"),
    "max_rollouts a flag": (lambda: call(max_rollouts=True), "max_rollouts=True; give an integer"),
    "max_rollouts a float": (lambda: call(max_rollouts=8.0), "max_rollouts=8.0; give an integer"),
    "num_groups": (lambda: call(group_ids=[0] * 4, num_groups="2"), "num_groups='2'; give an integer from 0 to 2147483647"),
    "counts for offsets": (
        lambda: call(prior=[0.5, 0.5], group_offsets=[2, 2], method="v05"),
        r"group_offsets: starts at 2; the first offset is 0, and counts become offsets by numpy.r_\[0, numpy.cumsum\(counts\)\]",
    ),
    "offsets that end early": (
        lambda: call(prior=[0.5, 0.5], group_offsets=[0, 2], method="v05"),
        "group_offsets: ends at 2 for 4 rollouts; the last offset is N",
    ),
    "rewards of prompts x rollouts": (
        lambda: call([[1.0, 0.0], [0.0, 1.0]]),
        r"of the same shape; if these are the rewards of prompts x rollouts, give rewards.flatten\(\) with group_offsets",
    ),
    "reward_range None": (lambda: call(reward_range=None), r"reward_range=None; give \(lo, hi\)"),
    "reward_range a number": (lambda: call(reward_range=1.0), r"reward_range=1.0; give \(lo, hi\)"),
    "reward_range of strings": (lambda: call(reward_range=("0", "1")), "reward_range='0'; give a number"),
    "reward_range NaN": (lambda: call(reward_range=(math.nan, 1)), r"reward_range=\(nan, 1\) is not a finite range"),
    "reward_range tensors": (
        lambda: call(reward_range=torch.tensor([0.0, 1.0])),
        "reward_range: a tensor, .* give a Python number",
    ),
    "dtype": (lambda: call(dtype=torch.int32), "dtype=torch.int32 cannot hold advantages; choose a floating dtype"),
    "dtype of NumPy": (lambda: call(dtype=np.float32), "dtype=<class 'numpy.float32'> cannot hold .* such as torch.float32"),
    "calibration": (lambda: call(calibration="fitted"), "calibration='fitted' is no v05.ops.Calibration; give"),
    "process_group": (lambda: call(process_group="x"), "process_group='x' is no process group of torch.distributed"),
    "out a list": (
        lambda: call(out=[0.0] * 4),
        r"out: \[0.0, 0.0, 0.0, 0.0\]; give a contiguous \(4,\) tensor, torch.float32, on cpu",
    ),
    "out an array": (lambda: call(out=np.zeros(4, np.float32)), r"out: array\(.*; give a contiguous \(4,\) tensor"),
    "out sparse": (lambda: call(out=torch.zeros(4).to_sparse()), r"out: .*; give a contiguous \(4,\) tensor"),
    "prior on meta": (
        lambda: call(prior=torch.zeros(1, device="meta"), method="v05"),
        "prior: a tensor on the meta device, whose values are not in memory; give one that holds values",
    ),
    "mask on meta": (lambda: call(response_mask=torch.ones(4, 2, device="meta")), "response_mask: a tensor on the meta device"),
    "ids on meta": (
        lambda: call(group_ids=torch.zeros(4, device="meta").long(), num_groups=1),
        "group_ids: a tensor on the meta device",
    ),
    "rewards on meta": (lambda: call(torch.zeros(4, device="meta")), "rewards: device meta has no backend"),
    "rewards sparse": (
        lambda: call(torch.tensor(R4).to_sparse()),
        "rewards: a tensor of layout torch.sparse_coo, .*; give a dense one",
    ),
    "mask sparse": (
        lambda: call(response_mask=torch.ones(4, 2, dtype=torch.int32).to_sparse()),
        r"response_mask: a tensor of layout torch.sparse_coo, .*; give a dense one, as its to_dense\(\) makes",
    ),
    "rewards complex": (lambda: call(np.array(R4) + 1j), "rewards: dtype torch.complex128 is not real"),
    "mask complex": (lambda: call(response_mask=np.ones((4, 2)) + 0j), "response_mask: dtype torch.complex128 is not real"),
    "rewards of strings": (lambda: call(["1", "0", "0", "1"]), "rewards: dtype <U1; give numbers"),
    "rewards of objects": (lambda: call([{}, 0, 0, 1]), r"rewards: dtype object; give numbers \(a dict is at position 0\)"),
    "rewards of no dimension": (lambda: call(np.array(1.0)), r"rewards: shape \(\); give \(N,\) outcome rewards"),
    "a reward is None": (lambda: call([1.0, None, 0.0, 1.0]), r"rewards: not finite in rows 1 \(nan\).*nonfinite='exclude'"),
    "a prior is None": (
        lambda: call(prior=[None], method="v05"),
        r"prior: dtype object; give numbers \(a NoneType is at position 0\)",
    ),
    "masked rewards": (lambda: call(np.ma.array(R4, mask=[0, 1, 0, 0])), r"rewards: a masked array, .* filled\(\)"),
    "masked prior": (lambda: call(prior=np.ma.array([0.5]), method="v05"), "prior: a masked array"),
    "masked ids": (lambda: call(group_ids=np.ma.array([0, 0, 1, 1])), "group_ids: a masked array"),
    "masked mask": (lambda: call(response_mask=np.ma.ones((4, 2))), "response_mask: a masked array"),
    "masked valid": (lambda: call(valid=np.ma.array([True] * 4)), "valid: a masked array"),
    "ids in two dimensions": (
        lambda: call(group_ids=np.array([["a", "b"], ["a", "b"]], dtype=object)),
        "group_ids: dtype object; give integers, strings or other ids of one kind",
    ),
    "names in two dimensions": (lambda: call(group_ids=np.array([["a", "b"]] * 2)), "group_ids: dtype <U1; give integers, strings"),
    "integers in two dimensions": (lambda: factorize([[0, 1], [0, 1]]), r"group_ids: shape \(2, 2\) on cpu; give \(N,\) ids"),
    "an id is None": (lambda: call(group_ids=[uuid.UUID(int=1), None, None, uuid.UUID(int=1)]), "group_ids: dtype object; give"),
    "ids of floats": (
        lambda: call(group_ids=np.array([0.5, 0.5, 1, 1], dtype=object)),
        "group_ids: dtype torch.float64; give integers",
    ),
    "ids of 70 bits": (lambda: call(group_ids=[2**70, 0, 1, 1]), "group_ids: dtype object; give integers.* that fit int64"),
    "ids without a hash": (lambda: call(group_ids=[{}, {}, {}, {}]), "group_ids: .*unhashable.*; give integers, strings"),
    "ids of two kinds": (
        lambda: call(group_ids=[uuid.UUID(int=1), b"a", b"a", b"a"]),
        "group_ids: dtype object; give integers, strings",
    ),
    "trajectories of two kinds": (lambda: call(trajectory_ids=["a", 1, 1, 1]), "trajectory_ids: mix strings and other types"),
    "too few trajectories": (lambda: call(trajectory_ids=["a"]), r"trajectory_ids: shape \(1,\) for 4 rollouts"),
    "valid beyond a flag": (lambda: call(valid=[1, 0, 2, 1]), "valid: 2 in row 2; give bool"),
    "Calibration": (lambda: Calibration(alpha="0"), "alpha='0'; give a number"),
    "Calibration of a flag": (lambda: Calibration(kappa=True), "kappa=True; give a number"),
    "rule": (
        lambda: RolloutAllocator(rule=["osla"]),
        r"rule=\['osla'\] is unknown; choose one of osla, uniform, calibrated, variance, total",
    ),
    "initial": (lambda: RolloutAllocator(initial=2.0), "initial=2.0; give an integer"),
    "maximum": (lambda: RolloutAllocator(maximum=2**70), "maximum=1180591620717411303424; give an integer"),
    "allocator's cost": (lambda: RolloutAllocator(cost="x"), "cost='x'; give a number"),
    "total": (lambda: RolloutAllocator(rule="total", total="16"), "total='16'; give an integer"),
    "chunk": (lambda: RolloutAllocator(chunk=True), "chunk=True; give an integer"),
    "seed": (lambda: RolloutAllocator(seed=2**63), "seed=9223372036854775808; give an integer"),
    "allocator's reward_range": (lambda: RolloutAllocator(reward_range=None), r"reward_range=None; give \(lo, hi\)"),
    "allocator's calibration": (
        lambda: RolloutAllocator(rule="calibrated", calibration=(0, 1, 4, 0.1)),
        r"calibration=\(0, 1, 4, 0.1\) is no v05.ops.Calibration",
    ),
    "max_attempts": (lambda: RolloutAllocator(max_attempts=None), "max_attempts=None; give an integer"),
    "lease": (lambda: RolloutAllocator().lease(1.5), "n=1.5; give an integer"),
    "lease of many": (lambda: RolloutAllocator().lease(2**70), "n=1180591620717411303424; give an integer"),
    "expire": (lambda: RolloutAllocator().expire("1"), "older_than='1'; give a number"),
    "masked priors": (lambda: RolloutAllocator().open([1], np.ma.array([0.5])), "priors: a masked array"),
    "allocator's UUIDs": (
        lambda: RolloutAllocator().open([uuid.UUID(int=1)], [0.5]),
        r"group_ids: dtype object; give integers or strings \(a UUID is at position 0\)",
    ),
    "half of a surrogate pair": (
        lambda: RolloutAllocator().open(["\ud800"], [0.5]),
        "group_ids: surrogates not allowed in a string",
    ),
    "allocator's None": (lambda: RolloutAllocator().open([1, 2], [0.5, None]), "priors: dtype object; give numbers"),
    "counts in one number": (lambda: predicted_counts(0.5, 4), r"rates has shape \(\); give one dimension"),
    "counts that overflow": (lambda: predicted_counts([0.5] * 4, 0, 2**62, 2**62), "are not 1 <= lowest <= highest <= 65535"),
    "a total that overflows": (
        lambda: predicted_counts([0.5] * 4, -(2**63), 2, 9),
        "total=-9223372036854775808 does not hold lowest=2",
    ),
    "counts without end": (lambda: predicted_counts([0.5] * 4, 2**62, 2, 2**62), "are not 1 <= lowest <= highest <= 65535"),
    "total of counts": (lambda: predicted_counts([0.5], 4.0), "total=4.0; give an integer"),
    "paths' method": (lambda: paths(method=["v05"]), r"method=\['v05'\] is unknown; choose one of"),
    "paths' initial": (lambda: paths(initial="4"), "initial='4'; give an integer"),
    "paths' maximum": (lambda: paths(maximum=4.0), "maximum=4.0; give an integer"),
    "paths' reward_range": (lambda: paths(reward_range=None), r"reward_range=None; give \(lo, hi\)"),
    "paths' rewards": (
        lambda: path_counting_advantages(["a"], [0.5], [0, 1], method="v05", initial=1, maximum=1),
        "rewards: dtype <U1",
    ),
    "paths' masked rewards": (
        lambda: path_counting_advantages(np.ma.array([1.0]), [0.5], [0, 1], method="v05", initial=1, maximum=1),
        "rewards: a masked array",
    ),
}


@pytest.mark.parametrize(("refused", "message"), REFUSED.values(), ids=REFUSED.keys())
def test_a_message_names_argument_value_and_remedy(refused, message):
    with pytest.raises(ValueError, match=message):
        refused()


@pytest.mark.parametrize("number", [np.float32, np.float64, np.array, Fraction], ids=lambda kind: kind.__name__)
def test_numbers_of_other_kinds(number):
    half = number(0.5)
    options = dict(eps=0.5, cost=0.5, reward_range=(-0.5, 1.5), calibration=Calibration(0.5, 0.5, 0.5, 0.5))
    expected = call(prior=[0.5], method="calibrated", **options)
    given = dict(eps=half, cost=half, reward_range=[-half, half + 1], calibration=Calibration(half, half, half, half))
    seen = call(prior=[half], method="calibrated", **given)
    assert all(map(torch.equal, columns(seen.stats), columns(expected.stats)))
    allocator = RolloutAllocator(cost=half, reward_range=(-half, half + 1))
    assert allocator.snapshot() == RolloutAllocator(cost=0.5, reward_range=(-0.5, 1.5)).snapshot()
    assert allocator.expire(half) == 0


@pytest.mark.parametrize("integer", [np.int64, np.uint8, np.array], ids=lambda kind: kind.__name__)
def test_integers_and_flags_of_numpy(integer):
    options = dict(num_groups=integer(2), max_rollouts=integer(8), leave_one_out=np.bool_(True), stats=np.True_)
    by_numpy = call(group_ids=[0, 1, 1, 0], **options)
    plain = call(group_ids=[0, 1, 1, 0], num_groups=2, max_rollouts=8, leave_one_out=True)
    assert all(map(torch.equal, columns(by_numpy.stats), columns(plain.stats)))
    assert torch.equal(by_numpy.advantages, plain.advantages)
    assert call(stats=np.False_).stats is None
    options = dict(initial=2, maximum=8, total=16, chunk=3, seed=7, max_attempts=2)
    allocator = RolloutAllocator(rule="total", **{name: integer(value) for name, value in options.items()})
    assert allocator.snapshot() == RolloutAllocator(rule="total", **options).snapshot()
    assert len(allocator.lease(integer(3))) == 0
    assert predicted_counts([0.5], integer(4), integer(2), integer(3)).tolist() == [3]
    assert torch.equal(paths(initial=integer(4), maximum=integer(4), chunk=integer(1)), paths())


@pytest.mark.parametrize(
    "rewards",
    [
        np.array(R4, dtype=object),
        [Fraction(1), Fraction(0), 0, 1],
        [Decimal(1), Decimal(0), Decimal("0.0"), Decimal("1e0")],
        [True, False, False, True],
        np.array([True, False, False, True], dtype=object),
        [np.float32(1), np.int64(0), 0, np.True_],
        np.array(R4, dtype=np.longdouble),
        np.array(R4, dtype=np.uint64),
        [torch.tensor(reward) for reward in R4],
    ],
    ids=["objects", "fractions", "decimals", "flags", "flag objects", "NumPy's", "longdouble", "uint64", "tensors"],
)
def test_rewards_that_stand_for_numbers(rewards):
    assert call(rewards).advantages.tolist() == [0.5, -0.5, -0.5, 0.5]


def test_a_reward_that_is_none_is_a_missing_one():
    out = call([1.0, None, 0.0, 1.0], nonfinite="exclude", dtype=torch.float64)
    assert out.advantages.tolist() == pytest.approx([1 / 3, 0.0, -2 / 3, 1 / 3])
    assert out.stats.nonfinite.tolist() == [1]
    allocator = RolloutAllocator(rule="uniform", initial=2)
    allocator.open([1], [0.5])
    allocator.report(allocator.lease(2).lease_id, [1.0, None])
    np.testing.assert_array_equal(allocator.drain().rewards, [1.0, math.nan])


UUIDS = [uuid.UUID(int=number) for number in (7, 3, 7, 3)]
IDS = {
    "UUIDs": UUIDS,
    "an array of UUIDs": np.array(UUIDS),
    "integer objects": np.array([7, 3, 7, 3], dtype=object),
    "NumPy's integers as objects": np.array([np.int32(7), np.int8(3), 7, 3], dtype=object),
    "bytes": np.array([b"b", b"a", b"b", b"a"]),
    "a range": np.array([7, 3, 7, 3]).astype(np.uint16),
    "64 bits without a sign": [2**63 + 7, 2**63 + 3, 2**63 + 7, 2**63 + 3],
    "NumPy's own strings": np.array(["b", "a", "b", "a"], dtype=np.dtypes.StringDType()),
}


@pytest.mark.parametrize("ids", IDS.values(), ids=IDS.keys())
def test_ids_of_any_plain_kind(ids):
    expected = call(group_ids=[0, 1, 0, 1])
    out = call(group_ids=ids)
    assert torch.equal(out.advantages, expected.advantages)
    assert factorize(ids)[0].tolist() == [0, 1, 0, 1]
    together = call(trajectory_ids=ids, rewards=[1.0, 0.0, 1.0, 0.0])
    assert together.stats.count.tolist() == [2]


def test_integer_objects_are_positions_where_num_groups_says_so():
    out = call(group_ids=np.array([1, 0, 1, 0], dtype=object), num_groups=3)
    assert out.stats.count.tolist() == [2, 2, 0]
    allocator = RolloutAllocator(initial=1)
    allocator.open(np.array([5, 6], dtype=object), np.array([0.5, Fraction(1, 4)], dtype=object))
    assert allocator.lease(2).group.tolist() == [5, 6]


def test_trajectories_may_have_names():
    rewards, names = [1.0, 1.0, 1.0, 0.0], ["x", "x", "x", "y"]
    by_name = call(rewards, trajectory_ids=names, method="rloo")
    assert by_name.advantages.tolist() == call(rewards, trajectory_ids=[7, 7, 7, 9], method="rloo").advantages.tolist()
    assert by_name.stats.count.tolist() == [2]


INTEGER_MASKS = [torch.int8, torch.int16, torch.int32, torch.int64]
FLOATING_MASKS = [torch.float16, torch.bfloat16, torch.float32, torch.float64]
ODD = {torch.bool: (), torch.uint8: (2,)} | dict.fromkeys(INTEGER_MASKS, (-100, 2, -1))
ODD |= dict.fromkeys(FLOATING_MASKS, (-100, 0.5, math.nan, math.inf))  # neither 0 nor 1


@pytest.mark.parametrize("tokens", [1, 3, 64, 200])
@pytest.mark.parametrize("dtype", ODD, ids=str)
def test_a_mask_is_of_zeros_and_ones(dtype, tokens):
    generator = torch.Generator().manual_seed(tokens)
    flags = torch.rand(4, tokens, generator=generator) < 0.7
    expected = torch.where(flags, call().advantages[:, None], 0.0)
    mask = flags.to(dtype)
    token_rewards = torch.where(torch.arange(tokens) == 0, torch.tensor(R4)[:, None], 0.0)
    first = mask.clone()
    first[:, 0] = 1
    assert torch.equal(call(response_mask=mask).advantages, expected)
    assert torch.equal(call(token_rewards, response_mask=first).advantages[:, 0], call().advantages)
    for value in ODD[dtype]:
        message = rf"response_mask: neither 0 nor 1 in rows {{}} \({value:g}\).* labels != -100"
        for row, column in ((0, 0), (3, tokens - 1), (2, tokens // 2)):
            broken = first.clone()
            broken[row, column] = value
            for rewards in (torch.tensor(R4), token_rewards, torch.full((4, tokens), 9e149, dtype=torch.float64)):
                with pytest.raises(ValueError, match=message.format(row)):
                    call(rewards, response_mask=broken)


def test_labels_are_no_mask():
    labels = torch.tensor([[-100, 5, 6], [-100, -100, 7], [5, 5, 5], [-100, 1, 1]])
    with pytest.raises(ValueError, match=r"response_mask: neither 0 nor 1 in rows 0 \(-100\), 1 \(-100\), 2 \(5\), 3 \(-100\)"):
        call(response_mask=labels)
    assert call(response_mask=labels != -100).advantages.shape == (4, 3)
    assert call(response_mask=torch.full((4, 3), -0.0)).advantages.tolist() == [[0.0] * 3] * 4


@pytest.mark.parametrize("scale", ["group", "batch"])
def test_a_deviation_that_would_round_to_zero_is_refused(scale):
    for size in (1e-155, 1e-200, 5e-324, 1e-140):
        with pytest.raises(ValueError, match=rf"rewards: nearer to 0 than 1e-130 in rows 1 \({size:.15g}\).*Give an eps above 0"):
            call([0.0, size, 0.0, 1.0], method="grpo", scale=scale, eps=0)
        assert call([0.0, size, 0.0, 1.0], method="grpo", scale=scale).advantages.isfinite().all()
        assert call([0.0, size, 0.0, 1.0], method="grpo", scale="none", eps=0).advantages.isfinite().all()
        assert call([0.0, size, 0.0, 1.0], scale=scale, eps=0, valid=[1, 0, 1, 1]).advantages.isfinite().all()
    smallest = call([0.0, 1e-130, 0.0, 1e-130], method="grpo", scale=scale, eps=0, dtype=torch.float64).advantages
    torch.testing.assert_close(smallest.abs(), torch.full((4,), math.sqrt(3) / 2, dtype=torch.float64))


@pytest.mark.filterwarnings("ignore")  # torch's own warnings
@pytest.mark.parametrize("transform", ["vmap", "grad", "jvp"])
def test_transforms_of_torch_func_are_refused(transform):
    rewards = torch.tensor([R4, R4])
    transformed = {
        "vmap": lambda function: torch.func.vmap(function)(rewards),
        "grad": lambda function: torch.func.grad(lambda given: function(given).sum())(rewards[0]),
        "jvp": lambda function: torch.func.jvp(function, (rewards[0],), (rewards[1],)),
    }[transform]
    for name, of_it in {
        "rewards": lambda given: call(given).advantages,
        "prior": lambda given: call(prior=given[:1], method="v05").advantages,
        "response_mask": lambda given: call(response_mask=given[:, None]).advantages,
    }.items():
        with pytest.raises(ValueError, match=f"{name}: a tensor of torch.func's vmap or grad, .*; call outside of vmap and grad"):
            transformed(of_it)
    with pytest.raises(ValueError, match=r"rewards: torch.func's vmap or grad wraps them, .*; call outside of vmap and grad"):
        torch.func.grad(lambda weight: (call().advantages * weight).sum())(rewards[0])
    inside = torch.func.vmap(lambda weight: (call().advantages * weight).sum())(rewards)  # no argument is transformed
    assert inside.tolist() == [1.0, 1.0]


@pytest.fixture
def alone():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield dist.group.WORLD
    dist.destroy_process_group()


@pytest.mark.parametrize("layout", ["per-rollout", "padded", "packed"])
def test_a_default_device_is_not_the_tensors_own(alone, layout):
    given = dict(rewards=torch.tensor(R4), prior=[0.25, 0.75], group_ids=["a", "a", "b", "b"], method="v05")
    given |= {"padded": dict(response_mask=torch.ones(4, 2)), "packed": dict(cu_seqlens=[0, 1, 2, 4, 5])}.get(layout, {})
    for group in (None, alone):
        expected = call(**given, process_group=group)
        with torch.device("meta"):
            seen = call(**given, process_group=group)
        assert torch.equal(seen.advantages, expected.advantages)
        assert all(map(torch.equal, columns(seen.stats), columns(expected.stats)))


def test_ranks_know_ids_of_any_kind(alone):
    given = dict(rewards=[1.0, 1.0, 0.0, 1.0], group_ids=UUIDS, trajectory_ids=["x", "y", "z", "y"])
    assert torch.equal(call(**given, process_group=alone).advantages, call(**given).advantages)
    with pytest.raises(ValueError, match=r"response_mask: neither 0 nor 1 in rows 1 \(-100\).*\(on rank 0 of the process group\)"):
        call(group_ids=UUIDS, response_mask=torch.tensor([[1], [-100], [0], [1]]), process_group=alone)


@pytest.mark.parametrize("argument", ["group_ids", "factorized", "group_offsets", "cu_seqlens", "trajectory_ids"])
def test_another_thread_changes_what_was_checked(argument):
    """If another thread writes to an argument during the call, reads stay within the buffers. The result is then arbitrary."""
    rows = 200_000
    offsets, ids = torch.arange(rows + 1), torch.arange(rows) // 2
    array, options = {
        "group_ids": (ids, dict(group_ids=ids, num_groups=rows // 2, nonfinite="exclude")),
        "factorized": (ids, dict(group_ids=ids)),
        "group_offsets": (offsets, dict(group_offsets=offsets, trajectory_ids=torch.zeros(rows).long(), nonfinite="exclude")),
        "cu_seqlens": (offsets, dict(cu_seqlens=offsets, group_offsets=[0, rows])),
        "trajectory_ids": (ids, dict(trajectory_ids=ids, group_offsets=[0, rows])),
    }[argument]
    rewards = torch.ones(rows)
    rewards[-1] = 1.0 if argument in ("factorized", "cu_seqlens", "trajectory_ids") else math.nan
    stop = threading.Event()

    def write():
        values = array.numpy()
        kept = values.copy()
        while not stop.is_set():
            values[1:-1:97] = 2**40
            values[2:-1:89] = -(2**40)
            values[:] = kept

    writer = threading.Thread(target=write)
    writer.start()
    try:
        for _ in range(20):
            with contextlib.suppress(ValueError):
                fused_advantage(rewards, method="grpo", **options)
    finally:
        stop.set()
        writer.join()
