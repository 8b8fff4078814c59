"""Learning rates that are measured at the start of a run: `optim.lr: auto`."""
