"""What an import may load: the ops load little besides torch, and the command line's help loads nothing heavy."""

import json
import subprocess
import sys

import pytest

OF_THE_CORE = {"numpy", "packaging", "torch", "v05"}  # the dependencies that everything needs, without Triton
HEAVY = {"matplotlib", "numpy", "plotly", "reasoning_gym", "scipy", "sklearn", "sympy", "torch", "transformers", "triton"}
COMPILERS = ("torch._dynamo", "torch._inductor")  # each takes a second or more to import

LOADED = """
import json, sys
{first}
already = set(sys.modules)
try:
    {then}
except SystemExit as end:  # of a command
    assert not end.code
json.dump(sorted(set(sys.modules) - already), sys.stderr)
"""


def loaded(then: str, *, first: str = "") -> set[str]:
    """The modules, without the standard library's, that the statement `then` loads in a fresh process after `first`."""
    script = LOADED.format(first=first, then=then)
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    standard = sys.stdlib_module_names
    return {name for name in json.loads(result.stderr) if name.partition(".")[0] not in standard}


def packages(modules: set[str]) -> set[str]:
    return {name.partition(".")[0] for name in modules if not name.startswith("_")}


def test_the_ops_load_nothing_heavy():
    modules = loaded("import v05.ops", first="import torch")
    assert "v05.ops.advantage.library" in modules
    assert packages(modules) <= OF_THE_CORE
    assert not modules & set(COMPILERS)
    assert not any(name.startswith("v05.kernels") for name in modules)  # the kernels import Triton


def test_an_advantage_on_the_cpu_loads_nothing_heavy():
    modules = loaded(
        "v05.ops.fused_advantage(torch.ones(2), method='grpo', group_offsets=[0, 2])",
        first="import torch, v05.ops",
    )
    assert packages(modules) <= OF_THE_CORE
    assert not modules & set(COMPILERS)


@pytest.mark.parametrize("arguments", [(), ("train",), ("compare",), ("doctor",)], ids=" ".join)
def test_the_help_loads_nothing_heavy(arguments):
    command = ["v05", *arguments, "--help"]
    modules = loaded(f"sys.argv = {command!r}; from v05.cli import main; main()")
    assert "v05.cli.train" in modules
    assert not packages(modules) & HEAVY
