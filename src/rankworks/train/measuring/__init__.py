"""How good a model is: accuracy by likelihood, answers by generation, perplexity."""
