"""Benchmarks: measures how often a model answers right, on problems from local JSON-lines files. Implements `v05 eval`.

The benchmark NAME is the file DIR/NAME.jsonl, with one problem per line. A problem is inserted into a template, and the result into
the tokenizer's chat template. Separate processes verify the samples (v05.tasks.answers). The seed of a sample is a function of the
run's seed, the benchmark, the problem and the sample's number only. Each sample is appended to samples.jsonl when it is verified,
so an interrupted run can sample only what is missing, and samples or benchmarks can be added later. Nothing is downloaded.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field, field_validator
from transformers import AutoConfig

from v05.files import explained, read_object, read_objects
from v05.pretrained import load_pretrained
from v05.rollout import ATTEMPTS, Completion, Failure, Request, RolloutEngine
from v05.rollout.limits import positions_of, refuse_prompt
from v05.rollout.scheduler import VERIFIER_GLANCE
from v05.rollout.transformers_engine import TransformersEngine
from v05.rollout.verifier import Item, Verifier
from v05.tasks import Prompt
from v05.tasks.rows import PROBLEM_FIELDS, Row, read_rows
from v05.train.curves import bootstrap_interval
from v05.train.metrics import write_json
from v05.train.policy import chat_tokens, load_policy, load_tokenizer

PLACEHOLDER = "{problem}"
TEMPLATE = "{problem}\nPlease reason step by step, and put your final answer within \\boxed{}."  # recommended by Qwen's model cards
SAMPLES, CONFIG, RESULT, OUTCOMES = "samples.jsonl", "config.json", "result.json", "outcomes.jsonl"
SEED_BYTES = 7  # so that a seed is a non-negative int64


class EvalConfig(BaseModel):
    """The settings that a sample depends on."""

    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=(), allow_inf_nan=False)
    model: Path
    weights: str = Field(description="hash of the content of the model folder, which may be moved")
    engine: Literal["transformers", "vllm"] = "transformers"
    template: str = TEMPLATE
    temperature: float = Field(default=0.6, ge=0)
    top_p: float = Field(default=0.95, gt=0, le=1)
    max_new_tokens: int = Field(default=8192, ge=1)
    seed: int = Field(default=0, ge=0)

    @field_validator("template")
    @classmethod
    def _has_a_place(cls, template: str) -> str:
        if PLACEHOLDER not in template:
            raise ValueError(f"template={template!r} has no {PLACEHOLDER}; write it where the problem goes")
        return template


@dataclass(frozen=True)
class Problem:
    """A problem of a benchmark.

    Attributes:
        benchmark: name of the benchmark.
        key: hash of the problem and its answer.
        prompt: the prompt (before the chat template is applied) and its answer.
    """

    benchmark: str
    key: str
    prompt: Prompt


@dataclass(frozen=True)
class Sample:
    """One verified completion of a problem. `tokens` is its length in tokens; `finished` is as in `Completion`."""

    benchmark: str
    problem: str
    sample: int
    reward: float
    tokens: int
    finished: bool
    completion: str

    @property
    def place(self) -> tuple[str, str, int]:
        return self.benchmark, self.problem, self.sample


def read_benchmark(directory: Path, name: str, template: str, say: Callable[[str], None]) -> list[Problem]:
    """The problems of directory/name.jsonl. Repeated problems count once, and `say` is called with a remark about them.

    Raises ValueError if the file does not exist or has no problem, or if a line is malformed or lacks a field.
    """
    path = directory / f"{name}.jsonl"
    if not path.is_file():
        found = ", ".join(sorted(file.stem for file in directory.glob("*.jsonl"))) or "none"
        raise ValueError(f"benchmarks={name!r}: no file {path}; benchmarks in {directory}: {found}")
    problems = [_problem(row, name, template) for row in read_rows(path, PROBLEM_FIELDS)]
    if not problems:
        raise ValueError(f"{path} holds no problem; give one JSON object per line")
    different = list({problem.key: problem for problem in problems}.values())
    if len(different) < len(problems):
        say(f"{path}: {len(problems) - len(different)} of {len(problems)} problems are repeated, and count once")
    return different


def _problem(row: Row, benchmark: str, template: str) -> Problem:
    """The problem of a row. The template is applied to the prompt or, for a chat, to its last message."""
    messages = row.messages
    if messages is not None:
        role, content = messages[-1]
        messages = (*messages[:-1], (role, template.replace(PLACEHOLDER, content)))
    key = hashlib.blake2b(json.dumps([row.prompt, row.answer]).encode(), digest_size=8).hexdigest()
    return Problem(benchmark, key, Prompt(template.replace(PLACEHOLDER, row.prompt), row.answer, row.reference, messages))


def prompt_tokens(tokenizer: Any, prompt: Prompt) -> tuple[int, ...]:
    """Token ids of a prompt in the tokenizer's chat template; of the plain text if there is no template, as for base models."""
    if tokenizer.chat_template is None and prompt.messages is None:
        return tuple(tokenizer(prompt.text)["input_ids"])
    return chat_tokens(tokenizer, prompt)


