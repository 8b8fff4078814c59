"""Compression: make the adapted model's own weights fewer."""

from rankworks.compress.prune_dsee import Pruned, prune_dsee, prune_heads, prune_outputs
from rankworks.compress.squeeze import Squeezed, squeeze

__all__ = ["Pruned", "Squeezed", "prune_dsee", "prune_heads", "prune_outputs", "squeeze"]
