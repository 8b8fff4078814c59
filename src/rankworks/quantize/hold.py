"""Holding a quantised weight in bitsandbytes' own 4-bit layer, in place of the dense copy of its values."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from typing import Any

from torch import nn

from rankworks.core.errors import ConfigError, TargetError
from rankworks.core.site import Site


def can_hold(sites: Sequence[Site], bits: int, code: str, block: int) -> None:
    """Raise where bitsandbytes is missing or has no layer for these sites and this code.

    On a CPU it decodes a matrix wrongly whose rows are not whole blocks (seen in 0.50), so that is refused everywhere.
    """
    if importlib.util.find_spec("bitsandbytes") is None:
        raise ConfigError(
            "holder='bitsandbytes' needs the package bitsandbytes: install rankworks[quant], or use holder='dense'."
        )
    if bits != 4 or code != "nf":
        raise ConfigError(
            f"bitsandbytes holds 4-bit 'nf' codes here, not {bits}-bit {code!r}: use holder='dense' for those."
        )
    for site in sites:
        if type(site.module) is not nn.Linear or site.rows is not None:
            raise TargetError(
                f"{site.name} is no plain linear layer, which is what bitsandbytes replaces: exclude it, or use "
                "holder='dense'."
            )
        if site.shape.in_ % block:
            raise TargetError(
                f"{site.name} has rows of {site.shape.in_} weights, no multiple of block = {block}, which bitsandbytes "
                "does not decode correctly on every device: use holder='dense', or exclude it."
            )


def hold(model: nn.Module, site: Site, block: int) -> None:
    """Replace a plain linear layer, whose weight has quantised values already, by a Linear4bit of the same numbers."""
    import bitsandbytes as bnb

    layer = site.module
    held = bnb.nn.Linear4bit(
        layer.in_features,
        layer.out_features,
        bias=layer.bias is not None,
        compute_dtype=layer.weight.dtype,
        compress_statistics=False,
        quant_type="nf4",
        device="meta",
    )
    weight = layer.weight.data
    settings: Any = {"quant_type": "nf4", "blocksize": block, "compress_statistics": False, "module": held}
    held.weight = bnb.nn.Params4bit(weight.cpu(), requires_grad=False, **settings)
    held.bias = layer.bias
    parent, _, name = site.path.rpartition(".")
    setattr(model.get_submodule(parent), name, held.to(weight.device).train(layer.training))
