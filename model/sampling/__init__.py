"""From logits to tokens: sampling, penalties, log probabilities."""
