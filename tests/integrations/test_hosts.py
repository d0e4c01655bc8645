"""The table of hosts agrees with the folder, the extras and the docs. The Makefile can read it before anything is installed."""

import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from v05.integrations.hosts import HOSTS, runnable

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "v05" / "integrations" / "hosts.py"


def printed(*arguments):
    command = [sys.executable, "-I", "-S", str(SCRIPT), *arguments]  # hides all installed packages
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()


@pytest.mark.parametrize("host", HOSTS.values(), ids=HOSTS)
def test_a_host_is_its_module_its_tests_and_a_row(host):
    assert (SCRIPT.parent / f"{host.name}.py").exists()
    assert (ROOT / "tests" / "integrations" / f"test_{host.name}.py").exists()
    assert f"automodule:: v05.integrations.{host.name}\n" in (ROOT / "docs" / "api" / "integrations.md").read_text()
    assert (ROOT / "docs" / "hosts" / f"{host.name}.md").exists()
    assert host.release in (ROOT / "docs" / "hosts" / f"{host.name}.md").read_text()


@pytest.mark.parametrize("host", HOSTS.values(), ids=HOSTS)
def test_the_tested_release_is_what_the_extra_installs(host):
    extras = metadata.metadata("v05").get_all("Provides-Extra")
    assert host.extra in extras
    wanted = [Requirement(text) for text in metadata.requires("v05")]
    for requirement in wanted:
        if requirement.name == host.name:
            assert requirement.specifier.contains(host.release)
    pinned = [name for name in f"{host.requirements} {host.alone}".split() if Requirement(name).name == host.name]
    assert pinned == ([f"{host.name}=={host.release}"] if host.requirements else [])


def test_make_reads_the_table():
    assert printed() == [host.name for host in runnable()]
    assert printed("requirements", "trl") == ["trl==1.16.0"]
    assert printed("alone", "trl") == printed("python", "trl") == []
    assert printed("python", "skyrl") == ["python3.12"]
    planned = subprocess.run(
        ["make", "-n", "-W", "pyproject.toml", ".venv-verl/.ready"], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout
    assert "hosts.py requirements verl" in planned
