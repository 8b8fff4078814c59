"""How gradients become steps: the contract of optimizers, and what several of them are made of."""
