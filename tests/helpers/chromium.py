"""Headless Chromium, for tests marked `browser`, which are skipped without it."""

import shutil
from contextlib import contextmanager

import pytest

PATIENCE = 120_000  # milliseconds, for a busy machine
NAMES = ("chromium", "chromium-browser", "google-chrome")


@contextmanager
def chromium():
    playwright = pytest.importorskip("playwright.sync_api", reason="needs playwright: make test-report")
    path = next(filter(None, map(shutil.which, NAMES)), None)
    if path is None:
        pytest.skip("needs Chromium: make test-report")
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=path, args=["--no-sandbox"], timeout=PATIENCE)
        yield browser
        browser.close()
