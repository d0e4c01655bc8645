"""All tests that train share one cached warm start."""

import pytest


@pytest.fixture(scope="session", autouse=True)
def policy_cache(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("V05_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield
