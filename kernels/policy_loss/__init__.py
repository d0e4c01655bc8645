"""The policy loss on the GPU."""
