"""An sdist is built into a wheel, and the wheel works where the editable install does not reach."""

import contextlib
import subprocess
import sys
import tarfile
import zipfile
from importlib import metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from helpers.programs import QUICK_BUILD

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """The unpacked wheel, built from an sdist of this tree."""
    place = tmp_path_factory.mktemp("dist")
    build = f"import scikit_build_core.build as b; print(b.build_sdist({str(place)!r}))"
    subprocess.run([sys.executable, "-c", build], cwd=ROOT, check=True, capture_output=True)
    (sdist,) = place.glob("*.tar.gz")
    with tarfile.open(sdist) as archive:
        archive.extractall(place, filter="data")
    (source,) = (p for p in place.iterdir() if p.is_dir())
    # The tests ask only what the wheel contains, and whether it works.
    options = {f"cmake.define.CMAKE_{name}": value for name, value in QUICK_BUILD.items()}
    build = f"import scikit_build_core.build as b; print(b.build_wheel({str(place)!r}, {options!r}))"
    subprocess.run([sys.executable, "-c", build], cwd=source, check=True, capture_output=True)
    (built,) = place.glob("*.whl")
    unpacked = place / "unpacked"
    with zipfile.ZipFile(built) as archive:
        archive.extractall(unpacked)
    return unpacked


def test_wheel_holds_the_package_the_kernels_and_the_types(wheel):
    files = {str(p.relative_to(wheel)) for p in wheel.rglob("*") if p.is_file()}
    assert {"v05/__init__.py", "v05/py.typed", "v05/_core.pyi", "v05/kernels/advantage/kernel.py", "v05/kernels/aot.py"} <= files
    assert {"v05/report/page.html", "v05/report/page.css", "v05/report/page.js"} <= files
    assert (wheel / "v05/prior/v0/head.safetensors").stat().st_size < 3_000_000
    assert any(f.startswith("v05/_core.") and f.endswith((".so", ".pyd")) for f in files)
    assert not any(f.startswith(("tests/", "kernels/", "csrc/", "bench/")) for f in files)
    assert any(f.endswith("licenses/LICENSE") for f in files)


def test_wheel_works_where_nothing_else_of_v05_is(wheel, tmp_path):
    script = f"""
import sys
sys.meta_path[:] = [f for f in sys.meta_path if "ScikitBuild" not in type(f).__name__]  # the editable install
sys.path.insert(0, {str(wheel)!r})
import v05, v05.kernels, v05._core
from v05.budget import RolloutAllocator
from v05.ops import fused_advantage
assert all(m.__file__.startswith({str(wheel)!r}) for m in (v05, v05.kernels, v05._core)), v05.__file__
print(fused_advantage([1.0, 0.0], [0.5], group_offsets=[0, 2]).advantages.tolist())
"""
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=tmp_path)
    assert result.stdout == "[0.5, -0.5]\n", result.stderr


def test_dependencies_end_before_what_may_break_them(wheel):
    """Every dependency has an upper bound, which the installed version meets: a new major version is adopted on purpose."""
    (found,) = wheel.glob("v05-*.dist-info")
    required = [Requirement(line) for line in metadata.PathDistribution(found).requires]
    for_users = [r for r in required if not any(f'extra == "{extra}"' in str(r.marker) for extra in ("dev", "docs"))]
    checked = [r for r in for_users if r.name not in ("v05", "packaging", "pyarrow")]
    assert len(checked) > 15
    for requirement in checked:
        assert any(bound.operator in ("<", "==") for bound in requirement.specifier), requirement
        with contextlib.suppress(metadata.PackageNotFoundError):
            assert requirement.specifier.contains(metadata.version(requirement.name), prereleases=True), requirement