def seed_of(seed: int, benchmark: str, problem: str, sample: int) -> int:
    """The seed of one sample."""
    digest = hashlib.blake2b(f"{seed}/{benchmark}/{problem}/{sample}".encode(), digest_size=SEED_BYTES)
    return int.from_bytes(digest.digest(), "big")


class SampleLog:
    """The samples in an evaluation's directory, in memory and on disk. An unfinished last line, left by a crash, is dropped.

    Raises ValueError if the directory holds samples of another configuration, or the config.json of something else, such as a
    model, or if another process is writing it.
    """

    def __init__(self, directory: Path, config: EvalConfig) -> None:
        directory.mkdir(parents=True, exist_ok=True)
        self._path = directory / SAMPLES
        if (directory / CONFIG).exists() and not self._path.exists():  # the log of an evaluation is made before its configuration
            raise ValueError(
                f"{directory} holds {CONFIG} of something else, which the evaluation would replace; "
                "give another directory with --out"
            )
        self._file = self._path.open("a+", encoding="utf-8")
        with ExitStack() as refused:  # closing the file releases its lock
            refused.callback(self._file.close)
            self.samples = self._read(directory / CONFIG, config.model_dump(mode="json"))
            refused.pop_all()

    def _read(self, path: Path, mine: dict[str, Any]) -> dict[tuple[str, str, int], Sample]:
        """Lock the file, read its samples, and cut off an unfinished line. `path` is the configuration's file, `mine` this
        configuration."""
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # the lock ends with the process, however that ends
        except BlockingIOError:
            raise ValueError(f"{path.parent} is being written by another process; wait for it or stop it") from None
        whole = self._path.read_bytes().rfind(b"\n") + 1
        if whole:
            theirs = read_object(path)
            if changed := [name for name in mine if name != "model" and mine[name] != theirs.get(name)]:
                raise ValueError(
                    f"{path.parent} holds samples that differ in {', '.join(changed)}; give another directory with --out"
                )
        read = (_sample(fields, f"{self._path}, line {n}") for n, fields in read_objects(self._path, growing=True))
        samples = {sample.place: sample for sample in read}
        write_json(path, mine)
        os.truncate(self._path, whole)
        return samples

    def add(self, sample: Sample) -> None:
        with explained(self._path, "earlier samples are kept"):
            self._file.write(json.dumps(vars(sample)) + "\n")
            self._file.flush()
        self.samples[sample.place] = sample

    def close(self) -> None:
        self._file.close()


def _sample(fields: dict[str, Any], where: str) -> Sample:
    """The sample that a line of the log records. Raises ValueError for a line that is not a sample."""
    try:
        sample = Sample(**fields)
    except TypeError:
        sample = None
    types = {"benchmark": str, "problem": str, "sample": int, "reward": float, "tokens": int, "finished": bool, "completion": str}
    if sample is None or any(type(value) is not types[name] for name, value in vars(sample).items()):
        raise ValueError(f"{where} is not a sample of an evaluation; delete the line, or give another directory with --out")
    return sample


def sample_benchmarks(
    config: EvalConfig,
    benchmarks: dict[str, list[Problem]],
    samples: int,
    log: SampleLog,
    verifier: Verifier,
    *,
    capacity: int,
    watch: Callable[[Sample], None],
) -> None:
    """Sample and verify completions until `log` has `samples` per problem.

    Args:
        verifier: a verifier of an `AnswerScorer`, with nothing under way.
        capacity: completions sampled at the same time.
        watch: called with every sample, including those that were in `log` already.

    Raises:
        ValueError: the model folder cannot be used, or the model's context is too short.
        RuntimeError: sampling or verification of a completion failed `ATTEMPTS` times.
    """
    missing = []
    for problem in (problem for problems in benchmarks.values() for problem in problems):
        for number in range(samples):
            done = log.samples.get((problem.benchmark, problem.key, number))
            if done is None:
                missing.append((problem, number))
            else:
                watch(done)
    if not missing:
        return
    tokenizer = load_tokenizer(config.model)
    tokens = {problem.key: prompt_tokens(tokenizer, problem.prompt) for problem, _ in missing}
    engine = _engine(config, tokenizer, max(map(len, tokens.values())), capacity)
    requests = [
        Request(tokens[problem.key], seed_of(config.seed, problem.benchmark, problem.key, number)) for problem, number in missing
    ]
    try:
        for index, completion, text, reward in _verified(engine, verifier, [problem.prompt for problem, _ in missing], requests):
            problem, number = missing[index]
            sample = Sample(problem.benchmark, problem.key, number, reward, len(completion.tokens), completion.finished, text)
            log.add(sample)
            watch(sample)
    finally:
        engine.close()


