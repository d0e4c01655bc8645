"""Untrusted text in messages. Text from a file, a server or a policy is shown without letting it control the terminal."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pydantic import ValidationError

# Control characters except tab and line break; marks that change the direction of text; separators at which some terminals break
# lines; lone surrogates, which cannot be encoded.
UNPRINTABLE = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")
COLOUR = re.compile("\x1b\\[[0-9;?]*[ -/]*[@-~]")  # and other control sequences of that form
MOST_QUOTED = 500  # characters of foreign text in a message
MOST_TOLD = 4  # errors of one value in a message
LONGEST_VALUE = 80  # characters


def printable(text: str) -> str:
    """The text without colours and with an escape such as \\x07 for each unprintable character."""
    return UNPRINTABLE.sub(lambda found: found[0].encode("unicode_escape").decode(), COLOUR.sub("", text))


def quoted(data: bytes) -> str:
    """The beginning of received data on one line, for use in a message."""
    text = data[: 4 * MOST_QUOTED].decode(errors="replace").strip()
    return printable(" ".join(text.split()))[:MOST_QUOTED]


def explained_places(error: ValidationError) -> str:
    """The errors of pydantic on one line, without links to its documentation: "seed=-1: Input should be greater ..."."""
    errors = error.errors()
    told = []
    for found in errors[:MOST_TOLD]:
        place = ".".join(map(str, found["loc"]))
        value = "" if found["type"] == "missing" else f"={_short(found['input'])}"
        if found["type"] == "literal_error":
            told.append(_unknown(place + value, found["input"], found["ctx"]["expected"]))
        elif found["type"] == "union_tag_invalid":  # of the section; its discriminator is the field at fault
            field = ".".join(filter(None, (place, found["ctx"]["discriminator"].strip("'"))))
            tag = found["ctx"]["tag"]
            told.append(_unknown(f"{field}={_short(tag)}", tag, found["ctx"]["expected_tags"]))
        else:
            told.append(f"{place}{value}: {found['msg']}" if place else found["msg"])
    more = [f"and {len(errors) - MOST_TOLD} more"] if len(errors) > MOST_TOLD else []
    return "; ".join(told + more).replace("Value error, ", "")


def _unknown(given: str, value: object, expected: str) -> str:
    """The message for a value that is none of pydantic's `expected`, such as "'a', 'b' or 'c'"."""
    from v05.arguments import unknown  # imports numpy, which the command line's help does not need

    return unknown(given, value, expected.replace(" or ", ", ").replace("'", "").split(", "))


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= LONGEST_VALUE else f"{text[:LONGEST_VALUE]}..."
