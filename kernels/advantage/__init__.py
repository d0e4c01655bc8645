"""Fused advantages on the GPU: `kernel` is what runs there, `fusion` its arithmetic, `launch` what calls it."""
