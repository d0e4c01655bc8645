"""`bench/policy_loss.py` on a CPU: its rows, its gate, and its table."""

import importlib
import re
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from helpers import warm

BENCH = Path(__file__).parents[1] / "bench"


@pytest.fixture(scope="module")
def bench():
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(BENCH))
        names = ("policy_loss", "losses.measure", "losses.problem", "losses.providers")
        yield {name: importlib.import_module(name) for name in names}


def test_every_row_is_measured():
    command = [warm.python(), str(BENCH / "policy_loss.py"), "--seconds", "0.1", "--size", "64,50,0", "--size", "64,50,8"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert [re.search(r"x +\d+  (.+?)  ", line)[1] for line in lines] == [
        "v05",
        "v05, in place",
        "plain torch",
        "v05",
        "plain torch",
    ]
    assert all(" ms, floor " in line for line in lines)


def test_a_provider_that_differs_is_not_timed(bench, monkeypatch):
    measure, providers = bench["losses.measure"], bench["losses.providers"]
    wrong = {"plain torch": lambda problem: 1.01 * providers.plain(problem)}
    monkeypatch.setattr(measure, "providers", lambda *_: wrong)
    size = bench["losses.problem"].Size(64, 50, 8)
    made = measure.measure("plain torch", size, torch.device("cpu"), torch.float32, None, 0.1)
    assert "those of v05" in made


def test_the_table(bench):
    module = bench["policy_loss"]
    row = module.Row("v05", 8192, 49_152, 0, "float32", 0.9, 0.2, 0.3, 0.1, 2**30, "", "some processor", 1, "abc", "torch=2")
    text = module.table([row, replace(row, provider="peer", seconds=None, note="out of memory", hidden=576)])
    assert "| 8,192 x 49,152, float32 logits | v05 | 900.00 | 3.00 | 200.00 | 50% | 1,024 |" in text
    assert "| 8,192 x 49,152, 576 hidden | peer | out of memory |" in text
    assert "at commit abc; medians on some processor, 1 thread; torch=2." in text
    page = "a\n<!-- policy loss on cpu begins -->\nold\n<!-- policy loss on cpu ends -->\nb\n"
    assert module.replaced(page, "policy loss on cpu", text) == page.replace("old\n", text)
