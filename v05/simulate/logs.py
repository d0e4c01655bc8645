"""The kinds of logs that can be read. A log's kind is recognised by its columns; each kind turns rows into outcomes.

In a training log the policy changes with every step, so each step counts as a model, and a prompt's text is the question. The
columns of verl, TRL, SkyRL, prime-rl and verifiers are those in their sources of August 2026; earlier columns of prime-rl are known
too.
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

EVAL_SAMPLES, EVAL_CONFIG = "samples.jsonl", "config.json"  # files in a folder of v05 eval
TRL = "completions of TRL"
STEP = re.compile(r"step[_-]?(\d+)")  # in a path: prime-rl's step_12, SkyRL's global_step_12_evals
# Numeric columns of TRL's tables that are not rewards. The unnamed ones are index columns.
NO_REWARDS = ("step", "epoch", "advantage", "advantages", "index", "", "unnamed: 0", "__index_level_0__")


class Outcome(NamedTuple):
    """The outcome in a row. For a rollout, `successes` is its reward in the log's scale; `trials` is 0 if it was not scored."""

    model: str
    question: str
    successes: float
    trials: float


class LogFile:
    """A file at or below `root`, the path that the user named. Its path may give the step and the run of its rows."""

    def __init__(self, path: Path, root: Path) -> None:
        self.path = path
        parts = path.relative_to(root).parts if root.is_dir() else (path.name,)
        named = [(place, found[1]) for place, part in enumerate(parts) if (found := STEP.search(part))]
        place, self._step = named[-1] if named else (len(parts) - 1, path.stem)
        self._run = parts[:place]

    def policy(self, step: Any) -> str:
        """The policy of a row with this step. Without a step in the row, the path's step or else the file's name counts."""
        return _name(*self._run, self._step if step in (None, "") else step)

    @cached_property
    def evaluated(self) -> str:
        """The model of a v05 eval folder, named by all of its settings except the seed."""
        config = self.path.with_name(EVAL_CONFIG)
        return _name({**read_object(config), "seed": None}) if config.exists() else _name(*self._run)


Reader: TypeAlias = "Callable[[Row, LogFile, str | None], Iterator[Outcome]]"  # the third argument is the user's reward column


@dataclass(frozen=True)
class Log:
    """A kind of log.

    Attributes:
        name: the name for messages.
        columns: the columns that the kind is recognised by.
        outcomes: the function that turns a row into outcomes.
        numbers: the columns that must hold numbers, for the error message.
        rewards: True if a row is a rollout with a reward, False if a row counts successes.
    """

    name: str
    columns: tuple[str, ...]
    outcomes: Reader
    numbers: tuple[str, ...] = ()
    rewards: bool = True


def _name(*parts: Any) -> str:
    """A text that identifies the parts."""
    if len(parts) == 1 and isinstance(parts[0], str):
        return parts[0]
    return json.dumps(parts, sort_keys=True, ensure_ascii=False, default=str)


def _value(reward: Any) -> float | None:
    """A reward as one number, or None if the rollout was not scored. Rewards by token or by name are summed with their weights."""
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
    """A row of the format that `v05 fit-prior` reads, with the mean reward in [-1, 1]."""
    v = row.values
    trials = number(v["trials"])
    successes = (number(v["score"]) + 1) / 2 * trials
    whole = round(successes) if isfinite(successes) else 0
    yield Outcome(_name(v["policy"]), _name(v["prompt"]), whole if isclose(whole, successes, abs_tol=1e-6) else successes, trials)


def _sample(row: Row, file: LogFile, reward: str | None) -> Iterator[Outcome]:
    v = row.values
    yield _rollout(file.evaluated, _name(v["benchmark"], v["problem"]), v.get(reward or "reward"))


def _rollouts(question: tuple[str, ...], rewards: str, error: str = "") -> Reader:
    """A reader of rows that are one rollout each.

    Args:
        question: the columns that identify the question.
        rewards: the column of rewards.
        error: a column that is true if the rollout failed because of its environment. Such a rollout has no reward.
    """

    def outcomes(row: Row, file: LogFile, reward: str | None) -> Iterator[Outcome]:
        v = row.values
        named = _name(*(v.get(name) for name in question))
        yield _rollout(file.policy(v.get("step")), named, None if v.get(error) else v.get(reward or rewards))

    return outcomes


