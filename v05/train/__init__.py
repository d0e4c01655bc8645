"""The trainer: configuration, policy, loss, training loop, metrics and comparisons of methods. The op imports nothing from here."""
