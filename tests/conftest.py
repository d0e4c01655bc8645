"""Set before torch and Triton are imported: one thread, and the Triton interpreter."""

import os

os.environ["OMP_NUM_THREADS"] = "1"
os.environ["TRITON_INTERPRET"] = "1"
