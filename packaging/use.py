"""Uses the op and the allocator of an installed wheel once: `python packaging/use.py`, in an environment without this tree."""

from v05.budget import RolloutAllocator
from v05.ops import fused_advantage

assert fused_advantage([1.0, 0.0], [0.5], group_offsets=[0, 2]).advantages.tolist() == [0.5, -0.5]
allocator = RolloutAllocator()
allocator.open(["a"], [1.0])
allocator.report(allocator.lease(9).lease_id, [1.0] * 4)
assert allocator.done
assert allocator.drain().rewards.tolist() == [1.0] * 4
