"""Ways for a run's process to end. They are importable by name, so that other processes can call them."""

import os
import sys


def exit_at_once(config, directory):
    sys.exit(0)


def end_at_once(config, directory):
    os._exit(0)
