"""The parts of `bench/policy_loss.py`: problems, the providers that compute their loss, and the measurement."""
