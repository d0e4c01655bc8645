"""What `bench/policy_loss.py` times: a problem, and the ways from it to the loss."""
