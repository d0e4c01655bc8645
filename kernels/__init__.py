"""Triton kernels, installed as `v05.kernels`. Importing this package does not import Triton.

Each kernel has a folder with its jit functions and a `launch.py`, which also has the variants and the memory traffic that `aot.py`
reports.
"""
