"""Logs that are read: whose they are is told by their columns, and what their rows say of a policy and a question.

In a log of training the policy changes with the step, and so a step counts as a model of its own, a prompt's text as a question.
The columns of verl, TRL, SkyRL, prime-rl and verifiers are those of their sources in August 2026, and prime-rl's earlier ones.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Collection, Iterator
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from math import isclose, isfinite, isnan
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

from v05.files import read_object
from v05.simulate.tables import SUFFIXES, NotANumberError, Row, column, listed, number

EVAL_SAMPLES, EVAL_CONFIG = "samples.jsonl", "config.json"  # of a folder of v05 eval
TRL = "completions of TRL"
STEP = re.compile(r"step[_-]?(\d+)")  # in a path: prime-rl's step_12, SkyRL's global_step_12_evals
# Columns of TRL's tables that are numbers and no rewards; the unnamed ones are those of an index.
NO_REWARDS = ("step", "epoch", "advantage", "advantages", "index", "", "unnamed: 0", "__index_level_0__")


class Outcome(NamedTuple):
    """What a row says. The `successes` of a rollout are its reward, in the log's scale; without trials it was not scored."""

    model: str
    question: str
    successes: float
    trials: float


class LogFile:
    """A file below `root`, which is what the user named, and what its path says of the rows."""

    def __init__(self, path: Path, root: Path) -> None:
        self.path = path
        parts = path.relative_to(root).parts if root.is_dir() else (path.name,)
        named = [(place, found[1]) for place, part in enumerate(parts) if (found := STEP.search(part))]
        place, self._step = named[-1] if named else (len(parts) - 1, path.stem)
        self._run = parts[:place]

    def policy(self, step: Any) -> str:
        """The policy of a row's step; of the path's, or of the file itself, where the row has none."""
        return _name(*self._run, self._step if step in (None, "") else step)

    @cached_property
    def evaluated(self) -> str:
        """The model that v05 eval sampled from, and how: all of its settings but the seed."""
        config = self.path.with_name(EVAL_CONFIG)
        return _name({**read_object(config), "seed": None}) if config.exists() else _name(*self._run)


Reader: TypeAlias = "Callable[[Row, LogFile, str | None], Iterator[Outcome]]"  # the last is the user's column of rewards


@dataclass(frozen=True)
class Log:
    """A kind of log.

    Attributes:
        name: whose it is, for the user.
        columns: that it has, and by which it is known.
        outcomes: what a row says.
        numbers: the columns that must be numbers, for the message where they are not.
        rewards: whether a row is a rollout with a reward, or else counts successes.
    """

    name: str
    columns: tuple[str, ...]
    outcomes: Reader
    numbers: tuple[str, ...] = ()
    rewards: bool = True


def _name(*parts: Any) -> str:
    """One text for all parts."""
    if len(parts) == 1 and isinstance(parts[0], str):
        return parts[0]
    return json.dumps(parts, sort_keys=True, ensure_ascii=False, default=str)


def _value(reward: Any) -> float | None:
    """A reward as one number; None where the rollout was not scored. Rewards by token or name are added up with their weights."""
    if isinstance(reward, dict) and reward and reward.keys() <= {"score", "weight"}:
        score = _value(reward["score"])
        return None if score is None else score * number(reward.get("weight", 1))
    if isinstance(reward, list | dict):
        values = [_value(part) for part in (reward.values() if isinstance(reward, dict) else reward)]
        scored = [value for value in values if value is not None]
        return sum(scored) if scored else None
    value = None if reward in (None, "") else number(reward)
    return None if value is None or isnan(value) else value


def _rollout(model: str, question: str, reward: Any) -> Outcome:
    value = _value(reward)
    return Outcome(model, question, 0, 0) if value is None else Outcome(model, question, value, 1)


def _counts(row: Row, file: LogFile, reward: str | None) -> Iterator[Outcome]:
    v = row.values
    yield Outcome(_name(v["model"]), _name(v["question"]), number(v["successes"]), number(v["trials"]))


def _mean_rewards(row: Row, file: LogFile, reward: str | None) -> Iterator[Outcome]:
    """What `v05 fit-prior` reads; the mean reward is in [-1, 1]."""
    v = row.values
    trials = number(v["trials"])
    successes = (number(v["score"]) + 1) / 2 * trials
    whole = round(successes) if isfinite(successes) else 0
    yield Outcome(_name(v["policy"]), _name(v["prompt"]), whole if isclose(whole, successes, abs_tol=1e-6) else successes, trials)


def _sample(row: Row, file: LogFile, reward: str | None) -> Iterator[Outcome]:
    v = row.values
    yield _rollout(file.evaluated, _name(v["benchmark"], v["problem"]), v.get(reward or "reward"))


def _rollouts(question: tuple[str, ...], rewards: str, error: str = "") -> Reader:
    """Of rows that are a rollout each: the columns that say which question it was of, the column of rewards, and the column that
    says whether the rollout failed for reasons of its environment."""

    def outcomes(row: Row, file: LogFile, reward: str | None) -> Iterator[Outcome]:
        v = row.values
        named = _name(*(v.get(name) for name in question))
        yield _rollout(file.policy(v.get("step")), named, None if v.get(error) else v.get(reward or rewards))

    return outcomes


def _trl(row: Row, file: LogFile, reward: str | None) -> Iterator[Outcome]:
    """TRL has a column for each reward function, under its name; a function that says nothing of a row leaves it empty."""
    v = row.values
    if reward is None:
        found = [name for name in ("reward", "rewards") if name in v] or columns_of_numbers(
            row, ("prompt", "completion", *NO_REWARDS)
        )
        if len(found) > 1:
            raise ValueError(f"{row.place} has numbers in the columns {listed(found)}; name the one to count with --reward")
        reward = found[0] if found else ""
    yield _rollout(file.policy(v.get("step")), _name(v["prompt"]), v.get(reward))


