"""Fold changes into a copy of a stored weight: every change in at least float32, against the base's own numbers."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from rankworks.core.delta import Delta
from rankworks.core.errors import MergeError
from rankworks.core.site import Site


@dataclass(eq=False)
class Copied(Site):
    """A site whose weight is read and written in a copy of the stored tensor."""

    held: Tensor | None = None

    @property
    def tensor(self) -> Tensor:  # type: ignore[override]
        """The copy, as the module stores the weight."""
        assert self.held is not None
        return self.held


@torch.no_grad()
def folded(pairs: Iterable[tuple[Site, Delta]]) -> Tensor:
    """Return one parameter with the changes of its sites added, as stored, in at least float32.

    The sites may be parts of the parameter and may overlap: all changes are measured against the base, as they are
    when the adapters act, and none against another's result.
    """
    pairs = list(pairs)
    stored = pairs[0][0].tensor.detach()
    wide = torch.promote_types(stored.dtype, torch.float32)
    total = stored.to(wide, copy=True).contiguous()
    for site, delta in pairs:
        held = Copied(site.path, site.kind, site.module, site.param, site.rows, site.expert, total)
        held.write(held.weight + delta.dense(site.weight.to(wide)).to(wide))
    return total


@torch.no_grad()
def folded_bias(pairs: Iterable[tuple[Site, Delta]]) -> Tensor | None:
    """Return a layer's bias with the changes of its sites added, in at least float32, or None where none changes it.

    Raises `MergeError` where a change has no bias to go to.
    """
    total: Tensor | None = None
    for site, delta in pairs:
        bias = site.bias
        change = delta.bias_change(site.weight, bias)
        if change is None:
            continue
        held = getattr(site.module, "bias", None)
        if held is None:
            raise MergeError(
                f"{site.name}: {delta.spec.key} changes the bias of this layer, which has none, so the change cannot "
                "be merged. Keep the adapter beside the base, or train it without its own bias."
            )
        wide: Tensor = held.detach().to(torch.promote_types(held.dtype, torch.float32), copy=True)
        total = wide if total is None else total
        start, stop = site.rows or (0, held.numel())
        total[start:stop] += change.to(total.dtype)
    return total
