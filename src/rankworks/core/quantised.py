"""The start of a product that makes good what quantising the base lost, as `rankworks.quantise` found it.

    W ~ Q + U diag(v) V^T       A = (v/s)^(1/2) V^T  (r, in),   B = U (v/s)^(1/2)  (out, r),   s = the delta's scale

The base stands at Q, so the model starts near its unquantised self, and not at its base.
"""

from __future__ import annotations

import torch
from torch import Tensor

from rankworks.core.errors import ConfigError
from rankworks.core.evidence import Need
from rankworks.core.site import Shape
from rankworks.core.start import Place, Start, balanced

NAME = "quantisation"


def as_evidence(u: Tensor, values: Tensor, vh: Tensor) -> dict[str, Tensor]:
    """Return the parts of a product U diag(v) V^T as one site's evidence."""
    return {f"{NAME}.left": u, f"{NAME}.values": values, f"{NAME}.right": vh}


def quantised_start(place: Place) -> Start:
    """Return the balanced factors of the product, its `rank` largest triplets. Raises `ConfigError` for too few."""
    left, values, right = (place.evidence[f"{NAME}.{part}"].to(place.weight) for part in ("left", "values", "right"))
    if len(values) < place.rank:
        raise ConfigError(
            f"the base was quantised with a product of rank {len(values)} to make good for it, and the adapter's rank "
            f"is {place.rank}: call rankworks.quantise with rank={place.rank} on the unquantised model."
        )
    r = place.rank
    return balanced(left[:, :r], values[:r], right[:r], place.scale)


def _example(shape: Shape, generator: torch.Generator) -> dict[str, Tensor]:
    """The evidence of a random matrix, for tests of what starts from it."""
    return as_evidence(*torch.linalg.svd(torch.randn(*shape[:2], generator=generator), full_matrices=False))


QUANTISED = Need(
    NAME,
    source=(
        "which comes first: give evidence=rankworks.quantise(model, ...) of the bare model, or model.quantise in a "
        "recipe"
    ),
    example=_example,
)
"""The need for it; data have no part in it."""
