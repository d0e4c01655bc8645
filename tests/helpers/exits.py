"""What a run's process does where something in it ends it. Importable by name, so that other processes can call it."""

import os
import sys


def exit_at_once(config, directory):
    sys.exit(0)


def end_at_once(config, directory):
    os._exit(0)
