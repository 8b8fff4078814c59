"""What optimizers along the vectors of a cosine basis have in common: the weights they take, and AdamW for the rest."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from torch import Tensor, nn

from rankworks.core.optim.adamw import adamw_update
from rankworks.core.optim.dct import Vectors, basis_rows
from rankworks.core.optim.method import Group
from rankworks.core.optim.projection import Basis
from rankworks.core.optim.stepwise import Stepwise
from rankworks.core.targets import find_sites


def matrices_at(model: nn.Module, targets: str | Sequence[str]) -> set[int]:
    """Return the ids of the parameters that are matrices and hold the weights `targets` names."""
    return {id(site.tensor) for site in find_sites(model, targets) if site.tensor.dim() == 2}


def short_basis(index: Tensor, like: Tensor, shape: Sequence[int], vectors: Vectors) -> Basis:
    """Return the vectors `index` (r,) of a weight's short side, in the type of `like`: on the right for m >= n."""
    columns = basis_rows(index, min(shape), like, vectors).t()  # (S, r)
    return Basis(None, columns) if shape[0] >= shape[1] else Basis(columns, None)


class AlongCosines(Stepwise):
    """An optimizer that writes `project` for the weights marked `projected`; AdamW takes the others."""

    def __init__(self, groups: Iterable[Group], **defaults: Any):
        super().__init__(groups, projected=False, **defaults)

    def update(self, parameter: Tensor, gradient: Tensor, state: dict[str, Any], group: Group) -> None:
        """One step along the cosines, or AdamW's."""
        take = self.project if group["projected"] else adamw_update
        take(parameter, gradient, state, group)

    def project(self, parameter: Tensor, gradient: Tensor, state: dict[str, Any], group: Group) -> None:
        """Change a projected matrix in place."""
        raise TypeError(f"{type(self).__name__} must define project(parameter, gradient, state, group)")
