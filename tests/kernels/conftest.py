"""The interpreter that these tests run kernels in."""

from collections.abc import Iterator

import pytest

from helpers.interpreter import patched_once


@pytest.fixture(autouse=True, scope="session")
def _patched_once() -> Iterator[None]:
    with patched_once():
        yield
