"""`make release-check TAG=v0.2.0` checks that this tree can be released under the tag, and lists what has to change.

The version must be the same in the tag, pyproject.toml, v05/__init__.py, CITATION.cff and the changelog's newest release. That
release must have the date of CITATION.cff, and the changelog's section "Unreleased" must be empty.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
WHERE = {
    "pyproject.toml": r'^version = "(.+)"$',
    "v05/__init__.py": r'^__version__ = "(.+)"$',
    "CITATION.cff": r"^version: (.+)$",
    "CHANGELOG.md": r"^## \[(\d.*?)\] - ",
}
DATES = {"CITATION.cff": r"^date-released: (.+)$", "CHANGELOG.md": r"^## \[\d.*?\] - (\d{4}-\d\d-\d\d)$"}


def stated(patterns: dict[str, str], root: Path = ROOT) -> dict[str, str | None]:
    """The first match of each file's pattern, or None."""
    found = {file: re.search(pattern, (root / file).read_text(), re.MULTILINE) for file, pattern in patterns.items()}
    return {file: match and match[1] for file, match in found.items()}


def faults(tag: str, root: Path = ROOT) -> list[str]:
    """Messages on what has to change before the tree can be released as `tag`."""
    said = [
        f"{file} has version {version}, but the tag is {tag}"
        for file, version in stated(WHERE, root).items()
        if f"v{version}" != tag
    ]
    dates = stated(DATES, root)
    if len(set(dates.values())) > 1 or None in dates.values():
        said.append(f"the release has the date {' and '.join(f'{date} in {file}' for file, date in dates.items())}")
    unreleased = re.search(r"^## \[Unreleased\]\n(.*?)^## ", (root / "CHANGELOG.md").read_text(), re.MULTILINE | re.DOTALL)
    if unreleased is None:
        said.append("CHANGELOG.md has no section [Unreleased]; add an empty one for later changes")
    elif unreleased[1].strip():
        said.append("CHANGELOG.md still has lines under [Unreleased]; move them below the new version")
    return said


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    if found := faults(sys.argv[1]):
        sys.exit("\n".join(found))
    print(f"this tree is {sys.argv[1]}")
