"""`python -m v05` is the command `v05`."""

from v05.cli import main

if __name__ == "__main__":  # the processes of a comparison import this module
    main()
