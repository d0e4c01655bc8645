"""The thin trainer: configuration, policy, loss, the loop, metrics, and the comparison of methods. Nothing here is imported by the op."""
