"""`model.quantise`: the frozen base is moved to its quantised values before anything is put on it.

    model: {name: smollm2-135m, quantise: nf4}                 # normal float, 4 bits, 64 weights a scale
    model: {name: smollm2-135m, quantise: {bits: 3, block: 32, holder: dense}}

A start that makes good what quantising lost (`init: loftq`, or pissa with `quantised: true`) says with its key in which
order product and quantised weight are found, and with the adapter's rank how large the product is, site by site. Any
other adapter stands on the plainly quantised base.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

from pydantic import Field, model_validator
from torch import Tensor, nn

from rankworks.core.config import Config
from rankworks.core.evidence import Evidence
from rankworks.core.quantised import NAME
from rankworks.core.resolve import needs_of, resolve
from rankworks.core.spec import AdaptSpec
from rankworks.core.targets import find_sites
from rankworks.quantize import quantise
from rankworks.quantize.loop import Order

SHORT = {f"{code}{bits}": {"code": code, "bits": bits} for code in ("nf", "int") for bits in range(2, 9)}
"""What may stand in place of the block: nf4 is {code: nf, bits: 4}."""


class QuantiseConfig(Config):
    """How the base is quantised; see `rankworks.quantise`."""

    code: Literal["nf", "int"] = Field(default="nf", description="normal float, or symmetric integers")
    bits: int = Field(default=4, ge=2, le=8, description="bits of a code")
    block: int = Field(default=64, ge=1, description="weights per scale")
    targets: str | list[str] = Field(default="all-linear", description="which weights, as in adapt")
    exclude: list[str] = Field(default_factory=list, description="targets that stay as they are")
    iterations: int = Field(default=1, ge=1, description="rounds of a start that makes good what was lost")
    holder: Literal["dense", "bitsandbytes"] = Field(
        default="dense", description="quantised values in the weights' type, or packed in bitsandbytes' 4-bit layers"
    )

    @model_validator(mode="before")
    @classmethod
    def _short(cls, values: Any) -> Any:
        """Read `nf4`, `int8`, ..."""
        if not isinstance(values, str):
            return values
        if values not in SHORT:
            raise ValueError(f"{values!r} is no code: write nf4, or int8, or a block such as {{code: nf, bits: 4}}")
        return SHORT[values]


Products = Mapping[str, tuple[Order, int]]
"""What an adapter asks of the quantisation: {site: (order, rank of the product that makes good for it)}."""


def products(model: nn.Module, spec: AdaptSpec | None) -> dict[str, tuple[Order, int]]:
    """Return the products that an adapter starts from; of most adapters none."""
    if spec is None:
        return {}
    found: dict[str, tuple[Order, int]] = {}
    order: Order = "pissa" if spec.init.key == "pissa" else "loftq"
    for site, settings in resolve(model, spec):
        rank = settings.method.cls.factored_rank(settings)
        if rank and any(need.name == NAME for need in needs_of([(site, settings)], spec)):
            found[site.name] = order, rank
    return found


def quantise_base(model: nn.Module, config: QuantiseConfig, wanted: Products, progress: bool = True) -> Evidence:
    """Quantise the bare model in place; return what the adapter that wants these products starts from.

    Deterministic: the same weights, settings and products give the same base. Raises as `rankworks.quantise` does.
    """
    groups: dict[tuple[Order, int] | None, list[str]] = {}
    for site in find_sites(model, config.targets, config.exclude):
        groups.setdefault(wanted.get(site.name), []).append(site.name)
    how: dict[str, Any] = config.model_dump(include={"code", "bits", "block", "iterations", "holder"})
    evidence: dict[str, Mapping[str, Tensor]] = {}
    for product, names in groups.items():
        order, rank = product or ("loftq", None)
        evidence |= quantise(model, names, init=order, rank=rank, progress=progress, **how)
    return evidence


def together(*parts: Evidence | None) -> Evidence | None:
    """Return what several sources know of each site, or None where none was asked."""
    given: Sequence[Evidence] = [part for part in parts if part is not None]
    sites = {name for part in given for name in part}
    return {n: {k: t for part in given for k, t in part.get(n, {}).items()} for n in sorted(sites)} if given else None
