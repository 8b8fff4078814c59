"""The loss of a model on a batch: hidden states, logits where a label stands, cross-entropy in chunks."""
