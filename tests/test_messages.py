"""Foreign text in messages drives no terminal."""

import pytest

from v05.messages import printable, quoted


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
