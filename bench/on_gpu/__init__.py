"""What `bench/gpu_advantage.py` is made of. Only `clock.py` needs a GPU; all else runs on CPU tensors in Triton's interpreter."""
