"""Fields of a configuration set one by one, as `--set loss.clip_high=0.28` does."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from difflib import get_close_matches
from typing import Any, TypeVar, get_args, get_origin

from pydantic import BaseModel, ValidationError

from v05.messages import explained_places

Model = TypeVar("Model", bound=BaseModel)


def validated(model: type[Model], fields: Mapping[str, Any], settings: Sequence[str] = ()) -> Model:
    """The configuration of these fields, with the settings put over them in their order.

    Args:
        model: what checks the configuration.
        fields: values by name, models among them too.
        settings: "NAME=VALUE", with the field's dotted name ("task.mix.0.weight" reaches into a list) and its value as JSON or,
            where it is no JSON, as text.

    Raises:
        ValueError: names a setting that has no "=", that names no field (with close names), or whose value is refused.
        ValidationError: of pydantic, where no setting is concerned.
    """
    chosen: Any = dict(fields)
    names = {}
    for setting in settings:
        name, equals, text = setting.partition("=")
        if not equals:
            raise ValueError(f"--set {setting}: a setting is NAME=VALUE; write for example --set loss.clip_high=0.28")
        names[setting] = name
        chosen = _with(chosen, name.split("."), _value(text))
    try:
        return model.model_validate(chosen)
    except ValidationError as error:
        faults = [(_place(found["loc"], chosen), found["type"]) for found in error.errors()]
        concerned = []
        for setting, name in names.items():
            for place, kind in faults:
                # A fault concerns a setting at its place, above it or below it; one of the whole configuration concerns all.
                if all(a == b for a, b in zip(name.split("."), place, strict=False)):
                    if kind == "extra_forbidden":
                        raise _no_such_field(setting, max(name, ".".join(place), key=len), model) from None
                    concerned.append(f"--set {setting}")
        if not concerned:
            raise
        raise ValueError(f"{', '.join(dict.fromkeys(concerned))}: {explained_places(error)}") from None


def _place(location: Sequence[str | int], value: Any) -> list[str]:
    """The names that lead to a fault, without the kind that pydantic adds where a configuration is one of several."""
    place = []
    for i, name in enumerate(location):
        held = dict(enumerate(value)) if isinstance(value, list | tuple) else _fields(value)
        if name in held or i == len(location) - 1:  # a missing field comes last
            place.append(str(name))
            value = held.get(name)
    return place


def _fields(value: Any) -> dict[Any, Any]:
    return dict(value) if isinstance(value, BaseModel | Mapping) else {}


def _value(text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return text


def _with(value: Any, names: list[str], new: Any) -> Any:
    """The value, with `new` where the names lead; pydantic refuses names that lead nowhere."""
    if not names:
        return new
    first, *rest = names
    if isinstance(value, list | tuple) and first in map(str, range(len(value))):
        return [_with(item, rest, new) if str(i) == first else item for i, item in enumerate(value)]
    fields = _fields(value)
    return fields | {first: _with(fields.get(first), rest, new)}


def _no_such_field(setting: str, wrong: str, model: type[BaseModel]) -> ValueError:
    """The error, with fields of the same last name elsewhere and those that are spelt alike."""
    names = dict.fromkeys(_field_names(model))
    last = wrong.rpartition(".")[2]
    close = dict.fromkeys([*(name for name in names if name.rpartition(".")[2] == last), *get_close_matches(wrong, names)])
    close.pop(wrong, None)  # a field of another kind of task
    hint = f"close names are {', '.join(close)}" if close else "config.json of a run shows all"
    return ValueError(f"--set {setting}: there is no field {wrong}; {hint}")


def _field_names(model: type[BaseModel], above: str = "") -> Iterator[str]:
    """The dotted names of all fields; a list's items are shown by its first."""
    for name, field in model.model_fields.items():
        yield above + name
        within = f"{above}{name}.0." if get_origin(field.annotation) is tuple else f"{above}{name}."
        for part in (field.annotation, *get_args(field.annotation)):
            if isinstance(part, type) and issubclass(part, BaseModel):
                yield from _field_names(part, within)
