"""v05: better policy gradients from fewer rollouts.

Value-prior baselines and sequential rollout budgets for reinforcement learning with verifiable rewards, after V_0.5
(arXiv 2603.10848). The entry points are `v05.ops.fused_advantage` and `v05.budget.RolloutAllocator`.
"""

from importlib.util import find_spec as _find_spec

if _find_spec("v05._core") is None:
    raise ImportError(
        f"v05 was imported from {__path__[0]}, a source tree whose compiled core is not installed there. Either leave that "
        "directory, so that the installed v05 is found, or install the tree itself with: pip install -e ."
    )

__version__ = "0.2.0"
