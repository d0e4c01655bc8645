"""README's code runs, and what README says of it is so."""

import re
import runpy
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()


@pytest.fixture(scope="module")
def namespaces(tmp_path_factory):
    """What each Python block of README leaves behind, in one process that is all of torch.distributed's ranks."""
    blocks = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)
    rendezvous = tmp_path_factory.mktemp("ranks") / "rendezvous"
    dist.init_process_group("gloo", init_method=f"file://{rendezvous}", rank=0, world_size=1)
    results = []
    for block in blocks:
        namespace = {}
        exec(compile(block, "README.md", "exec"), namespace)
        results.append(namespace)
    dist.destroy_process_group()
    return results


def test_the_op(namespaces):
    stats = namespaces[0]["out"].stats
    assert stats.baseline.tolist() == pytest.approx([0.4, 0.91], abs=5e-3)
    assert stats.weight.tolist() == pytest.approx([0.0, 0.90], abs=5e-3)
    assert stats.take_more.tolist() == [False, True]


def test_any_trainer(namespaces):
    here, split = namespaces[1], namespaces[2]
    mask = here["mask"].bool()
    assert torch.equal(here["padded"][:, 0], split["advantages"][:, 0])
    assert here["padded"][:, 0].tolist() == pytest.approx([0.6, -0.1875, -0.4, 0.8125])
    assert torch.equal(here["packed"], here["padded"][mask])
    assert (here["padded"][~mask] == 0).all()


def test_the_allocator(namespaces):
    closed = namespaces[3]["closed"]
    assert closed.group_ids.tolist() == ["a", "b"]
    assert closed.offsets[1] == 4
    assert closed.offsets[2] - closed.offsets[1] > 4


def test_the_commands_exist():
    from typer.testing import CliRunner

    from v05.cli import app

    for command, options in re.findall(r"^v05 ([\w-]+)\s+(.*)$", README, flags=re.MULTILINE):
        text = CliRunner().invoke(app, [command, "--help"], env={"COLUMNS": "200"}).stdout
        for option in re.findall(r"--\w+", options):
            assert option in text, (command, option)


def test_the_table_is_that_of_the_results():
    assert runpy.run_path(str(ROOT / "bench" / "table.py"))["replaced"](README) == README
