"""Set before anything imports torch or triton: kernels run in Triton's interpreter, and one thread is one thread."""

import os

os.environ["TRITON_INTERPRET"] = "1"
os.environ["OMP_NUM_THREADS"] = "1"

import torch

torch.set_num_threads(1)
