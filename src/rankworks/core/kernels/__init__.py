"""Hand-written forward and backward passes for the few products that every training step is made of.

Pure functions of tensors: nothing here knows of deltas, layers or models. Each has a plain form in ordinary operations,
which is what it computes and what runs where a hand-written one would be in the way (torch.compile, torch.func,
forward-mode derivatives); the tests hold the two together.
"""

from rankworks.core.kernels.alone import alone
from rankworks.core.kernels.drop import dropout
from rankworks.core.kernels.folded import folded_linear, folds
from rankworks.core.kernels.lowrank import Reading, fits, lowrank_linear, read, write
from rankworks.core.kernels.noise import add_noise, noise
from rankworks.core.kernels.rows import lowrank_row_norms, scale_rows
from rankworks.core.kernels.sparse import add_entries, sparse_linear
from rankworks.core.kernels.whole import whole_linear

__all__ = [
    "Reading",
    "add_entries",
    "add_noise",
    "alone",
    "dropout",
    "fits",
    "folded_linear",
    "folds",
    "lowrank_linear",
    "lowrank_row_norms",
    "noise",
    "read",
    "scale_rows",
    "sparse_linear",
    "whole_linear",
    "write",
]
