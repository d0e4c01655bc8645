"""Fused advantages on the GPU. `kernel` is the kernel, `fusion` its arithmetic, and `launch` calls it."""
