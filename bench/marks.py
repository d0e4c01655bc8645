"""Replaces generated parts of a page. Two marks, which are comments with the part's name, enclose each part."""

from __future__ import annotations


def replaced(page: str, name: str, content: str) -> str:
    """`page` with `content` between the marks of `name`. Raises ValueError if the page lacks these marks."""
    begin, end = f"<!-- {name} begins -->\n", f"<!-- {name} ends -->\n"
    before, found, rest = page.partition(begin)
    _, closed, after = rest.partition(end)
    if not (found and closed):
        raise ValueError(f"the page has no {begin.strip()!r} followed by {end.strip()!r}")
    return f"{before}{begin}{content}{end}{after}"
