"""The changes shown in CONTRIBUTING.md work: their diffs are applied to a copy of the tree, which is built and run."""

import os
import re
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

from helpers.programs import QUICK_BUILD

ROOT = Path(__file__).parent.parent
PARTS = ("v05", "kernels", "csrc", "docs", "tests", "CMakeLists.txt", "pyproject.toml", "README.md", "LICENSE", "conftest.py")


@pytest.fixture(scope="module")
def changed(tmp_path_factory):
    """A copy of the tree with every diff of the page applied, in the order of the page."""
    tree = tmp_path_factory.mktemp("changed")
    for part in PARTS:
        if (ROOT / part).is_dir():
            shutil.copytree(ROOT / part, tree / part, ignore=shutil.ignore_patterns("__pycache__", "*.so"))
        else:
            shutil.copy(ROOT / part, tree / part)
    for diff in re.findall(r"```diff\n(.*?)```", (ROOT / "CONTRIBUTING.md").read_text(), re.DOTALL):
        done = subprocess.run(["git", "apply", "--verbose", "-"], input=diff, capture_output=True, text=True, cwd=tree)
        assert done.returncode == 0, f"{done.stderr}\n{diff}"
    return tree


@pytest.fixture(scope="module")
def run(changed, tmp_path_factory):
    """Runs Python with the changed v05."""
    site = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(site), str(changed)]
    for name, value in QUICK_BUILD.items():
        command += ["-C", f"cmake.define.CMAKE_{name}={value}"]
    if shutil.which("cmake"):  # otherwise pip fetches cmake
        command.append("--no-build-isolation")
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr

    def run(*arguments, cwd=changed, **environment):
        """Run without `site`, which would import the editable v05 first."""
        path = os.pathsep.join((str(site), sysconfig.get_path("purelib"), sysconfig.get_path("platlib")))
        environment = os.environ | {"PYTHONPATH": path} | environment
        done = subprocess.run([sys.executable, "-S", *arguments], capture_output=True, text=True, cwd=cwd, env=environment)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    return run


def test_changes_pass_the_tests_that_they_touch(changed, run):
    golden = changed / "tests" / "ops" / "golden" / "rivals.json"
    cases = run(str(golden.with_suffix(".py")))
    assert "other_groups" in cases
    golden.write_text(cases)
    reads_golden = re.compile(r"^(from|import) \S*golden_cases", re.MULTILINE)
    files = [path for path in (changed / "tests").rglob("test_*.py") if reads_golden.search(path.read_text())]
    assert len(files) == 3  # the tests of the reference, the core and the kernel
    files += [changed / "tests" / "kernels" / name for name in ("test_fusion.py", "test_token_count.py")]
    chosen = "other_groups or loo_batch or opo or numbers or columns or token_counts"
    told = run("-m", "pytest", "-q", "-rs", "-p", "no:cacheprovider", "-k", chosen, *map(str, files))
    assert " passed" in told
    assert "skipped" not in told


ALONE = """
from v05.ops import fused_advantage
for backend in ("cpp", "triton"):
    for leave_one_out in (False, True):
        for singleton, wanted in (("zero", [0.0, 0.0]), ("raw", [1.0, 0.5])):
            options = dict(method="other_groups", leave_one_out=leave_one_out, singleton=singleton, backend=backend)
            assert fused_advantage([1.0, 0.5], group_offsets=[0, 2], **options).advantages.tolist() == wanted
"""


def test_a_rule_says_where_a_rollout_is_alone(run):
    run("-c", ALONE, cwd="/", TRITON_INTERPRET="1")


STATISTIC = """
import torch
from v05.ops import fused_advantage
for backend in ("cpp", "triton"):
    rewards, energy = torch.tensor([1.0, 0.0, 1.0]), torch.tensor([3.0, 1.0, 0.0])
    options = dict(method="otb", energy=energy, group_offsets=[0, 3], backend=backend)
    stats = fused_advantage(rewards, **options).stats
    torch.testing.assert_close(stats.shift, torch.tensor([3 / 4 - 2 / 3], dtype=torch.float64))
    assert fused_advantage(rewards, method="grpo", group_offsets=[0, 3]).stats.shift is None
"""


def test_a_statistic_of_both_backends(run):
    run("-c", STATISTIC, cwd="/", TRITON_INTERPRET="1")


KERNEL = """
from v05.kernels import aot
(launch,) = [launch for launch in aot.launches() if "token_count" in launch.__name__]
(variant,) = launch.variants()
assert aot.report(launch, variant, "sm_90").spill_bytes == 0
"""


def test_a_kernel_is_found_by_the_ahead_of_time_compiler(run):
    run("-c", KERNEL, cwd="/", TRITON_INTERPRET="0")


def test_a_trainer_option_is_set_from_the_command_line(run, tmp_path):
    run("-m", "v05", "train", "--preset", "smoke", "--set", "optimizer.beta2=0.95", "--out", str(tmp_path / "run"), cwd=tmp_path)
    assert '"beta2": 0.95' in (tmp_path / "run" / "config.json").read_text()
