"""`v05 doctor` from a user's side: what it finds, what it says about missing packages, and that it notices a wrong result."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from helpers.documents import ROOT, table
from v05 import doctor
from v05.integrations.hosts import HOSTS
from v05.methods import METHODS


def v05(*arguments, directory, start="", **environment):
    """Run `python -m v05` outside the repository, after the statements `start`."""
    script = f"import runpy, sys\n{start}\nsys.argv[0] = 'v05'\nrunpy.run_module('v05', run_name='__main__')"
    command = [sys.executable, "-c", script, *arguments]
    variables = os.environ | {"V05_CACHE": str(directory / "cache")} | environment
    return subprocess.run(command, capture_output=True, text=True, env=variables, cwd=directory, timeout=120)


@pytest.fixture(scope="module")
def examined(tmp_path_factory):
    directory = tmp_path_factory.mktemp("doctor")
    (directory / "cache").mkdir()
    (directory / "cache" / "policy").write_bytes(bytes(1_500_000))
    result = v05("doctor", "--json", "doctor.json", directory=directory)
    assert result.returncode == 0, result.stderr
    return result.stdout, json.loads((directory / "doctor.json").read_text())


def test_says_what_is_there_and_what_runs(examined):
    text, findings = examined
    assert findings["versions"]["torch"] == torch.__version__
    assert set(findings["versions"]) == {"v05", "python", "numpy", "torch", "triton"}
    assert "-ffp-contract=off" in findings["core"]["flags"]
    assert findings["core"]["instruction_set"] in text
    active = {path["name"]: path["active"] for path in findings["paths"]}
    assert active["C++"]
    assert active["torch.compile"]
    assert active["Triton interpreter"] == (os.environ.get("TRITON_INTERPRET") == "1")
    assert active["Triton"] == torch.cuda.is_available()
    assert findings["cache"]["bytes"] == 1_500_000
    assert "1.5 MB" in text


def test_every_active_path_is_checked_by_every_method(examined):
    text, findings = examined
    checks = {check["path"]: check for check in findings["self_check"]}
    assert {"cpp on cpu", "triton on cpu"} <= set(checks)
    for check in checks.values():
        assert check["ok"]
        assert check["cases"] == len(METHODS) * 2  # with and without leave-one-out
        assert check["difference"] < doctor.TOLERANCE
    assert text.count("passed;") == len(checks)


def test_the_instruction_set_is_one_that_the_processor_has(examined):
    flags = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    said = examined[1]["core"]["instruction_set"]
    for name, flag in (("x86-64-v4", "avx512vl"), ("x86-64-v3", "avx2")):
        if said.startswith(name):
            assert flag in flags


def test_complete_extras_need_no_install(examined):
    _, findings = examined
    missing = {extra["name"]: extra["missing"] for extra in findings["extras"]}
    assert missing["train"] == []
    assert missing["prior"] == []
    assert {"value", "vllm", "ray", "trl", "verl"} <= set(missing)
    assert not set(doctor.FOR_DEVELOPERS) & set(missing)
    assert findings["install"] == [f"pip install 'v05[{name}]'" for name, lacking in missing.items() if lacking]


def test_the_trainers_are_those_that_are_tested(examined):
    tested = {}
    for name, release, *_ in table(ROOT / "docs" / "integrations.md", "hosts"):
        if page := re.search(r"\(hosts/(\w+)\.md\)", name):
            tested[page[1]] = release.removeprefix("source of ")
    assert tested == {host.name: host.release for host in HOSTS.values()}
    assert {host["name"] for host in examined[1]["hosts"]} == set(tested)


def test_works_on_the_base_install_and_names_what_the_command_line_lacks(tmp_path):
    hidden = ("typer", "rich", "pydantic", "safetensors", "scipy", "sklearn", "transformers", "matplotlib")
    start = f"""
import importlib.metadata as metadata
sys.modules.update(dict.fromkeys({hidden!r}))  # an import of None fails
real = metadata.version
def version(name):
    if name in {hidden!r}:
        raise metadata.PackageNotFoundError(name)
    return real(name)
metadata.version = version
"""
    result = v05("doctor", "--json", "doctor.json", directory=tmp_path, start=start, TRITON_INTERPRET="0")
    assert result.returncode == 0, result.stderr
    (line,) = (line for line in result.stdout.splitlines() if line.startswith("  train "))
    assert "missing" in line
    assert re.search(r" typer<.*,>=", line)
    assert re.search(r" rich<.*,>=", line)
    assert "  pip install 'v05[train]'" in result.stdout.splitlines()
    assert "pip install 'v05[train]'" in json.loads((tmp_path / "doctor.json").read_text())["install"]
    other = v05("train", directory=tmp_path, start=start, TRITON_INTERPRET="0")
    assert other.returncode == 1
    assert "pip install 'v05[train]'" in other.stderr


def test_a_package_that_is_too_old_is_named_with_its_version(monkeypatch):
    installed = doctor._installed
    monkeypatch.setattr(doctor, "_installed", lambda name: "0.0.1" if name == "scipy" else installed(name))
    missing = {extra["name"]: extra["missing"] for extra in doctor._extras()}
    assert missing["prior"] == missing["train"] == ["scipy<2,>=1.13 (installed: 0.0.1)"]
    assert missing["prior"][0] in missing["ray"]  # the extra "ray" includes v05[train]


@pytest.mark.parametrize("what", ["a number", "a NaN", "an exception"])
def test_a_failed_self_check_is_the_exit_status(what, monkeypatch, capsys):
    monkeypatch.delenv("TRITON_INTERPRET")  # the interpreter is slow, and one path is enough
    right = doctor.fused_advantage

    def wrong(*arguments, **options):
        out = right(*arguments, **options)
        if options["method"] == "rloo":
            if what == "an exception":
                raise RuntimeError("no kernel image")
            out.advantages.view(-1)[3] += 1e-6 if what == "a number" else torch.nan
        return out

    monkeypatch.setattr(doctor, "fused_advantage", wrong)
    assert doctor.run() == 1
    text = capsys.readouterr().out
    assert "FAILED" in text
    assert ("RuntimeError: no kernel image" in text) == (what == "an exception")
