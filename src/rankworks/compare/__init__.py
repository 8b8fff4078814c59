"""Comparison: which method is best for a model, data and a budget, with equal tuning and honest intervals."""
