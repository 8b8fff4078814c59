"""What becomes of the moments of R when the subspace changes: kept, reset, or realigned with the new coordinates.

    keep      the numbers stay where they are, whatever their coordinates now mean (GaLore, Fira)
    reset     they go; the rule begins again, with its count of steps (FRUGAL)
    realign   m <- T m and v <- (T*T) v,  T = P_new^T P_old, from the right with Q; entrywise squares for v

Realigning is exact for a mean: the new coordinates of what the old ones held. For the mean squares it is what T does to
the variance of coordinates that are not correlated, and never negative. Between choices of coordinates T is a partial
permutation: what stays chosen moves to its new place, what is new starts from zero, and nothing is multiplied.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor

from rankworks.core.optim.coordinates import Coordinates
from rankworks.core.optim.projection import Basis

Carry = Literal["keep", "reset", "realign"]
Kept = Basis | Coordinates
MOMENTS = ("exp_avg", "exp_avg_sq")


def carry(state: dict[str, Any], how: Carry, old: Kept, new: Kept) -> None:
    """Treat the moments in `state`, in a floating type, as `how` says when `old` gives way to `new`."""
    if how == "reset":
        drop_moments(state)
    elif how == "realign":
        for name in MOMENTS:
            if name in state:
                state[name] = realigned(state[name], old, new, squares=name == "exp_avg_sq")


def drop_moments(state: dict[str, Any]) -> None:
    """Forget the moments, also those kept in codes."""
    for name in MOMENTS:
        state.pop(name, None)
        state.pop(f"{name}_scales", None)


def realigned(moment: Tensor, old: Kept, new: Kept, *, squares: bool = False) -> Tensor:
    """Return a moment of R in the coordinates of `new`; `squares` says that it is a mean of squares.

    Raises `TypeError` where one of them is a basis and the other chooses coordinates.
    """
    if isinstance(old, Basis) and isinstance(new, Basis):
        left, right = _turn(old.P, new.P, squares), _turn(old.Q, new.Q, squares)
        moment = moment if left is None else left @ moment
        return moment if right is None else moment @ right.t()
    if isinstance(old, Coordinates) and isinstance(new, Coordinates):
        for dim, (before, after) in enumerate(((old.rows, new.rows), (old.columns, new.columns))):
            moment = _moved(moment, dim, before, after)
        return _moved(moment, 0, old.entries, new.entries)
    raise TypeError("moments can be realigned from a basis to a basis, or from coordinates to coordinates")


def _turn(old: Tensor | None, new: Tensor | None, squares: bool) -> Tensor | None:
    """T (r_new, r_old)."""
    if old is None or new is None:
        return None
    T = new.t() @ old
    return T.square() if squares else T


def _moved(moment: Tensor, dim: int, old: Tensor | None, new: Tensor | None) -> Tensor:
    if old is None or new is None:
        return moment
    source, target = meeting(old, new)
    shape = list(moment.shape)
    shape[dim] = len(new)
    return moment.new_zeros(shape).index_copy_(dim, target, moment.index_select(dim, source))


def meeting(old: Tensor, new: Tensor) -> tuple[Tensor, Tensor]:
    """Return where the values common to two lists of distinct integers stand: their places in `old` and in `new`."""
    ascending, order = old.sort()
    place = torch.searchsorted(ascending, new)
    place = place.clamp_(max=max(len(old) - 1, 0))
    hit = ascending[place] == new if len(old) else torch.zeros_like(new, dtype=torch.bool)
    target = hit.nonzero().squeeze(1)
    return order[place[target]], target
