"""Measures the tokens per second of the embedded engine: `python bench/engine.py --write docs/speed.md`.

There are three providers: the engine with slots, whose steps a CUDA device replays as graphs; the engine with growing caches, which
it uses for architectures that slots do not support; and `generate` of transformers, which returns only tokens. The floor is the
memory traffic of a token step (the weights once, and the keys and values of every rollout) at the bandwidth that a copy reaches in
the same run. On a CPU the arithmetic of a step takes longer than that. An engine is timed only if its log-probabilities agree with
those of a forward pass without a cache.

Weights are random, prompts have several lengths, and every rollout has the maximum number of tokens. On a GPU the engine runs in
bfloat16, and the script takes at most two minutes.
"""

from __future__ import annotations

import argparse
import csv
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from architectures import SMOLLM2_135M
from marks import replaced

BENCH = Path(__file__).parent
PACKAGING = BENCH.parent / "packaging"
SECONDS = 100  # time limit of a run
# (rollouts, tokens per rollout) by device and policy.
SIZES = {
    "cpu": {"SmolLM2-135M": (8, 12), "a preset's policy": (256, 12)},
    "cuda": {"SmolLM2-135M": (512, 128), "a preset's policy": (512, 32)},
}
PROMPTS = range(8, 65, 8)  # lengths of prompts in tokens
GATED = 8  # rollouts whose log-probabilities are checked
ROUNDING = {"float32": 1e-3, "bfloat16": 0.3}  # largest difference of log-probabilities in nats
SLOTS, ROWS, GENERATE = "v05, slots", "v05, growing caches", "transformers generate"
WANTED_RATE, WANTED_RATIO = 60_000, 8  # targets for SmolLM2-135M on an H200: tokens per second, and the factor over growing caches


@dataclass(frozen=True)
class Row:
    """The figures of a provider on a policy.

    Attributes:
        seconds: median time of a run that samples all tokens. None if there is a note.
        first_seconds: time of the first run, in which a GPU's graphs are captured.
        tokens_per_second: tokens per second of the median run.
        floor_seconds: the floor of a run, see the module's docstring.
        note: the reason why there are no figures, or empty.
    """

    policy: str
    provider: str
    rollouts: int
    tokens: int
    dtype: str
    seconds: float | None
    first_seconds: float
    tokens_per_second: float | None
    floor_seconds: float
    note: str
    device: str
    threads: int
    commit: str
    versions: str


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", type=Path, metavar="PAGE", help="put the table into this page")
    parser.add_argument("--seconds", type=float, default=SECONDS, help="time limit of the run")
    parser.add_argument(
        "--policy", choices=list(SIZES["cpu"]), action="append", help="measure only this policy; may be given again"
    )
    parser.add_argument("--size", metavar="ROLLOUTS,TOKENS", help="use this size; no file of results is written")
    options = parser.parse_args()

    os.environ.pop("TRITON_INTERPRET", None)  # kernels are compiled here
    sys.path.append(str(PACKAGING))
    import in_place

    if (tree := in_place.folder()) is not None:
        sys.path.insert(0, str(tree))

    import torch

    kind = "cuda" if torch.cuda.is_available() else "cpu"
    sizes = {name: size for name, size in SIZES[kind].items() if name in (options.policy or SIZES[kind])}
    if options.size:
        rollouts, tokens = map(int, options.size.split(","))
        sizes = dict.fromkeys(sizes, (rollouts, tokens))
    rows = []
    for row in measure_all(kind, sizes, options.seconds):
        print(line(row), flush=True)
        rows.append(row)
    if kind == "cuda":
        print("\n".join(verdicts(rows)))
    if not (options.size or options.policy):
        with (BENCH / "results" / f"engine_{kind}.csv").open("w", newline="") as file:
            writer = csv.DictWriter(file, [field.name for field in fields(Row)])
            writer.writeheader()
            writer.writerows(asdict(row) for row in rows)
    if options.write is not None:
        options.write.write_text(replaced(options.write.read_text(), f"engine on {kind}", table(rows)))
    if any(row.note for row in rows):
        sys.exit(1)


