"""Makes this tree importable without installing it: `python packaging/in_place.py` prints the folder to put on PYTHONPATH.

A machine with a GPU often has torch and a compiler, but no package index, CMake or pybind11. The folder, in build/, holds links to
the contents of v05/ and to kernels/, and the C++ core. Only a C++ compiler is needed to build the core, with the flags of
CMakeLists.txt; pybind11's headers come from its package or from torch. The core is built again when its sources or flags change.

If this tree is already installed (`pip install -e .`), the script prints an empty line. If something is missing for the build, it
names it and exits with status 1.
"""

from __future__ import annotations

import hashlib
import importlib.util
import os
import shutil
import subprocess
import sys
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).parents[1]
FLAGS = ("-O3", "-DNDEBUG", "-std=c++20", "-fPIC", "-fvisibility=hidden", "-ffp-contract=off", "-fno-math-errno")
USE = "import v05._core, v05.kernels; print(v05.__file__)"


def folder() -> Path | None:
    """Prepare the folder to put on PYTHONPATH, with an up-to-date core, and return it. None if this tree is already installed.

    Raises SystemExit with a message if something is missing.
    """
    if installed():
        return None
    suffix = sysconfig.get_config_var("EXT_SUFFIX")
    place = ROOT / "build" / "in_place" / sysconfig.get_config_var("SOABI")
    package = place / "v05"
    package.mkdir(parents=True, exist_ok=True)
    link_sources(package)
    build_core(package / f"_core{suffix}", place / "objects")
    environment = os.environ | {"PYTHONPATH": str(place)}
    done = subprocess.run([sys.executable, "-c", USE], cwd=place, env=environment, capture_output=True, text=True)
    if done.returncode != 0:
        sys.exit(f"the tree does not import from {place}:\n{done.stderr}")
    if not done.stdout.strip().startswith(str(package)):
        sys.exit(f"another v05 is imported before this tree's: {done.stdout.strip()}; uninstall it with: pip uninstall v05")
    return place


def installed() -> bool:
    """Whether `import v05` finds an editable install of this tree."""
    try:
        found, core = importlib.util.find_spec("v05"), importlib.util.find_spec("v05._core")
    except ImportError:  # there is no v05, or a v05 without its core
        return False
    return core is not None and found is not None and Path(str(found.origin)).resolve().parent == ROOT / "v05"


def link_sources(package: Path) -> None:
    """Link every file and folder of v05/ into `package`, and kernels/ as the subpackage v05.kernels."""
    wanted = {path.name: path for path in (ROOT / "v05").iterdir() if path.name != "__pycache__"} | {"kernels": ROOT / "kernels"}
    for path in package.iterdir():
        if path.is_symlink() and wanted.get(path.name) != path.readlink():
            path.unlink()
    for name, target in wanted.items():
        if not (package / name).is_symlink():
            (package / name).symlink_to(target)


def build_core(core: Path, objects: Path, *others: str) -> None:
    """Compile csrc/ into `core` with FLAGS and the flags `others`, unless the same command already built the same sources."""
    compiler = os.environ.get("CXX") or next(filter(shutil.which, ("c++", "g++", "clang++")), None)
    if compiler is None:
        sys.exit("no C++ compiler found: install g++ or clang++, or name a compiler in the variable CXX")
    headers = [ROOT / "csrc" / "include", python_headers(), pybind11_headers()]
    objects.mkdir(parents=True, exist_ok=True)
    openmp = ["-fopenmp"] if has_openmp(compiler, objects) else []
    command = [compiler, *FLAGS, *others, *openmp, *(f"-I{path}" for path in headers)]
    about = [f'-DV05_COMPILER="{compiler}"', f'-DV05_FLAGS="{" ".join((*FLAGS, *others, *openmp))}"']
    sources = sorted((ROOT / "csrc").glob("*/*.cpp"))
    read = (*sources, *sorted((ROOT / "csrc").rglob("*.hpp")))
    digest = hashlib.sha256("\0".join((*command, *(path.read_text() for path in read))).encode()).hexdigest()
    stamp = objects / "built"
    if core.exists() and stamp.exists() and stamp.read_text() == digest:
        return
    print(f"building the C++ core with {compiler}: {len(sources)} files", file=sys.stderr)

    def compile_one(source: Path) -> Path:
        target = objects / f"{source.parent.name}-{source.stem}.o"
        run([*command, *about, "-c", str(source), "-o", str(target)])
        return target

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        compiled = list(pool.map(compile_one, sources))
    run([compiler, "-shared", *openmp, *map(str, compiled), "-o", str(core)])
    stamp.write_text(digest)


def run(command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode != 0:
        sys.exit(f"the C++ core does not build; this command failed:\n{' '.join(command)}\n{done.stderr}")


def has_openmp(compiler: str, place: Path) -> bool:
    """Whether the compiler supports OpenMP. Without it the core works too, but on one thread."""
    source = place / "openmp.cpp"
    source.write_text("#include <omp.h>\nint threads() { return omp_get_max_threads(); }\n")
    command = [compiler, "-fopenmp", "-fPIC", "-shared", str(source), "-o", str(place / "openmp.so")]
    return subprocess.run(command, capture_output=True).returncode == 0


def python_headers() -> Path:
    headers = Path(sysconfig.get_path("include"))
    if not (headers / "Python.h").exists():
        sys.exit(f"no Python.h in {headers}: install the headers of this Python, such as the package python3-dev")
    return headers


def pybind11_headers() -> Path:
    """The headers in the package pybind11 or in torch. The packages are located without importing them."""
    for module in ("pybind11", "torch"):
        found = importlib.util.find_spec(module)
        headers = Path(str(found.origin)).parent / "include" if found else None
        if headers is not None and (headers / "pybind11" / "pybind11.h").exists():
            return headers
    sys.exit("pybind11's headers were found neither in a package pybind11 nor in torch: install pybind11, or a torch with headers")


if __name__ == "__main__":
    print(folder() or "")
