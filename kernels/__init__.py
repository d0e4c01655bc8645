"""Triton kernels, installed as `v05.kernels`: one file per kernel, a jit function and its launcher, nothing else.

`fusion.py` holds the arithmetic of `csrc/include/v05/fusion.hpp` as device functions. Importing this package imports no
Triton.
"""
