"""Where a page holds what a benchmark writes: between two marks, comments that name it."""

from __future__ import annotations


def replaced(page: str, name: str, content: str) -> str:
    """`page` with `content` between the marks of `name`. ValueError where it has no such marks."""
    begin, end = f"<!-- {name} begins -->\n", f"<!-- {name} ends -->\n"
    before, found, rest = page.partition(begin)
    _, closed, after = rest.partition(end)
    if not (found and closed):
        raise ValueError(f"the page has no {begin.strip()!r} followed by {end.strip()!r}")
    return f"{before}{begin}{content}{end}{after}"
