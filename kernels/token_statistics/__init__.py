"""Log-probabilities, entropies and squared probabilities of tokens from logits, and the gradient of the logits."""
