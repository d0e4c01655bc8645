"""Code shared by several tests, and modules that the processes of tests import: `from helpers.golden_cases import ...`."""