def _episode(row: Row, file: LogFile, reward: str | None) -> Iterator[Outcome]:
    """prime-rl and verifiers: an episode has a trace for each of its agents, of which some are trained."""
    v = row.values
    step = v.get("run", {}).get("work", {}).get("step")
    environment = v.get("env", {})
    trained = [trace for trace in v["traces"] if trace.get("agent", {}).get("trainable", True)]
    for trace in trained if v.get("ok", True) else []:
        yield _trace(trace, file.policy(step), environment.get("name") or environment.get("id"), reward)
    if not (trained and v.get("ok", True)):
        yield Outcome(file.policy(step), "", 0, 0)


def _lone_trace(row: Row, file: LogFile, reward: str | None) -> Iterator[Outcome]:
    """prime-rl of July 2026: no episode is around the trace."""
    v = row.values
    yield _trace(v, file.policy(v.get("policy_version")), v.get("env_name"), reward)


def _trace(trace: dict[str, Any], policy: str, environment: str | None, reward: str | None) -> Outcome:
    task = trace["task"]
    question = task if isinstance(task, str) else task.get("key") or task.get("hash") or task.get("data", task)
    rewards = trace["rewards"]
    if reward is not None:
        rewards = {column(name): value for name, value in {**trace.get("metrics", {}), **rewards}.items()}.get(reward)
        rewards = rewards.get("score") if isinstance(rewards, dict) else rewards  # whatever weight it has in the sum
    return _rollout(policy, _name(environment, question), rewards if trace.get("ok", not trace.get("errors")) else None)


def columns_of_numbers(row: Row, besides: Collection[str]) -> list[str]:
    """The columns of a row that hold numbers, but for those `besides`. Text may be a number in a CSV file, where all is text."""
    text = all(isinstance(value, str) for value in row.values.values())
    found = []
    for name, value in row.values.items():
        with suppress(NotANumberError):
            if name not in besides and (text or not isinstance(value, str)) and not isnan(number(value)):
                found.append(name)
    return found


# The first whose columns a file has.
LOGS = (
    Log("counts", ("model", "question", "successes", "trials"), _counts, ("successes", "trials"), rewards=False),
    Log("samples of v05 eval", ("benchmark", "problem", "sample", "reward"), _sample, ("reward",)),
    Log("outcomes of v05", ("policy", "prompt", "score", "trials"), _mean_rewards, ("score", "trials"), rewards=False),
    Log("rollouts of verl", ("input", "output"), _rollouts(("input",), "score"), ("score",)),
    Log("evaluations of SkyRL", ("input_prompt", "output_response"), _rollouts(("input_prompt",), "score"), ("score",)),
    Log("rollouts of prime-rl", ("example_id", "reward"), _rollouts(("task", "example_id"), "reward", "error"), ("reward",)),
    Log("samples of prime-rl", ("problem_id", "reward"), _rollouts(("env_name", "problem_id"), "reward"), ("reward",)),
    Log(TRL, ("prompt", "completion"), _trl, ("reward",)),
    Log("episodes of prime-rl", ("traces", "task"), _episode),
    Log("traces of prime-rl", ("rewards", "task"), _lone_trace),
    Log("rollouts", ("prompt", "reward"), _rollouts(("prompt",), "reward"), ("reward",)),
)
KNOWN = frozenset(name for log in LOGS for name in (*log.columns, "step", "score"))


def log_of(columns: Collection[str]) -> Log | None:
    """The kind of log that has these columns."""
    return next((log for log in LOGS if set(log.columns) <= set(columns)), None)


def unknown_log(path: Path, columns: Collection[str]) -> str:
    """What a file has not that the likeliest kind of log has."""
    likeliest = max(LOGS, key=lambda log: len(set(log.columns) & set(columns)))
    missing = [name for name in likeliest.columns if name not in columns]
    return (
        f"{path} has no column {', '.join(missing)}; it has {listed(columns) or 'no header'}. "
        "v05 simulate --help names the logs that it reads"
    )


def log_files(directory: Path) -> tuple[list[Path], list[Path]]:
    """The files below a directory that may be logs, in the order of the numbers in their paths; and those that are left out because
    they repeat others, or hold evaluations beside training."""
    files = [path for path in directory.rglob("*") if path.suffix in SUFFIXES and path.is_file()]
    files = [path for path in files if not any(part.startswith(".") for part in path.relative_to(directory).parts)]
    files.sort(key=lambda path: [(int(part), "") if part.isdecimal() else (-1, part) for part in re.split(r"(\d+)", str(path))])
    left_out = {path for path in files if _repeats(path)}
    training = {path for path in files if _kind(path, directory) == "train"} - left_out
    if training:
        left_out |= {path for path in files if _kind(path, directory) == "eval"}
    return [path for path in files if path not in left_out], [path for path in files if path in left_out]


def _repeats(path: Path) -> bool:
    """Whether another file has these rollouts: samples.jsonl those of outcomes.jsonl, in prime-rl `all` those of `effective`."""
    if path.parent.name == "effective":
        return (path.parent.with_name("all") / path.name).exists()
    return path.name != EVAL_SAMPLES and path.with_name(EVAL_SAMPLES).exists()


def _kind(path: Path, root: Path) -> str:
    """What the file's name or its folder begins with, as prime-rl's do: train or eval."""
    words = [re.split(r"[_.]", part)[0] for part in path.relative_to(root).parts]
    return next((word for word in reversed(words) if word in ("train", "eval")), "")
