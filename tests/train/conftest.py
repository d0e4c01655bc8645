"""One warm start for all tests that train."""

import pytest


@pytest.fixture(scope="session", autouse=True)
def policy_cache(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("V05_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield
