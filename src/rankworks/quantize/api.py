"""quantise: move the base to its quantised values, as a step of its own, before an adapter is put on it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from rankworks.core.codes.blocks import dequantise_blocks, quantise_blocks
from rankworks.core.codes.books import Code, code_book
from rankworks.core.errors import ConfigError, TargetError
from rankworks.core.evidence import Evidence
from rankworks.core.progress import track
from rankworks.core.quantised import as_evidence
from rankworks.core.site import Site
from rankworks.core.state import NAME
from rankworks.core.targets import find_sites
from rankworks.quantize.hold import can_hold, hold
from rankworks.quantize.loop import Order, split


@torch.no_grad()
def quantise(
    model: nn.Module,
    targets: str | Sequence[str] = "all-linear",
    *,
    exclude: Sequence[str] = (),
    bits: int = 4,
    code: Code = "nf",
    block: int = 64,
    init: Order = "loftq",
    rank: int | None = 16,
    iterations: int = 1,
    holder: Literal["dense", "bitsandbytes"] = "dense",
    progress: bool = True,
) -> Evidence:
    """Quantise weights in place; return what a rank-`rank` adapter needs to make good what they lost.

    The adapter then stands against the quantised base: `adapt(model, "lora", rank=rank, init="loftq", evidence=...)`,
    or, where this was called with `init="pissa"`, `init={"init": "pissa", "quantised": True}`. Whoever loads that
    adapter later needs the same quantised base: save the model, or quantise the same weights alike.

    Args:
        model: without adapters; changed in place.
        targets, exclude: which weights, as in `adapt`.
        bits, code, block: 2 to 8 bits; "nf" normal float or "int" symmetric integers; weights per scale.
        init: the order in which product and quantised weight are found: `quantize/loop.py` says what each is good for.
        rank, iterations: of the product; the rank is at most min(out, in) of a site. None: no product, and no SVD.
        holder: "dense" leaves the quantised values in the weight's own type (a 16-bit type rounds them once more, and
            the product makes good for that too); "bitsandbytes" replaces linear layers by its Linear4bit (4-bit "nf").
        progress: show a bar where it takes long.

    One layer at a time, deterministic. Raises `ConfigError` or `TargetError` with the model untouched.
    """
    if (rank is not None and rank < 1) or iterations < 1 or block < 1:
        raise ConfigError(
            f"rank, iterations and block are at least 1, and were given as {rank}, {iterations}, {block}."
        )
    if init not in ("loftq", "pissa"):
        raise ConfigError(f"init is 'loftq' or 'pissa', not {init!r}.")
    book = code_book(code, bits)
    sites = find_sites(model, targets, exclude)
    _refuse(model, sites)
    if holder == "bitsandbytes":
        can_hold(sites, bits, code, block)
    evidence = {}
    for site in track(sites, "quantising") if progress else sites:
        stored = site.weight.dtype

        def quant(matrix: Tensor, stored: torch.dtype = stored) -> Tensor:
            return dequantise_blocks(quantise_blocks(matrix, book, block)).to(stored).to(matrix.dtype)

        exact = site.weight.to(torch.promote_types(stored, torch.float32))  # (out, in)
        if rank is None:
            site.write(quant(exact))
        else:
            quantised, product = split(exact, min(rank, *exact.shape), quant, init, iterations)
            site.write(quantised)
            evidence[site.name] = as_evidence(*product)
        if holder == "bitsandbytes":
            hold(model, site, block)
    return evidence


def _refuse(model: nn.Module, sites: Sequence[Site]) -> None:
    """Raise where a weight cannot be moved, or would be moved twice."""
    if getattr(model, NAME, None) is not None:
        raise ConfigError(
            "the model has adapters, which stand against the base as it is: quantise the base first, then adapt it."
        )
    seen: dict[Any, str] = {}
    for site in sites:
        if site.quantised:
            raise TargetError(f"{site.name} is quantised already: leave it out of targets (exclude).")
        place = (site.tensor, site.rows, site.expert)
        owner = seen.setdefault((id(place[0]), *place[1:]), site.name)
        if owner != site.name:
            raise TargetError(
                f"{site.name} and {owner} are the same weight, which can be quantised once: exclude one of them."
            )
