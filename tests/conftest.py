"""Set the environment before anything imports torch or triton: one thread, and Triton's interpreter instead of a GPU. With
V05_GPU=1, which `make test-gpu` sets, kernels run on the GPU.
"""

import os

if os.environ.get("V05_GPU") == "1":
    os.environ.pop("TRITON_INTERPRET", None)
else:
    os.environ["TRITON_INTERPRET"] = "1"
os.environ["OMP_NUM_THREADS"] = "1"

import torch

torch.set_num_threads(1)
