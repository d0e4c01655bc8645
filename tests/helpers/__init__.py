"""What several tests share, and what the processes that tests start import: `from helpers.golden_cases import ...`."""
