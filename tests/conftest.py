"""Set before anything imports torch or triton: one thread is one thread, and kernels run in Triton's interpreter; on a GPU under
V05_GPU=1, which `make test-gpu` sets.
"""

import os

if os.environ.get("V05_GPU") == "1":
    os.environ.pop("TRITON_INTERPRET", None)
else:
    os.environ["TRITON_INTERPRET"] = "1"
os.environ["OMP_NUM_THREADS"] = "1"

import torch

torch.set_num_threads(1)
