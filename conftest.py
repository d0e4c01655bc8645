"""`python -m pytest` puts the repository's root first on the path, where v05/ would shadow an installed v05: take it off again."""

import sys
from pathlib import Path

ROOT = Path(__file__).parent
sys.path[:] = [entry for entry in sys.path if entry == "" or Path(entry).resolve() != ROOT]
sys.path[:] = [entry for entry in sys.path if entry != "" or Path.cwd() != ROOT]
