"""The table of hosts, the trainers that v05 is integrated with. The Makefile, `v05 doctor` and the tests read it.

    python v05/integrations/hosts.py                     print the hosts whose tests can run with this machine's Python versions
    python v05/integrations/hosts.py FIELD NAME          print a field of a host: `requirements`, `alone` or `python`

The Makefile runs this file before anything is installed, so it imports only the standard library.
"""

from __future__ import annotations

import shutil
import sys
from dataclasses import dataclass


@dataclass(frozen=True)
class Host:
    """A trainer that v05 is integrated with.

    Attributes:
        name: the name of its distribution, and of its module in this folder.
        release: the release that the tests run with.
        extra: the extra of v05 that installs the host or the integration's requirements.
        requirements: the packages, separated by spaces, that pip installs next to v05 for its tests. Empty for a host that is not
            on the package index.
        alone: the packages that pip installs after that with --no-deps, because their requirements conflict or need a GPU.
        python: the Python command that creates the environment. Empty if any supported Python works.
    """

    name: str
    release: str
    extra: str
    requirements: str = ""
    alone: str = ""
    python: str = ""


HOSTS = {
    host.name: host
    for host in (
        Host("trl", "1.16.0", extra="trl", requirements="trl==1.16.0"),
        Host(
            "verl",
            "0.9.1",
            extra="verl",
            requirements=(
                "accelerate cachetools codetiming datasets fastapi hydra-core orjson pandas peft Pillow pylatexenc ray==2.60.0 "
                "tensordict<=0.10 torchdata transformers>=5.5.3,<5.11 TransferQueue==0.1.11 uvicorn"
            ),
            alone="verl==0.9.1",
        ),
        Host(
            "skyrl",
            "0.3.0",
            extra="prior",
            requirements=(
                "accelerate aiohttp datasets func_timeout hydra-core jaxtyping loguru omegaconf orjson peft==0.18.1 Pillow "
                "pydantic ray==2.60.0 tensordict torchdata transformers>=5.6.1,<=5.8.0"
            ),
            alone="skyrl==0.3.0 skyrl-gym==0.4.0",
            python="python3.12",
        ),
        Host("slime", "0.4.0", extra="prior"),
    )
}


def runnable() -> list[Host]:
    """The hosts that are on the package index and run with a Python of this machine."""
    return [host for host in HOSTS.values() if host.requirements and (not host.python or shutil.which(host.python))]


if __name__ == "__main__":
    if sys.argv[1:]:
        field, name = sys.argv[1:]
        print(getattr(HOSTS[name], field))
    else:
        print(*(host.name for host in runnable()))
