"""Selections that learn what to adapt, before the run itself."""
