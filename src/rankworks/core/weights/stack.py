"""Stacked experts: modules that hold the matrices of many experts in one (E, ., .) parameter and slice it themselves.

As with layers, the module's class is swapped for one derived from its own; here every stacked parameter gets a
property of its name, which returns the stack with the active changes. The parameter stays where it was, under its
name: state dicts, optimisers and copies see no change, and the module's own code reads the changed stack.

A stack is changed once per forward: modules read it once per expert, and each reading would cost a whole stack.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from rankworks.core.delta import Delta
from rankworks.core.site import Site, orient_expert, stacked_parameters


class AdaptedStack(nn.Module):
    """Mixed in before the class of a module that holds stacks."""

    adapters: nn.ModuleDict  # adapter name -> ModuleDict(site key -> Delta)
    _active: tuple[tuple[Site, Delta], ...]
    _changed: dict[str, Tensor] | None  # the changed stacks of the forward that runs now

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The module's own forward, during which every stack is changed at most once."""
        if not self._active or self._changed is not None:
            return super().forward(*args, **kwargs)
        self._changed = {}
        try:
            return super().forward(*args, **kwargs)
        finally:
            self._changed = None

    def stack(self, name: str) -> Tensor:
        """Return the stack `name` with the active changes, (E, ., .): the parameter itself where none acts on it."""
        held = self._parameters[name]
        assert held is not None
        pairs = [(site, delta) for site, delta in self._active if site.param == name]
        if not pairs:
            return held
        if self._changed is not None and name in self._changed:
            return self._changed[name]
        changed = _change(self, held, pairs)
        if self._changed is not None:
            self._changed[name] = changed
        return changed


def _change(module: nn.Module, stack: Tensor, pairs: list[tuple[Site, Delta]]) -> Tensor:
    """Add the dense change of every adapted expert to the stack."""
    changes: dict[int, Tensor] = {}
    for site, delta in pairs:
        assert site.expert is not None
        change = delta.acting_dense(orient_expert(module, stack[site.expert].detach()))
        change = orient_expert(module, change).to(stack.dtype)
        changes[site.expert] = changes[site.expert] + change if site.expert in changes else change
    zero = torch.zeros_like(stack[0]) if len(changes) < len(stack) else None
    return stack + torch.stack([changes.get(e, zero) for e in range(len(stack))])  # type: ignore[misc]


@cache
def derived(cls: type, names: tuple[str, ...]) -> type:
    """Return the adapted class of a class whose instances hold these stacks; made once."""
    space: dict[str, Any] = {"__module__": __name__, "__doc__": cls.__doc__}
    space |= {name: property(lambda self, name=name: AdaptedStack.stack(self, name)) for name in names}
    return type(f"Adapted{cls.__name__}", (AdaptedStack, cls), space)


def wrap_stack(module: nn.Module) -> AdaptedStack:
    """Swap the class of a module that holds stacks, in place."""
    module.__class__ = derived(type(module), tuple(stacked_parameters(module)))
    host: Any = module
    host.adapters = nn.ModuleDict()
    host._active, host._changed = (), None
    return host


def unwrap_stack(host: AdaptedStack) -> None:
    """Give the module its own class back."""
    del host.adapters, host._active, host._changed
    host.__class__ = type(host).__mro__[2]
