"""The table of hosts: the trainers that v05 is integrated with. The Makefile, `v05 doctor`, the docs' tests and the tests read it.

    python v05/integrations/hosts.py                     names of those whose tests run with the Pythons of this machine
    python v05/integrations/hosts.py FIELD NAME          a field of one: `requirements`, `alone` or `python`

It runs before anything is installed, and imports only what comes with Python.
"""

from __future__ import annotations

import shutil
import sys
from dataclasses import dataclass


@dataclass(frozen=True)
class Host:
    """A trainer that takes v05.

    Attributes:
        name: of its distribution, and of its module in this folder.
        release: that the tests run with.
        extra: of v05, in which it or what its door needs is installed.
        requirements: what pip installs beside v05 for its tests, with a space between; empty for a trainer that the package index
            does not have.
        alone: what pip installs after that, without its requirements: they contradict each other, or need a GPU.
        python: the command that makes the environment, where not any Python will do.
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
    """Those that the package index has, and a Python of this machine can run."""
    return [host for host in HOSTS.values() if host.requirements and (not host.python or shutil.which(host.python))]


if __name__ == "__main__":
    if sys.argv[1:]:
        field, name = sys.argv[1:]
        print(getattr(HOSTS[name], field))
    else:
        print(*(host.name for host in runnable()))
