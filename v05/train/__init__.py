"""The thin trainer: configuration, policy, loss, the loop, metrics, comparisons of methods. The op imports nothing from here."""
