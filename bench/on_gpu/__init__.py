"""The parts of `bench/gpu_advantage.py`. Only `clock.py` needs a GPU; the rest runs on CPU tensors in Triton's interpreter."""
