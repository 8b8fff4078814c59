"""Scaled: the changes of one adapter times factors, by which a search weighs sites against each other.

    y = base(x) + w (delta(x, base) - base(x))        that is  W' = W + w dW,  whatever makes dW

w () is a tensor that others own: one may stand at many sites, and what it is a function of gets its exact gradient,
<dL/dW', dW> summed over its sites. Where the change has factors, w goes into B and the layer runs in one pass.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from rankworks.core import share
from rankworks.core.delta import Base, Delta, Factors
from rankworks.core.errors import ConfigError
from rankworks.core.forms.lowrank import Factored
from rankworks.core.inputs import Input
from rankworks.core.kernels import fits, lowrank_linear
from rankworks.core.layer import AdaptedLayer
from rankworks.core.registry import MethodSpec
from rankworks.core.state import state_of


class Scaled(Delta):
    """Another delta's change times `factor`, sharing its tensors."""

    owner: Delta
    factor: Tensor

    def __init__(self, owner: Delta):
        super().__init__(owner.spec, owner.shape, owner.draw, owner.shared, owner.kind)
        object.__setattr__(self, "owner", owner)  # its tensors keep their names and their place
        object.__setattr__(self, "additive", owner.additive)
        device = next((p.device for p in owner.parameters()), torch.device(owner.draw.device))
        self.factor = torch.ones((), device=device)

    def _times(self, change: Tensor) -> Tensor:
        return self.factor.to(change.dtype) * change

    def forward(self, x: Input, base: Base) -> Tensor:
        """The base's output and the weighed change."""
        owner, frozen = self.owner, base.linear
        if not owner.additive:
            y = base(x)
            return y + self._times(owner(x, base) - y)
        if not isinstance(owner, Factored) or owner.reader is not owner or frozen is None:
            return base(x) + self.branch(x)
        if not isinstance(x, Tensor) or not fits(x, *frozen):
            return base(x) + self.branch(x)
        (B, A), shift = self.factors(), owner.shift()
        p = owner.dropout if owner.training else 0.0
        return lowrank_linear(x, *frozen, A, B, p, None if shift is None else self._times(shift))

    def branch(self, x: Input) -> Tensor:
        """w times the change, (..., out)."""
        return self._times(self.owner.branch(x))

    def dense(self, weight: Tensor) -> Tensor:
        """w dW, (out, in)."""
        return self._times(self.owner.dense(weight))

    def factors(self) -> Factors:
        """(w B, A)."""
        factors = self.owner.factors()
        assert factors is not None
        return Factors(self._times(factors.B), factors.A)

    def bias_change(self, weight: Tensor, bias: Tensor | None) -> Tensor | None:
        """w times the change of the bias."""
        change = self.owner.bias_change(weight, bias)
        return None if change is None else self._times(change)


@contextmanager
def scaled(model: nn.Module, name: str = "default") -> Iterator[dict[str, Scaled]]:
    """Within the block every change of an acting adapter is times a factor (1 at first); yields them by site name.

    Raises `ConfigError` for a method that changes no weight. Switching adapters within the block ends it.
    """
    state = state_of(model)
    adapter = state.adapter(name)
    made: dict[int, Scaled] = {}
    for delta in adapter.deltas.values():
        refuse_weightless(delta.spec)
        made.setdefault(id(delta), Scaled(delta))
    state.refresh()
    try:
        hosts = [m for m in model.modules() if hasattr(m, "_active")]
        for host in hosts:
            host._active = tuple((s, made.get(id(d), d)) for s, d in host._active)  # type: ignore[union-attr]
        share.link(host for host in hosts if isinstance(host, AdaptedLayer))
        yield {key: made[id(delta)] for key, delta in adapter.deltas.items()}
    finally:
        state.refresh()


def refuse_weightless(settings: MethodSpec) -> None:
    """Raise where there is no change of a weight to put a factor on."""
    if settings.method.cls.weightless:  # type: ignore[attr-defined]
        raise ConfigError(
            f"{settings.key} changes no weight, so a search has nothing to weigh: choose a delta that changes weights "
            "(lora, dora, vera, ...), or a selection that does not search (layra)."
        )
