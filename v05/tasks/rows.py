"""Rows of a JSON-lines file of prompts and answers, under the names that published data sets give their fields."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from v05.files import read_objects
from v05.tasks.answers import Answer, answer_text, read_answer
from v05.tasks.statements import is_marked

TRAINING_FIELDS = ("prompt", "problem", "question")
PROBLEM_FIELDS = ("problem", "question", "prompt")
ANSWER_FIELDS = ("answer", "final_answer", "solution")
BODY = "body"  # stands before the question in asdiv and svamp

Messages = tuple[tuple[str, str], ...]


@dataclass(frozen=True)
class Row:
    """A prompt and its answer.

    Attributes:
        where: its file and line, to a person.
        prompt: its text; that of all messages if it is a chat.
        messages: (role, content) of a chat, else None.
        answer: as it stands in the file.
        reference: what that answer says.
    """

    where: str
    prompt: str
    messages: Messages | None
    answer: str
    reference: Answer


def read_rows(path: Path, prompt_fields: Sequence[str]) -> Iterator[Row]:
    """The rows of a file, as a stream.

    Args:
        path: one JSON object a line. Letter case of field names does not matter.
        prompt_fields: names under which a prompt may stand; the first that a row has counts. Of answers, `ANSWER_FIELDS`.

    Raises ValueError that names file and line: see `v05.files.read_objects`; a field is missing, or holds what it cannot.
    """
    for number, fields in read_objects(path):
        yield read_row(fields, f"{path}, line {number}", prompt_fields)


def read_row(fields: dict[str, Any], where: str, prompt_fields: Sequence[str]) -> Row:
    """The row that the fields of a line make."""
    fields = {str(name).lower(): value for name, value in fields.items()}
    name, value = _field(fields, prompt_fields, where)
    messages = _messages(value, f"{where}: {name}") if isinstance(value, list) else None
    if messages is not None:
        prompt = "\n\n".join(content for _, content in messages)
    elif isinstance(value, str | int | float):
        prompt = str(value)
    else:
        raise ValueError(f"{where}: {name}={value!r} is neither text nor a list of messages; give one")
    if name == "question" and isinstance(fields.get(BODY), str):
        prompt = f"{fields[BODY].strip()} {prompt}"
    name, value = _field(fields, ANSWER_FIELDS, where)
    if name == "solution" and not (isinstance(value, str) and is_marked(value)):
        raise ValueError(f"{where}: the solution marks no answer; put it into \\boxed{{}}, or give it in a field answer")
    try:
        return Row(where, prompt, messages, answer_text(value), read_answer(value))
    except ValueError as error:
        raise ValueError(f"{where}: {name}: {error}") from None


def _field(fields: dict[str, Any], names: Sequence[str], where: str) -> tuple[str, Any]:
    """The first of these fields that has a value, and the value."""
    name = next((name for name in names if fields.get(name) not in (None, "", [])), None)
    if name is None and (empty := [name for name in names if name in fields]):
        raise ValueError(f"{where}: {empty[0]} is empty; give it a value")
    if name is None:
        raise ValueError(f"{where}: none of {', '.join(names)} among its fields {', '.join(fields) or '(none)'}; rename one")
    return name, fields[name]


def _messages(value: list[Any], where: str) -> Messages:
    """A chat, whose contents may be texts or lists of {"type": "text", "text": ...}."""
    messages = []
    for message in value:
        role, content = (message.get("role"), message.get("content")) if isinstance(message, dict) else (None, None)
        if isinstance(content, list) and all(isinstance(part, dict) and isinstance(part.get("text"), str) for part in content):
            content = "".join(part["text"] for part in content)
        if not isinstance(role, str) or not isinstance(content, str):
            raise ValueError(f'{where}: {message!r} is no message; give {{"role": ..., "content": text}}')
        messages.append((role, content))
    return tuple(messages)