def _trl(row: Row, file: LogFile, reward: str | None) -> Iterator[Outcome]:
    """A row of TRL's tables, which have a column for each reward function. The column is empty if the function gave no reward."""
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
    """An episode of prime-rl or verifiers. It has a trace for each agent; only the traces of trainable agents count."""
    v = row.values
    step = v.get("run", {}).get("work", {}).get("step")
    environment = v.get("env", {})
    trained = [trace for trace in v["traces"] if trace.get("agent", {}).get("trainable", True)]
    for trace in trained if v.get("ok", True) else []:
        yield _trace(trace, file.policy(step), environment.get("name") or environment.get("id"), reward)
    if not (trained and v.get("ok", True)):
        yield Outcome(file.policy(step), "", 0, 0)


def _lone_trace(row: Row, file: LogFile, reward: str | None) -> Iterator[Outcome]:
    """A row of prime-rl as of July 2026, which logged traces without episodes."""
    v = row.values
    yield _trace(v, file.policy(v.get("policy_version")), v.get("env_name"), reward)


def _trace(trace: dict[str, Any], policy: str, environment: str | None, reward: str | None) -> Outcome:
    task = trace["task"]
    question = task if isinstance(task, str) else task.get("key") or task.get("hash") or task.get("data", task)
    rewards = trace["rewards"]
    if reward is not None:
        rewards = {column(name): value for name, value in {**trace.get("metrics", {}), **rewards}.items()}.get(reward)
        rewards = rewards.get("score") if isinstance(rewards, dict) else rewards  # a named reward counts without its weight
    return _rollout(policy, _name(environment, question), rewards if trace.get("ok", not trace.get("errors")) else None)


def columns_of_numbers(row: Row, besides: Collection[str]) -> list[str]:
    """The columns of a row that hold numbers, without those in `besides`. Text counts as a number only if all values are text."""
    text = all(isinstance(value, str) for value in row.values.values())
    found = []
    for name, value in row.values.items():
        with suppress(NotANumberError):
            if name not in besides and (text or not isinstance(value, str)) and not isnan(number(value)):
                found.append(name)
    return found


# A file is of the first kind whose columns it has.
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
    """The first kind of log whose columns are among these, or None."""
    return next((log for log in LOGS if set(log.columns) <= set(columns)), None)


def unknown_log(path: Path, columns: Collection[str]) -> str:
    """An error message that names the columns a file lacks for the most similar kind of log."""
    likeliest = max(LOGS, key=lambda log: len(set(log.columns) & set(columns)))
    missing = [name for name in likeliest.columns if name not in columns]
    return (
        f"{path} has no column {', '.join(missing)}; it has {listed(columns) or 'no header'}. "
        "v05 simulate --help names the logs that it reads"
    )


def log_files(directory: Path) -> tuple[list[Path], list[Path]]:
    """The files below a directory that may be logs, and the files to leave out, both in the order of the numbers in their paths.

    Files are left out if they repeat other files, or if they hold evaluations and other files hold training rollouts.
    """
    files = [path for path in directory.rglob("*") if path.suffix in SUFFIXES and path.is_file()]
    files = [path for path in files if not any(part.startswith(".") for part in path.relative_to(directory).parts)]
    files.sort(key=lambda path: [(int(part), "") if part.isdecimal() else (-1, part) for part in re.split(r"(\d+)", str(path))])
    left_out = {path for path in files if _repeats(path)}
    training = {path for path in files if _kind(path, directory) == "train"} - left_out
    if training:
        left_out |= {path for path in files if _kind(path, directory) == "eval"}
    return [path for path in files if path not in left_out], [path for path in files if path in left_out]


def _repeats(path: Path) -> bool:
    """Whether another file holds the same rollouts.

    In v05 eval, samples.jsonl holds those of the other files; in prime-rl, the folder `all` holds those of `effective`.
    """
    if path.parent.name == "effective":
        return (path.parent.with_name("all") / path.name).exists()
    return path.name != EVAL_SAMPLES and path.with_name(EVAL_SAMPLES).exists()


def _kind(path: Path, root: Path) -> str:
    """Returns "train" or "eval" if the file's name or one of its folders begins with it, as in prime-rl, and else an empty text."""
    words = [re.split(r"[_.]", part)[0] for part in path.relative_to(root).parts]
    return next((word for word in reversed(words) if word in ("train", "eval")), "")
