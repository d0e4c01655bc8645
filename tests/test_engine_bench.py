"""`bench/engine.py` on a CPU: its rows, its gate, and its table."""

import importlib
import re
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest

from helpers import warm

BENCH = Path(__file__).parents[1] / "bench"


@pytest.fixture(scope="module")
def bench():
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(BENCH))
        yield importlib.import_module("engine")


def test_every_row_is_measured():
    command = [warm.python(), str(BENCH / "engine.py"), "--seconds", "1", "--policy", "a preset's policy", "--size", "20,4"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    found = [re.match(r"a preset's policy +20 x 4 (.+?)  .* tokens/s, .* x floor", line) for line in done.stdout.splitlines()]
    assert [match[1] for match in found] == ["v05, slots", "v05, growing caches", "transformers generate"]


def test_an_engine_that_differs_is_not_timed(bench, monkeypatch):
    samples = bench.samples

    def wrong(provider, *given):
        run = samples(provider, *given)
        shift = 0.01 if provider == bench.ROWS else 0.0
        return lambda: [replace(completion, logprobs=completion.logprobs + shift) for completion in run()]

    monkeypatch.setattr(bench, "samples", wrong)
    model = bench.policy("a preset's policy").eval()
    made = bench.measure(model, bench.draw_prompts(model, 3), 3, 0.0)
    assert [median is None for _, median, _ in made.values()] == [False, True, False]
    assert re.fullmatch("log-probabilities differ from a plain pass by 0.01, above 0.001", made[bench.ROWS][2])


def test_the_traffic_is_of_weights_and_what_is_kept(bench):
    model = bench.policy("a preset's policy")
    config = model.config
    weights = sum(parameter.numel() for parameter in model.parameters())
    kept = 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim
    assert bench.traffic(model, [(1,) * 8, (1,) * 16], 10) == 4 * (10 * weights + 10 * kept * (8 + 5 + 16 + 5))


def test_the_table_and_the_verdicts(bench):
    row = bench.Row("SmolLM2-135M", bench.SLOTS, 512, 128, "bfloat16", 0.5, 3.0, 131_072.0, 0.1, "", "H200", 1, "abc", "torch=2")
    rows = [row, replace(row, provider=bench.ROWS, tokens_per_second=20_000.0), replace(row, seconds=None, note="wrong")]
    text = bench.table(rows)
    assert "| SmolLM2-135M, 512 x 128, bfloat16 | v05, slots | 131,072 | 5.0 | 3.0 |" in text
    assert "| wrong | | |" in text
    assert "at commit abc; medians on H200, 1 thread; torch=2." in text
    assert bench.verdicts(rows[:2]) == [
        "met      tokens a second: 131,072.0, >= 60,000 wanted",
        "NOT met  times growing caches: 6.6, >= 8 wanted",
    ]
    page = "a\n<!-- engine on cpu begins -->\nold\n<!-- engine on cpu ends -->\nb\n"
    assert bench.replaced(page, "engine on cpu", text) == page.replace("old\n", text)
    with pytest.raises(ValueError, match="engine on cuda begins"):
        bench.replaced(page, "engine on cuda", text)
