"""Set the environment before anything imports torch or triton: one thread, and Triton's interpreter instead of a GPU. With
V05_GPU=1, which `make test-gpu` sets, kernels run on the GPU. The processes of a test run share a cache of warm starts.
"""

import os
import shutil
import tempfile
from collections import Counter

if os.environ.get("V05_GPU") == "1":
    os.environ.pop("TRITON_INTERPRET", None)
else:
    os.environ["TRITON_INTERPRET"] = "1"
os.environ["OMP_NUM_THREADS"] = "1"
if "PYTEST_XDIST_WORKER" not in os.environ:  # a worker gets the environment of the process that started it
    os.environ["V05_CACHE"] = tempfile.mkdtemp(prefix="v05-cache-")

import torch

torch.set_num_threads(1)


def pytest_collection_modifyitems(items):
    """Files with few tests run first. Their tests take the longest, and at the end one process would wait for the other's."""
    sizes = Counter(item.path for item in items)
    items.sort(key=lambda item: sizes[item.path])


def pytest_unconfigure(config):
    if "PYTEST_XDIST_WORKER" not in os.environ:
        shutil.rmtree(os.environ["V05_CACHE"], ignore_errors=True)
