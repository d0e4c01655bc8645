"""Setting single fields of a configuration, as `--set loss.clip_high=0.28` does."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from difflib import get_close_matches
from typing import Any, TypeVar, get_args, get_origin

from pydantic import BaseModel, ValidationError

from v05.messages import explained_places

Model = TypeVar("Model", bound=BaseModel)


def validated(model: type[Model], fields: Mapping[str, Any], settings: Sequence[str] = ()) -> Model:
    """The configuration with these fields, after the settings have replaced some of them in their order.

    Args:
        model: the pydantic model that validates the configuration.
        fields: values by name; a value may be a pydantic model.
        settings: "NAME=VALUE" texts. NAME is the field's dotted name ("task.mix.0.weight" reaches into a list). VALUE is JSON, or
            plain text if it is not valid JSON.

    Raises:
        ValueError: a setting has no "=", names no field (the message lists close names), or has an invalid value.
        ValidationError: the configuration is invalid, and no setting is the cause.
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
                # A fault is blamed on a setting of the same field, of a part of it, or of a section that holds it.
                # A fault without a place concerns the whole configuration, and is blamed on every setting.
                if all(a == b for a, b in zip(name.split("."), place, strict=False)):
                    if kind == "extra_forbidden":
                        raise _no_such_field(setting, max(name, ".".join(place), key=len), model) from None
                    concerned.append(f"--set {setting}")
        if not concerned:
            raise
        raise ValueError(f"{', '.join(dict.fromkeys(concerned))}: {explained_places(error)}") from None


def _place(location: Sequence[str | int], value: Any) -> list[str]:
    """The field names that lead to a fault, without the tag that pydantic inserts for a section that is one of several kinds."""
    place = []
    for i, name in enumerate(location):
        held = dict(enumerate(value)) if isinstance(value, list | tuple) else _fields(value)
        if name in held or i == len(location) - 1:  # a missing field is always the last name
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
    """A copy of the value with `new` in the place that the names lead to. Unknown names are added, and pydantic refuses them
    later."""
    if not names:
        return new
    first, *rest = names
    if isinstance(value, list | tuple) and first in map(str, range(len(value))):
        return [_with(item, rest, new) if str(i) == first else item for i, item in enumerate(value)]
    fields = _fields(value)
    return fields | {first: _with(fields.get(first), rest, new)}


def _no_such_field(setting: str, wrong: str, model: type[BaseModel]) -> ValueError:
    """The error for an unknown field. It suggests fields with the same last name, and fields that are spelt alike."""
    names = dict.fromkeys(_field_names(model))
    last = wrong.rpartition(".")[2]
    close = dict.fromkeys([*(name for name in names if name.rpartition(".")[2] == last), *get_close_matches(wrong, names)])
    close.pop(wrong, None)  # the field exists, but in another kind of task
    hint = f"close names are {', '.join(close)}" if close else "the config.json of a run shows all fields"
    return ValueError(f"--set {setting}: there is no field {wrong}; {hint}")


def _field_names(model: type[BaseModel], above: str = "") -> Iterator[str]:
    """The dotted names of all fields. The items of a list appear as item 0."""
    for name, field in model.model_fields.items():
        yield above + name
        within = f"{above}{name}.0." if get_origin(field.annotation) is tuple else f"{above}{name}."
        for part in (field.annotation, *get_args(field.annotation)):
            if isinstance(part, type) and issubclass(part, BaseModel):
                yield from _field_names(part, within)
