"""Checks of an initialiser, on LoRA or on three factors: its start is finite, fits every shape, and exports exactly."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from rankworks.conformance.case import Case, adapter_of, evidence_for, holds_numbers, refusals
from rankworks.conformance.errors import ConformanceError, NotApplicable
from rankworks.conformance.run import check
from rankworks.conformance.suite.start import starts_as_base
from rankworks.core.adapt import adapt
from rankworks.core.delta import Delta
from rankworks.core.forms.lowrank import LowRank
from rankworks.core.registry import Method
from rankworks.core.site import Site


@check("all", "init")
def start_is_finite_and_used(method: Method, case: Case) -> None:
    """The factors are finite, of the adapter's type, and one of the pair is not zero: else nothing could be learnt."""
    for dtype in (torch.float32, torch.bfloat16):
        for name, delta in adapter_of(case.adapted(dtype)).deltas.items():
            factors = _factors(delta)
            if not all(torch.isfinite(f).all() for f in factors):
                raise ConformanceError(
                    f"finite factors at {name} with a {dtype} base",
                    "NaN or infinite numbers",
                    "start(): in which type it computes",
                )
            if any(f.dtype != torch.float32 for f in factors):
                raise ConformanceError("float32 factors", ", ".join(str(f.dtype) for f in factors), "start()")
            if holds_numbers(delta) and sum(not f.any() for f in factors) > 1:
                raise ConformanceError(
                    f"at most one factor of zeros at {name}", "more, where every gradient is zero", "start()"
                )


def _factors(delta: Delta) -> list[Tensor]:
    """Return the factors an initialiser filled: A and B, and a core where there is one."""
    names = ("A", "B", "R", "N")
    return [t for n in names if isinstance(t := getattr(delta, n, None), Tensor)]


@check("once", "init")
def start_fits_every_shape(method: Method, case: Case) -> None:
    """Tall, wide and square weights, rank 1, the full rank and weights of deficient rank all get a finite start."""
    tried = 0
    for out, in_, rank in ((9, 4, 1), (9, 4, 4), (4, 9, 4), (6, 6, 6), (6, 6, 3), (1, 5, 1), (5, 1, 1)):
        for deficient in (False, True):
            linear = nn.Linear(in_, out).double()
            layer = nn.Sequential(linear)
            with torch.no_grad():
                weight = torch.randn(out, in_, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
                linear.weight.copy_(weight[:, :1] @ weight[:1] if deficient else weight)
            spec = case.spec(targets="0", rank=rank)
            if refusals(spec, Site("0", "linear", linear)):
                continue
            tried += 1
            x = torch.randn(3, in_, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
            before = layer(x)
            adapt(layer, spec, evidence=evidence_for(layer, spec))
            delta = adapter_of(layer).deltas["0"]
            where = f"weight ({out}, {in_}), rank {rank}" + (", of rank 1 itself" if deficient else "")
            if not all(torch.isfinite(p).all() for p in delta.parameters()):
                raise ConformanceError(f"finite factors for a {where}", "NaN or infinite numbers", "start()")
            if starts_as_base(case) and not torch.equal(layer(x), before):
                raise ConformanceError(f"the base's output for a {where}", "another", "start(): from_base")
    if not tried:
        raise NotApplicable("it takes none of the shapes tried")


@check("variants", "init")
def export_has_at_most_twice_the_rank(method: Method, case: Case) -> None:
    """The exact factors of a trained change have inner size rank, or 2 rank where the start came out of the base."""
    adapter = adapter_of(case.adapted(torch.float64, shaken=True))
    for name, delta in adapter.deltas.items():
        if not isinstance(delta, LowRank):
            raise NotApplicable("it fills three factors, whose product has their rank")
        factors = delta.factors()
        allowed = delta.rank * (1 if delta.A0 is None else 2)
        if factors.A.shape[0] > allowed:
            raise ConformanceError(
                f"at most {allowed} inner columns at {name}", str(factors.A.shape[0]), "LowRank.factors"
            )


@check("variants", "init")
def start_product_ignores_alpha_where_claimed(method: Method, case: Case) -> None:
    """A start taken out of the base puts the same product scale * B A there for every alpha, where it claims so."""
    if not getattr(method.cls, "scale_free", False):
        raise NotApplicable("it does not claim a start that is free of alpha (scale_free)")
    products = []
    for alpha in (1.0, 32.0):
        delta = adapter_of(case.adapted(torch.float64, alpha=alpha)).deltas[case.targets()[0]]
        if not isinstance(delta, LowRank):
            raise NotApplicable("it fills three factors")
        products.append(delta.scale * delta.B @ delta.A)
    if not torch.allclose(products[0], products[1], atol=1e-10):
        raise ConformanceError("the same scale * B A for alpha 1 and 32", "another", "start(): divide by scale")
