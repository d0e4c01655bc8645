"""Headless Chromium, for tests marked `browser`, which are skipped without it."""

import os
import shutil
import tempfile
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

PATIENCE = 120_000  # milliseconds, for a busy machine
NAMES = ("chromium", "chromium-browser", "google-chrome")
SCREENSHOTS = Path(__file__).parents[1] / "screenshots"
SQUARE = 26  # pixels
# In grey levels of 256: the mean difference that is allowed, and the share of squares that may differ by more than LARGE.
MEAN, LARGE, LARGE_SHARE = 5.0, 48, 0.03


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


def assert_looks_alike(page, name):
    """The window of `page` looks like the committed picture of that name. Both are reduced to grey squares, in which the fonts of a
    machine make no difference but a missing style, figure or column does.

    To accept a change on purpose, look at the screenshot that a failure names, and run the tests with V05_SCREENSHOTS=write.
    """
    taken = Path(tempfile.gettempdir()) / f"{name}.png"
    page.screenshot(path=taken, animations="disabled", timeout=PATIENCE)
    seen = np.asarray(Image.open(taken).convert("L").reduce(SQUARE), dtype=np.float64)
    committed = SCREENSHOTS / f"{name}.png"
    if os.environ.get("V05_SCREENSHOTS") == "write":
        committed.parent.mkdir(exist_ok=True)
        Image.fromarray(seen.astype(np.uint8)).save(committed)
    wanted = np.asarray(Image.open(committed), dtype=np.float64)
    assert seen.shape == wanted.shape, f"{taken} has another size than {committed}"
    difference = np.abs(seen - wanted)
    large = np.mean(difference > LARGE)
    assert max(difference.mean() / MEAN, large / LARGE_SHARE) < 1, (
        f"{taken} differs from {committed} by {difference.mean():.1f} levels on average, and by more than {LARGE} in {large:.1%} "
        "of the squares; if it is as it should be, run the tests with V05_SCREENSHOTS=write"
    )
    taken.unlink()
