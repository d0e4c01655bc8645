"""`python -m v05` is the command `v05`."""

from v05.cli import main

main()
