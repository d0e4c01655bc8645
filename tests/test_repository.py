"""The files that the host and visitors of the repository read: workflows, issue forms, versions, citation."""

import re
import runpy
import shutil
import subprocess
import sys

import pytest
import yaml

from helpers.documents import ROOT

RELEASE = runpy.run_path(str(ROOT / "packaging" / "release.py"))
WORKFLOWS = sorted((ROOT / ".github" / "workflows").glob("*.yml"))
FORMS = sorted((ROOT / ".github" / "ISSUE_TEMPLATE").glob("*.yml"))


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.stem)
def test_workflows_run_make_and_nothing_else(path):
    targets = re.search(r"^\.PHONY: (.*)$", (ROOT / "Makefile").read_text(), re.MULTILINE)[1].split()
    for job in yaml.safe_load(path.read_text())["jobs"].values():
        commands = [step["run"] for step in job.get("steps", ()) if "run" in step]
        for command in commands:
            assert re.fullmatch(r"make [a-z-]+( [A-Z]+=\S+)*", command)
            assert command.split()[1] in targets
            assert "${{" not in command  # a branch's or tag's name, which anyone may choose, would be pasted into the shell


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.stem)
def test_workflows_may_read_and_no_more(path):
    workflow = yaml.safe_load(path.read_text())
    assert workflow["permissions"] == {"contents": "read"}
    more = {name: job["permissions"] for name, job in workflow["jobs"].items() if "permissions" in job}
    assert more == ({"publish": {"id-token": "write"}} if path.stem == "release" else {})


def test_every_supported_python_is_tested():
    matrix = yaml.safe_load((ROOT / ".github" / "workflows" / "tests.yml").read_text())["jobs"]["tests"]["strategy"]["matrix"]
    assert 'requires-python = ">=3.10,<3.14"\n' in (ROOT / "pyproject.toml").read_text()
    assert matrix["python"] == ["3.10", "3.11", "3.12", "3.13"]


@pytest.fixture
def tree(tmp_path):
    """Copies of the files that state the version, which a test may change."""
    for name in RELEASE["WHERE"]:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        shutil.copy(ROOT / name, tmp_path / name)
    changelog = re.sub(r"(## \[Unreleased\]\n).*?(?=\n## )", r"\1", (ROOT / "CHANGELOG.md").read_text(), flags=re.DOTALL)
    (tmp_path / "CHANGELOG.md").write_text(changelog)
    return tmp_path


def test_the_versions_agree():
    assert len(set(RELEASE["stated"](RELEASE["WHERE"]).values())) == 1
    assert len(set(RELEASE["stated"](RELEASE["DATES"]).values())) == 1


def test_a_release_is_checked(tree):
    version = RELEASE["stated"](RELEASE["WHERE"])["pyproject.toml"]
    assert RELEASE["faults"](f"v{version}", tree) == []
    assert len(RELEASE["faults"]("v99.0.0", tree)) == len(RELEASE["WHERE"])


@pytest.mark.parametrize(
    ("file", "old", "new", "said"),
    [
        ("pyproject.toml", 'version = "', 'version = "9', "pyproject.toml has version 9"),
        ("v05/__init__.py", '__version__ = "', '__version__ = "9', "v05/__init__.py has version 9"),
        ("CITATION.cff", "date-released: 2", "date-released: 1", "the release has the date 1"),
        ("CHANGELOG.md", "[Unreleased]\n", "[Unreleased]\n\n- A line.\n", "CHANGELOG.md still has lines under [Unreleased]"),
        ("CHANGELOG.md", "## [Unreleased]\n", "", "CHANGELOG.md has no section [Unreleased]"),
    ],
)
def test_what_is_in_a_releases_way_is_named(file, old, new, said, tree):
    text = (tree / file).read_text()
    assert old in text
    (tree / file).write_text(text.replace(old, new, 1))
    version = RELEASE["stated"](RELEASE["WHERE"])["pyproject.toml"]
    assert [fault for fault in RELEASE["faults"](f"v{version}", tree) if fault.startswith(said)]


def test_the_changelog_has_the_sections_of_its_form():
    releases = re.split(r"^## ", (ROOT / "CHANGELOG.md").read_text(), flags=re.MULTILINE)[1:]
    assert releases[0].startswith("[Unreleased]\n")
    for release in releases:
        sections = re.findall(r"^### (.*)$", release, re.MULTILINE)
        assert sections == [name for name in ("Added", "Changed", "Deprecated", "Removed", "Fixed", "Security") if name in sections]


def test_the_form_for_a_wrong_advantage_has_snippets_that_run():
    """The form's two snippets agree as they are, so that a reporter starts from a correct comparison."""
    form = yaml.safe_load((ROOT / ".github" / "ISSUE_TEMPLATE" / "wrong_advantage.yml").read_text())
    snippets = [field["attributes"]["value"] for field in form["body"] if field["attributes"].get("render") == "python"]
    printed = []
    for snippet in snippets:
        done = subprocess.run([sys.executable, "-c", snippet], capture_output=True, text=True, check=True)
        printed.append([float(number) for number in re.findall(r"-?\d+\.\d+", done.stdout)[:3]])
    assert len(printed) == 2
    assert printed[0] == pytest.approx(printed[1], abs=1e-4)


def test_security_names_tests_that_exist():
    named = re.findall(r"`(tests/[\w/.]+)`", (ROOT / "SECURITY.md").read_text())
    assert len(named) > 8
    assert all((ROOT / name).exists() for name in named)
