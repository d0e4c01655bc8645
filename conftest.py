"""What tests can import: `helpers`, which lies in tests/, and the installed v05.

`python -m pytest` puts the repository's root first on the path, where v05/ would shadow an installed v05: tests/ takes its place,
also in the processes that multiprocessing starts.
"""

import sys
from pathlib import Path

ROOT = Path(__file__).parent
sys.path[:] = [entry for entry in sys.path if Path(entry).resolve() != ROOT]  # "" is the working directory
sys.path.insert(0, str(ROOT / "tests"))
