"""Steps along a raw gradient, as long as Adam would make them: the factors come from a projection of it.

    channel    phi_i = ||N_i|| / (||R_i|| + 1e-8)      one per row of R = G Q (m, r), per column of R = P^T G (r, n)
    tensor     phi   = ||N||_F / (||R||_F + 1e-8)      one for all, and by default where both sides are projected
    W <- W - size f (phi M)                            f from the norm-growth limiter, M (m, n)

N is Adam's direction of R. ||phi M|| follows from the norms of M's channels, so phi M is never formed.
Source: arXiv:2410.01623, section 4; arXiv:2412.05270, section 4.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor

from rankworks.core.errors import ConfigError
from rankworks.core.optim.limiter import growth_factor
from rankworks.core.optim.projected import wide
from rankworks.core.optim.projection import Side, sides

Scaling = Literal["channel", "tensor"]
TINY = 1e-8


def check_scaling(key: str, scaling: Scaling | None, side: Side) -> None:
    """Raise where a gradient projected on both sides has no channels left."""
    if scaling == "channel" and side == "full":
        raise ConfigError(
            f"{key} with side='full' projects rows and columns, so that no channel of the gradient is left to scale: "
            "leave scaling out or set it to 'tensor', or take another side."
        )


def norm_ratio(N: Tensor, R: Tensor, shape: tuple[int, ...], side: Side, scaling: Scaling | None) -> Tensor:
    """Return phi, (m, 1), (1, n) or (1, 1), of N and R of a gradient of this shape (m, n), in float32 or wider."""
    left, right = sides(shape, side)
    axes = (0, 1) if scaling == "tensor" or (left and right) else (0,) if left else (1,)
    top, bottom = (torch.linalg.vector_norm(x, dim=axes, keepdim=True, dtype=wide(x)) for x in (N, R))
    return top / (bottom + TINY)


def add_scaled(
    parameter: Tensor, M: Tensor, ratio: Tensor, size: float, state: dict[str, Any], limit: float | None
) -> None:
    """Subtract size * f * ratio * M from a parameter (m, n) in place; limit=None: f = 1, and nothing is kept."""
    if limit is not None:
        axes = tuple(axis for axis in (0, 1) if ratio.shape[axis] == 1)
        lengths = torch.linalg.vector_norm(M, dim=axes, keepdim=True, dtype=wide(M))
        ratio = ratio * growth_factor(state, torch.linalg.vector_norm(ratio * lengths), limit)
    parameter.addcmul_(M, ratio.to(parameter.dtype), value=-size)
