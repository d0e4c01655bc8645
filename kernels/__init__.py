"""Triton kernels, installed as `v05.kernels`: a folder a kernel, with the jit function, its launch, and the variants and
memory traffic that `aot.py` reports. Importing this package imports no Triton.
"""