def measure_all(kind: str, sizes: dict[str, tuple[int, int]], seconds: float) -> Iterator[Row]:
    import torch
    from losses.measure import copy_bandwidth
    from machine import commit, processor, versions

    device, dtype = torch.device(kind), torch.bfloat16 if kind == "cuda" else torch.float32
    until = time.monotonic() + seconds
    bandwidth = copy_bandwidth(device)
    for left, (name, (rollouts, tokens)) in zip(range(len(sizes), 0, -1), sizes.items(), strict=True):
        torch.manual_seed(0)
        model = policy(name).to(device, dtype).eval()
        prompts = draw_prompts(model, rollouts)
        figures = measure(model, prompts, tokens, (until - time.monotonic()) / left)
        for provider, (first, median, note) in figures.items():
            yield Row(
                policy=name,
                provider=provider,
                rollouts=rollouts,
                tokens=tokens,
                dtype=str(dtype).removeprefix("torch."),
                seconds=median,
                first_seconds=first,
                tokens_per_second=rollouts * tokens / median if median else None,
                floor_seconds=traffic(model, prompts, tokens) / bandwidth,
                note=note,
                device=torch.cuda.get_device_name() if kind == "cuda" else processor(),
                threads=torch.get_num_threads(),
                commit=commit(),
                versions=versions("torch", "transformers"),
            )


def policy(name: str) -> Any:
    """A model with random weights, scaled so that token probabilities are not uniform."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    from v05.train.config import PolicyConfig
    from v05.train.policy import character_decoder, character_tokenizer

    model: Any = character_decoder(PolicyConfig(), len(character_tokenizer()))
    if name.startswith("SmolLM2"):
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**SMOLLM2_135M, max_position_embeddings=8192))
    model.generation_config.eos_token_id = None
    with torch.no_grad():
        model.get_output_embeddings().weight.mul_(4)
    return model


def draw_prompts(model: Any, count: int) -> list[tuple[int, ...]]:
    """(count,) prompts: one random prompt for each group of 16, repeated 16 times."""
    import torch

    generator = torch.Generator().manual_seed(0)
    lengths = [PROMPTS[i % len(PROMPTS)] for i in range(-(-count // 16))]
    groups = [tuple(torch.randint(model.config.vocab_size, (n,), generator=generator).tolist()) for n in lengths]
    return [groups[i // 16] for i in range(count)]


def traffic(model: Any, prompts: Sequence[tuple[int, ...]], tokens: int) -> float:
    """The least bytes that a run reads: at every step the weights, and the keys and values of every rollout's earlier tokens."""
    import torch
    from transformers import DynamicCache

    weights = sum(parameter.nbytes for parameter in model.parameters())
    cache = DynamicCache()
    with torch.no_grad():
        model(input_ids=torch.tensor([[1]], device=model.device), past_key_values=cache, use_cache=True)
    kept = sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)
    return tokens * weights + kept * sum(tokens * (len(prompt) + tokens / 2) for prompt in prompts)


def measure(
    model: Any, prompts: Sequence[tuple[int, ...]], tokens: int, seconds: float
) -> dict[str, tuple[float, float | None, str]]:
    """For each provider: seconds of its first run, the median of later runs, and an error message or "". Providers take turns."""
    until = time.monotonic() + seconds
    runs: dict[str, Callable[[], Any]] = {name: samples(name, model, prompts, tokens) for name in (SLOTS, ROWS)}
    runs[GENERATE] = generates(model, prompts, tokens)
    first: dict[str, float] = {}
    notes: dict[str, str] = {}
    times: dict[str, list[float]] = {name: [] for name in runs}
    for name, run in runs.items():
        first[name], made = timed(run, model.device)
        notes[name] = "" if name == GENERATE else difference(model, prompts, made)
    began = time.monotonic()
    turn = 0.0
    while turn == 0.0 or time.monotonic() + turn < until:
        for name, run in runs.items():
            if not notes[name]:
                times[name].append(timed(run, model.device)[0])
        turn = turn or time.monotonic() - began
    return {name: (first[name], statistics.median(times[name]) if times[name] else None, notes[name]) for name in runs}


def timed(run: Callable[[], Any], device: Any) -> tuple[float, Any]:
    """The seconds of a run, and its result."""
    import torch

    start = time.perf_counter()
    made = run()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start, made


