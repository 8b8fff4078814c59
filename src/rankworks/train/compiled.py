"""torch.compile, layer by layer: a model's layers are alike, so what is compiled for the first serves them all.

A whole model compiled as one graph takes minutes, and again for every new shape that fits no earlier one. Here each
layer of a repeated stack is compiled in place with dynamic shapes: two graphs in all (the first layer's input asks for
no gradient, the others' does), whatever the depth and the lengths of the batches. Attention over packed documents
(train/batching/documents.py) stays outside of the graphs, so a compiled run packs as any other.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from torch import nn


def layers_of(model: nn.Module) -> list[nn.Module]:
    """Return the layers of the model's longest stacks of one class each; the model itself where there is none."""
    stacks = [list(m) for m in model.modules() if isinstance(m, nn.ModuleList) and len(m) > 1]
    alike = [stack for stack in stacks if len({type(layer) for layer in stack}) == 1]
    taken: list[nn.Module] = []
    inside: set[int] = set()
    for stack in alike:  # the model's own order has an outer stack before what is inside its layers
        if id(stack[0]) not in inside:
            taken += stack
            inside |= {id(m) for layer in stack for m in layer.modules()}
    return taken or [model]


@contextlib.contextmanager
def compiled(model: nn.Module) -> Iterator[list[nn.Module]]:
    """Within the block the model's layers run compiled; they compile at their first call. Yields the layers."""
    layers = layers_of(model)
    before = [layer._compiled_call_impl for layer in layers]
    for layer in layers:
        layer.compile(dynamic=True)
    try:
        yield layers
    finally:
        for layer, earlier in zip(layers, before, strict=True):
            layer._compiled_call_impl = earlier
