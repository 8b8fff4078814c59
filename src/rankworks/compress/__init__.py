"""Compression: make the adapted model's own weights fewer."""

from rankworks.compress.factorised import Factorised, factorised
from rankworks.compress.prune_dsee import Pruned, prune_dsee, prune_heads, prune_outputs
from rankworks.compress.squeeze import Squeezed, squeeze

__all__ = ["Factorised", "Pruned", "Squeezed", "factorised", "prune_dsee", "prune_heads", "prune_outputs", "squeeze"]
