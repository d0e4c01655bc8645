"""How tests build the library's C++ sources."""

import os
import subprocess
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).parents[2]
ENVIRONMENT = os.environ | {"LD_PRELOAD": ""}  # without the library of another sanitizer

# CMake's variables of a core that only has to work: without optimisation, as one file and for one instruction set.
QUICK_BUILD = {
    "UNITY_BUILD": "ON",
    "UNITY_BUILD_BATCH_SIZE": "99",
    "CXX_FLAGS_RELEASE": "-O0 -DV05_MULTIVERSION=",
    "INTERPROCEDURAL_OPTIMIZATION": "OFF",
}


def build_with_allocator(main: Path, program: Path, options: Sequence[str]) -> None:
    """Compile the program and the allocator as one source, which reads the headers once."""
    sources = [*sorted((ROOT / "csrc" / "allocator").glob("*.cpp")), main]
    together = program.with_suffix(".cpp")
    together.write_text("".join(f'#include "{source}"\n' for source in sources))
    command = ["g++", "-std=c++20", "-pthread", *options, f"-I{ROOT / 'csrc' / 'include'}", "-o", str(program), str(together)]
    subprocess.run(command, check=True, env=ENVIRONMENT)
