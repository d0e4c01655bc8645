"""Run the command `v05` as `python -m v05`."""

from v05.cli import main

if __name__ == "__main__":  # worker processes of `v05 compare` import this module
    main()
