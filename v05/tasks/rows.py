"""Reads prompts and answers from the rows of a JSON-lines file, under the field names of published data sets."""

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
BODY = "body"  # in asdiv and svamp: text that precedes the question

Messages = tuple[tuple[str, str], ...]


@dataclass(frozen=True)
class Row:
    """A prompt and its answer.

    Attributes:
        where: the file and line, for messages.
        prompt: the text of the prompt, or the joined texts of a chat's messages.
        messages: the (role, content) pairs of a chat, else None.
        answer: the text of the answer in the file.
        reference: the answer as read.
    """

    where: str
    prompt: str
    messages: Messages | None
    answer: str
    reference: Answer


def read_rows(path: Path, prompt_fields: Sequence[str]) -> Iterator[Row]:
    """A stream of the rows of a file.

    Args:
        path: a file with one JSON object per line. The letter case of field names does not matter.
        prompt_fields: the possible names of the prompt's field. The first one with a value counts. For answers these are
            `ANSWER_FIELDS`.

    Raises:
        ValueError: a field is missing or has an invalid value, or `v05.files.read_objects` fails. The message names file and line.
    """
    for number, fields in read_objects(path):
        yield read_row(fields, f"{path}, line {number}", prompt_fields)


def read_row(fields: dict[str, Any], where: str, prompt_fields: Sequence[str]) -> Row:
    """The row of a line's fields. `where` is the file and line, for messages."""
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
        raise ValueError(f"{where}: the solution marks no answer; put the answer into \\boxed{{}}, or give it in a field answer")
    try:
        return Row(where, prompt, messages, answer_text(value), read_answer(value))
    except ValueError as error:
        raise ValueError(f"{where}: {name}: {error}") from None


def _field(fields: dict[str, Any], names: Sequence[str], where: str) -> tuple[str, Any]:
    """The name and value of the first of these fields that has a value."""
    name = next((name for name in names if fields.get(name) not in (None, "", [])), None)
    if name is None and (empty := [name for name in names if name in fields]):
        raise ValueError(f"{where}: {empty[0]} is empty; give it a value")
    if name is None:
        raise ValueError(f"{where}: none of {', '.join(names)} is among the fields {', '.join(fields) or '(none)'}; rename one")
    return name, fields[name]


def _messages(value: list[Any], where: str) -> Messages:
    """The messages of a chat. Their contents may be texts or lists of {"type": "text", "text": ...}."""
    messages = []
    for message in value:
        role, content = (message.get("role"), message.get("content")) if isinstance(message, dict) else (None, None)
        if isinstance(content, list) and all(isinstance(part, dict) and isinstance(part.get("text"), str) for part in content):
            content = "".join(part["text"] for part in content)
        if not isinstance(role, str) or not isinstance(content, str):
            raise ValueError(f'{where}: {message!r} is not a message; give {{"role": ..., "content": text}}')
        messages.append((role, content))
    return tuple(messages)
