"""Finds and reads runs, and groups those that differ only in their seed."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from v05.files import read_object
from v05.messages import explained_places
from v05.methods import METHODS, find_method
from v05.train.compare import Run
from v05.train.config import BudgetConfig, RunConfig
from v05.train.identity import with_contents
from v05.train.metrics import CONFIG, METRICS, RESULT, read_inputs, read_metrics, read_result
from v05.train.presets import label_of

SETTING = ("task", "policy", "evaluation")  # accuracies can be compared if these sections of the configuration agree
MOST_TOLD = 60  # characters of a setting's name
MOST_NAMED = 8  # damaged runs in a message
DIGEST_SHOWN = 12  # characters of a digest
NOT_EVALUATED = "no evaluation yet"

Track = Callable[[Sequence[Path]], Iterable[Path]]


class Used(BaseModel):
    """The parts of a configuration that the page uses, whichever version of v05 wrote it."""

    model_config = ConfigDict(strict=True, allow_inf_nan=False)


class UsedBudget(Used):
    initial: Annotated[int, Field(ge=1)]
    maximum: Annotated[int, Field(ge=1)]


class UsedSource(Used):
    dataset: str


class UsedTask(Used):
    mix: Annotated[list[UsedSource], Field(min_length=1)] | None = None
    path: str | None = None

    def name(self) -> str:
        sources = [source.dataset for source in self.mix] if self.mix else [Path(self.path).stem if self.path else "task"]
        return " + ".join(dict.fromkeys(sources))


class UsedSettings(Used):
    method: str
    seed: Annotated[int, Field(ge=0)]
    total_rollouts: Annotated[int, Field(ge=1)]
    task: UsedTask
    budget: UsedBudget


@dataclass(frozen=True)
class Recorded:
    """A run directory, finished or not.

    Attributes:
        name: unique name of the run on the page.
        task: name of the source of its prompts.
        settings: its config.json, with a digest of the content in place of each path. A configuration of an earlier version of v05
            need not be valid any more.
        finished: whether the run has a result.
        run: its records, as in a comparison. The result of an unfinished run is made from its last evaluation.
        samples: its records of kind "group".
    """

    name: str
    task: str
    settings: dict[str, Any]
    finished: bool
    run: Run
    samples: list[dict[str, Any]]


@dataclass(frozen=True)
class Seeds:
    """Runs that differ only in their seed. All are finished or, if none is finished, all are unfinished.

    Attributes:
        name: the label and, if other groups have the same label, the settings that differ.
        setting: name of task, policy and evaluation. Accuracies can be compared only within one setting.
    """

    name: str
    method: str
    setting: str
    finished: bool
    runs: list[Recorded]

    @property
    def records(self) -> list[Run]:
        return [recorded.run for recorded in self.runs]


def find_runs(places: Sequence[Path]) -> list[Path]:
    """The run directories among and below `places`, each once. Raises ValueError for a place that has none."""
    found: dict[Path, Path] = {}
    for place in places:
        if (place / METRICS).is_file():
            inside = [place]
        else:
            inside = sorted(file.parent for file in place.rglob(METRICS) if (file.parent / CONFIG).is_file())
        if not inside:
            raise ValueError(
                f"RUN_DIR={place} holds no run (a directory with {CONFIG} and {METRICS}); name one that v05 train wrote"
            )
        found |= {directory.resolve(): directory for directory in inside}
    return list(found.values())


def read_runs(directories: Sequence[Path], track: Track) -> tuple[list[Recorded], dict[str, str]]:
    """(runs that can be shown, name -> reason for each run that is left out).

    A run is left out if it has not been evaluated yet, or if a file of it is damaged. Raises ValueError if no run can be shown.
    """
    runs: list[Recorded] = []
    left_out: dict[str, str] = {}
    for directory, name in zip(track(directories), names_of(directories), strict=True):
        try:
            recorded = read_run(directory, name)
        except (OSError, ValueError) as error:
            left_out[name] = str(error)
            continue
        if recorded is None:
            left_out[name] = NOT_EVALUATED
        else:
            runs.append(recorded)
    damaged = [why for why in left_out.values() if why != NOT_EVALUATED]
    if not runs and damaged:
        more = f"; and {len(damaged) - MOST_NAMED} more" if len(damaged) > MOST_NAMED else ""
        raise ValueError(f"RUN_DIR: no run can be shown: {'; '.join(damaged[:MOST_NAMED])}{more}")
    if not runs:
        raise ValueError(
            f"RUN_DIR: none of {', '.join(left_out)} has been evaluated yet; "
            "wait for the first evaluation, or see the output of v05 train if the run has failed"
        )
    return runs, left_out


def read_run(directory: Path, name: str) -> Recorded | None:
    """The run in `directory`; None before its first evaluation. Raises ValueError or OSError, naming the file, if one is
    damaged."""
    settings = read_object(directory / CONFIG)
    try:
        budget = BudgetConfig.model_construct(**settings["budget"])
        method, prior = find_method(settings["method"]).name, settings.get("prior", "history")
        label = label_of(RunConfig.model_construct(method=method, budget=budget, prior=prior))
        used = UsedSettings.model_validate(settings)
    except (ValueError, KeyError, TypeError) as error:
        told = explained_places(error) if isinstance(error, ValidationError) else repr(error)
        raise ValueError(f"{directory / CONFIG} is not the configuration of a run ({told}); leave the directory out") from error
    by_kind: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for record in read_metrics(directory):
        by_kind[record["kind"]].append(record)
    evaluations, steps = by_kind["evaluation"], by_kind["step"]
    finished = (directory / RESULT).is_file()
    result = read_result(directory) if finished else {}
    if not evaluations:
        return None
    result = result or unfinished_result(settings, evaluations, steps)
    contents = {setting: str(digest)[:DIGEST_SHOWN] for setting, digest in read_inputs(directory).items()}
    run = Run(label, result, evaluations, steps, by_kind["probe"])
    return Recorded(name, used.task.name(), with_contents(settings, contents), finished, run, by_kind["group"])


def unfinished_result(settings: dict[str, Any], evaluations: list[dict[str, Any]], steps: list[dict[str, Any]]) -> dict[str, Any]:
    """The result that the run would have if it ended now, without the successes of each prompt."""
    last = steps[-1] if steps else {"rollouts": 0, "seconds": 0.0}
    return {
        "method": settings["method"],
        "seed": settings["seed"],
        "accuracy_before": evaluations[0]["accuracy"],
        "accuracy_after": evaluations[-1]["accuracy"],
        "rollouts": last["rollouts"],
        "steps": len(steps),
        "seconds": last["seconds"],
    }


def names_of(directories: Sequence[Path]) -> list[str]:
    """A name for each directory: the shortest end of its path that no other directory has."""
    parts = [directory.resolve().parts for directory in directories]
    names = []
    for mine in parts:
        length = next(n for n in range(1, len(mine) + 1) if sum(other[-n:] == mine[-n:] for other in parts) == 1)
        names.append("/".join(mine[-length:]))
    return names


def seeds_of(runs: Sequence[Recorded]) -> list[Seeds]:
    """The runs, grouped with other seeds of the same settings, in the order of the methods.

    Unfinished runs of a group are left out if the group has finished ones.
    """
    names = setting_names(runs)
    by_settings: dict[str, list[Recorded]] = defaultdict(list)
    for recorded in runs:
        by_settings[json.dumps(flattened(recorded.settings | {"seed": 0}), sort_keys=True)].append(recorded)
    groups = []
    for same in by_settings.values():
        # Repetitions of a seed count once; a finished one is preferred.
        same = list({recorded.run.result["seed"]: recorded for recorded in sorted(same, key=lambda r: r.finished)}.values())
        finished = [recorded for recorded in same if recorded.finished]
        first, setting = same[0], names[setting_key(same[0])]
        rivals = [
            other[0].settings
            for other in by_settings.values()
            if other[0].run.label == first.run.label and names[setting_key(other[0])] == setting
        ]
        name = first.run.label + distinction(first.settings, rivals)
        groups.append(Seeds(name, first.settings["method"], setting, bool(finished), finished or same))
    order = list(METHODS)
    return sorted(groups, key=lambda group: (group.setting, order.index(group.method), budget_of(group)))


def budget_of(group: Seeds) -> tuple[int, int, str]:
    budget = group.runs[0].settings["budget"]
    return budget["initial"], budget["maximum"], group.name


def setting_key(recorded: Recorded) -> str:
    """A key that is equal for runs whose accuracies can be compared."""
    return json.dumps([recorded.settings.get(name) for name in SETTING], sort_keys=True)


def setting_names(runs: Sequence[Recorded]) -> dict[str, str]:
    """A readable name for each setting: its task and, if several settings share it, what differs or, if that is long, a number."""
    alike: dict[str, dict[str, dict[str, Any]]] = defaultdict(dict)  # name of the task -> settings that share it
    for recorded in runs:
        alike[recorded.task][setting_key(recorded)] = {name: recorded.settings.get(name) for name in SETTING}
    names = {}
    for name, settings in alike.items():
        for number, (key, mine) in enumerate(settings.items(), 1):
            told = distinction(mine, list(settings.values()))
            names[key] = name + (told if len(told) <= MOST_TOLD else f" #{number}")
    return names


def distinction(settings: dict[str, Any], rivals: Sequence[dict[str, Any]]) -> str:
    """The settings, except the seed, that differ from those of the `rivals`, as text in brackets; empty if nothing differs."""
    flat = [flattened(rival) for rival in rivals]
    mine = flattened(settings)
    differing = [name for name in mine if name != "seed" and any(other.get(name) != mine[name] for other in flat)]
    told = ", ".join(f"{name.rpartition('.')[2]} {mine[name]}" for name in differing)
    return f" ({told})" if told else ""


def flattened(settings: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested settings as one dictionary by dotted name."""
    flat: dict[str, Any] = {}
    for name, value in settings.items():
        flat |= flattened(value, f"{prefix}{name}.") if isinstance(value, dict) else {f"{prefix}{name}": value}
    return flat
