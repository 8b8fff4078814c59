"""From records to batches: which tokens are read and learned, how examples share a row, which come when."""
