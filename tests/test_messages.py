"""Text from outside cannot control a terminal when it is shown in a message."""

from typing import Literal

import pytest
from pydantic import BaseModel, Field, ValidationError

from v05.messages import explained_places, printable, quoted


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("plain é \N{GRINNING FACE}\n\tindented", "plain é \N{GRINNING FACE}\n\tindented"),
        ("\x1b[31mred\x1b[0m", "red"),
        ("\x1b]0;title\x07", "\\x1b]0;title\\x07"),
        ("over\rwritten", "over\\rwritten"),
        ("\x9b2J\x7f\x00", "\\x9b2J\\x7f\\x00"),
        ("\u202etxt.exe\u2028", "\\u202etxt.exe\\u2028"),
        ("\ud800", "\\ud800"),
    ],
)
def test_what_drives_a_terminal_is_shown_instead(text, shown):
    assert printable(text) == shown
    assert printable(text).encode()


def test_a_quotation_is_one_short_line():
    assert quoted(b" <html>\n  <body>\xff\x1b[2J ") == "<html> <body>\N{REPLACEMENT CHARACTER}"
    assert len(quoted(b"a" * 10_000_000)) == 500


class Round(BaseModel):
    kind: Literal["round"]


class Square(BaseModel):
    kind: Literal["square"]


class Thing(BaseModel):
    name: str
    sizes: list[int]
    colour: Literal["red", "green", "blue"] = "red"
    shape: Round | Square = Field(default=Round(kind="round"), discriminator="kind")


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ({"sizes": [1]}, "name: Field required"),
        ({"name": "a", "sizes": ["b" * 1000]}, f"sizes.0={'b' * 79!r}"[:-1] + "...: Input should be a valid integer"),
        ({"name": "a", "sizes": ["b"] * 10}, "and 6 more"),
        ([], "Input should be a valid dictionary or instance of Thing"),
        ({"name": "a", "sizes": [], "colour": "pink"}, "colour='pink' is unknown; choose one of red, green, blue"),
        ({"name": "a", "sizes": [], "colour": 3}, "colour=3 is unknown; choose one of red, green, blue"),
        ({"name": "a", "sizes": [], "shape": {"kind": "oval"}}, "shape.kind='oval' is unknown; choose one of round, square"),
    ],
)
def test_faults_are_told_in_one_short_line(given, told):
    with pytest.raises(ValidationError) as refused:
        Thing.model_validate(given)
    assert told in explained_places(refused.value)
    assert "\n" not in explained_places(refused.value)
    assert len(explained_places(refused.value)) < 1000