def samples(provider: str, model: Any, prompts: Sequence[tuple[int, ...]], tokens: int) -> Callable[[], Any]:
    """A run of the engine with slots or with growing caches, by the provider's name."""
    from v05.rollout import Request, generate
    from v05.rollout.batch import Ends, RowBatch
    from v05.rollout.sampling import Sampler
    from v05.rollout.slots import SlotBatch
    from v05.rollout.transformers_engine import TransformersEngine

    endless = model.config.vocab_size  # an end token that is never sampled
    tokenizer = SimpleNamespace(eos_token_id=endless, pad_token_id=0)
    engine = TransformersEngine(model, tokenizer, max_new_tokens=tokens, capacity=len(prompts))
    engine._batch = (SlotBatch if provider == SLOTS else RowBatch)(model, 0, Ends((endless,), tokens), Sampler())
    requests = [Request(prompt, seed) for seed, prompt in enumerate(prompts)]
    return lambda: generate(engine, requests)


def generates(model: Any, prompts: Sequence[tuple[int, ...]], tokens: int) -> Callable[[], Any]:
    import torch

    longest = max(map(len, prompts))
    ids = torch.tensor([[0] * (longest - len(prompt)) + list(prompt) for prompt in prompts], device=model.device)
    mask = torch.tensor([[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts], device=model.device)
    settings = {"do_sample": True, "top_k": 0, "min_new_tokens": tokens, "max_new_tokens": tokens, "pad_token_id": 0}
    return lambda: model.generate(ids, attention_mask=mask, **settings)


def difference(model: Any, prompts: Sequence[tuple[int, ...]], completions: Sequence[Any]) -> str:
    """An error message on the completions' log-probabilities, or "" if they are right."""
    import torch

    largest = 0.0
    for i in range(0, len(prompts), max(1, len(prompts) // GATED)):
        tokens = torch.from_numpy(completions[i].tokens).to(model.device)
        ids = torch.tensor([[*prompts[i], *tokens.tolist()]], device=model.device)
        with torch.no_grad():
            logits = model(input_ids=ids, use_cache=False).logits[0, len(prompts[i]) - 1 : -1]
        plain = torch.log_softmax(logits.float(), -1).gather(1, tokens[:, None]).squeeze(1).cpu()
        largest = max(largest, float((plain - torch.from_numpy(completions[i].logprobs)).abs().nan_to_num(torch.inf).max()))
    allowed = ROUNDING[str(model.dtype).removeprefix("torch.")]
    return "" if largest <= allowed else f"log-probabilities differ from a plain pass by {largest:.2g}, above {allowed:g}"


def table(rows: Sequence[Row]) -> str:
    """The Markdown table, and a line with the conditions."""
    lines = ["| policy, rollouts x tokens | | tokens a second | times the floor | first run, s |", "|---|---|---|---|---|"]
    for row in rows:
        figures = f"{row.note} | |"
        if row.seconds is not None:
            figures = f"{row.tokens_per_second:,.0f} | {row.seconds / row.floor_seconds:.1f} | {row.first_seconds:.1f}"
        lines.append(f"| {row.policy}, {row.rollouts} x {row.tokens}, {row.dtype} | {row.provider} | {figures} |")
    about = rows[0]
    where = f"{about.device}, {about.threads} thread{'s' * (about.threads > 1)}"
    return "\n".join(lines) + f"\n\n`python bench/engine.py` at commit {about.commit}; medians on {where}; {about.versions}.\n"


def verdicts(rows: Sequence[Row]) -> list[str]:
    """Lines on the targets for SmolLM2-135M on an H200 and whether they are met."""
    rates = {row.provider: row.tokens_per_second for row in rows if row.policy.startswith("SmolLM2")}
    slots, growing = rates.get(SLOTS), rates.get(ROWS)
    if slots is None or growing is None:
        return ["not measured"]
    found = [("tokens a second", slots, WANTED_RATE), ("times growing caches", slots / growing, WANTED_RATIO)]
    return [
        f"{'met' if value >= wanted else 'NOT met':8} {what}: {value:,.1f}, >= {wanted:,} wanted" for what, value, wanted in found
    ]


def line(row: Row) -> str:
    what = row.note
    if row.seconds is not None:
        rate, floors = row.tokens_per_second, row.seconds / row.floor_seconds
        what = f"{rate:10,.0f} tokens/s, {floors:6.1f} x floor, first {row.first_seconds:.1f} s"
    return f"{row.policy:18} {row.rollouts} x {row.tokens} {row.provider:22} {what}"


if __name__ == "__main__":
    main()