def _engine(config: EvalConfig, tokenizer: Any, longest: int, capacity: int) -> RolloutEngine:
    """The engine for prompts of at most `longest` tokens, in bfloat16 on a GPU and float32 on a CPU."""
    length = longest + config.max_new_tokens
    refuse_prompt(longest, config.max_new_tokens, positions_of(load_pretrained(AutoConfig, config.model)))
    dtype = "bfloat16" if torch.cuda.is_available() else "float32"
    sampling: dict[str, Any] = {
        "max_new_tokens": config.max_new_tokens,
        "capacity": capacity,
        "temperature": config.temperature,
        "top_p": config.top_p,
    }
    if config.engine == "transformers":
        return TransformersEngine(load_policy(config.model, getattr(torch, dtype))[0], tokenizer, **sampling)
    from v05.rollout.vllm_engine import VllmEngine

    return VllmEngine(config.model, tokenizer, dtype=dtype, kv_cache_gib=None, max_model_len=length, **sampling)


def _verified(
    engine: RolloutEngine, verifier: Verifier, prompts: Sequence[Prompt], requests: Sequence[Request]
) -> Iterator[tuple[int, Completion, str, float]]:
    """Yields (number of the request, completion, its text, its reward) as completions are verified.

    A request whose sampling or verification fails is tried up to `ATTEMPTS` times; then RuntimeError is raised.
    """
    waiting = deque(range(len(requests)))
    failures: Counter[int] = Counter()
    crashes: Counter[int] = Counter()
    sampling = 0
    verifying: dict[int, tuple[Completion, str]] = {}
    while waiting or sampling or verifying:
        keys = [waiting.popleft() for _ in range(min(len(waiting), engine.capacity - sampling))]
        if keys:
            engine.submit(keys, [requests[key] for key in keys])
        sampling += len(keys)
        for key, result in engine.poll(VERIFIER_GLANCE if verifying else None):
            sampling -= 1
            if isinstance(result, Failure):
                failures[key] += 1
                if failures[key] == ATTEMPTS:
                    raise RuntimeError(f"a completion failed {ATTEMPTS} times; the last error: {result.error}")
                waiting.append(key)
                continue
            verifying[key] = result, engine.decode(result)
            verifier.submit([Item(key, prompts[key], verifying[key][1])])
        for key, reward in verifier.poll(wait=not (sampling or waiting)):
            if isinstance(reward, Failure):  # a fault of the machine, not of the completion
                crashes[key] += 1
                if crashes[key] == ATTEMPTS:
                    raise RuntimeError(f"a completion could not be verified in {ATTEMPTS} attempts; the last error: {reward.error}")
                verifier.submit([Item(key, prompts[key], verifying[key][1])])
                continue
            yield key, *verifying.pop(key), reward


def pass_at_k(correct: NDArray[np.int64], samples: int, k: int) -> NDArray[np.float64]:
    """(P,) unbiased estimates of the probability that at least one of k samples is right (Chen et al. 2021, eq. 1).

    `correct` has the number of right samples, of `samples`, for each of P problems. Binomials would overflow, so a product is used.
    """
    wrong = [np.prod(1.0 - k / np.arange(samples - c + 1, samples + 1)) if samples - c >= k else 0.0 for c in correct]
    return 1.0 - np.array(wrong)


def score(benchmark: str, problems: Sequence[Problem], samples: int, log: SampleLog) -> dict[str, Any]:
    """The record of a benchmark with `samples` samples per problem: mean, pass@k for powers of two, and their intervals.

    Intervals are 95 % bootstrap intervals over problems.
    """
    found = [[log.samples[benchmark, problem.key, number] for number in range(samples)] for problem in problems]
    rewards = np.array([[sample.reward for sample in row] for row in found])
    correct = rewards.sum(1).astype(np.int64)
    record: dict[str, Any] = {"benchmark": benchmark, "problems": len(problems), "samples": samples}
    estimates = {"mean": rewards.mean(1)}
    estimates |= {f"pass@{2**i}": pass_at_k(correct, samples, 2**i) for i in range(1, samples.bit_length())}
    for name, values in estimates.items():
        record[name] = float(values.mean())
        record[f"{name}_low"], record[f"{name}_high"] = bootstrap_interval([values])
    record["tokens"] = float(np.mean([sample.tokens for row in found for sample in row]))
    record["cut_off"] = float(np.mean([not sample.finished for row in found for sample in row]))
    return record


def write_results(
    directory: Path, config: EvalConfig, benchmarks: dict[str, list[Problem]], samples: int, log: SampleLog
) -> list[dict[str, Any]]:
    """Write result.json, with one record per benchmark, and outcomes.jsonl, with the success rate of each problem for `v05
    fit-prior`."""
    records = [score(name, problems, samples, log) for name, problems in benchmarks.items()]
    rows = []
    for name, problems in benchmarks.items():
        for problem in problems:
            rate = np.mean([log.samples[name, problem.key, number].reward for number in range(samples)])
            rows.append({"policy": config.model.name, "prompt": problem.prompt.text, "score": 2 * rate - 1, "trials": samples})
    with explained(directory / OUTCOMES, "the samples are kept"):
        (directory / OUTCOMES).write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    write_json(directory / RESULT, records)
    return records
