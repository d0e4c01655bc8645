"""Every tensor is made on a named device: the default device is the caller's to set."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
# Functions of torch that put a new tensor on the default device. `randn`, which makes a module's parameters, follows it on purpose,
# as all modules do.
FACTORIES = {"arange", "empty", "eye", "full", "linspace", "logspace", "ones", "rand", "randint", "randperm", "tensor", "zeros"}


def factories(source: str) -> list[int]:
    """The line numbers of calls that name no device."""
    calls = [node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute)]
    return [
        call.lineno
        for call in calls
        if isinstance(call.func.value, ast.Name)
        and call.func.value.id == "torch"
        and call.func.attr in FACTORIES
        and not any(keyword.arg == "device" for keyword in call.keywords)
    ]


def test_a_call_without_a_device_is_seen():
    assert factories("import torch\ntorch.zeros(3)\ntorch.zeros(3, device='cpu')\n") == [2]


@pytest.mark.parametrize("folder", ["v05", "kernels"])
def test_every_tensor_names_its_device(folder):
    found = {path.relative_to(ROOT).as_posix(): factories(path.read_text()) for path in (ROOT / folder).rglob("*.py")}
    assert {path: lines for path, lines in found.items() if lines} == {}
