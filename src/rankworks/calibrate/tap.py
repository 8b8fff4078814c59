"""Taps: how a site is watched while data run through the model, with the model left as it was.

A layer's tap is a forward hook. It hands the layer's output on through a node of autograd's graph that, when the
output's gradient g arrives, forms the gradient of the weight from g and the layer's input x at once, and lets it go:

    linear, conv1d_hf    G = g^T x        (summed over tokens)
    conv, embedding      G by autograd, of the layer alone run again on x

so no parameter needs a gradient and at most one layer's G stands beside the sums. A stacked expert tensor has no layer
of its own: there the parameter itself takes part, and its gradient is freed when it has been added.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from rankworks.core.site import Site, is_conv1d_hf, orient_expert


class Through(torch.autograd.Function):
    """The identity on `output`, whose backward pass calls `found(g)`. `anchor` is what gives the graph an end."""

    @staticmethod
    def forward(ctx: Any, output: Tensor, anchor: Tensor, found: Callable[[Tensor], None]) -> Tensor:
        """Hand the output on."""
        ctx.found = found
        return output.clone()  # a view would forbid what follows to write in place

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        """Report g and hand it on."""
        (g,) = gradients
        found, ctx.found = ctx.found, None  # it holds the layer's input, which would live as long as the loss
        with torch.no_grad():
            found(g)
        return (g if ctx.needs_input_grad[0] else None), g.new_zeros(()), None


def tap(
    module: nn.Module, anchor: Tensor, read: Callable[[Any], None] | None, found: Callable[[Tensor], None] | None
) -> Any:
    """Watch a layer: `read(x)` on every input, `found(G)` on every gradient of its stored weight. Returns the hook."""

    def hook(layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor) -> Tensor | None:
        given: Tensor = args[0] if args else next(iter(kwargs.values()))
        if read is not None:
            read(given)  # the very object: siblings are known by it
        if found is None:
            return None
        take, x = found, given.detach()
        return Through.apply(output, anchor, lambda g: take(weight_gradient(layer, x, g)))

    return module.register_forward_hook(hook, with_kwargs=True)


def weight_gradient(layer: Any, x: Tensor, g: Tensor) -> Tensor:
    """Return dL/dW (out, in) of a layer from its input and the gradient of its output."""
    if isinstance(layer, nn.Linear) or is_conv1d_hf(layer):
        wide = torch.promote_types(g.dtype, torch.float32)
        return g.flatten(0, -2).to(wide).t() @ x.flatten(0, -2).to(wide)
    held = layer._parameters["weight"]
    weight = held.detach().clone().requires_grad_()
    layer._parameters["weight"] = weight
    try:
        with torch.enable_grad():
            (G,) = torch.autograd.grad(layer.forward(x), weight, g)  # forward: past the hooks
    finally:
        layer._parameters["weight"] = held
    return G.t() if isinstance(layer, nn.Embedding) else G.flatten(1)


def part(site: Site, G: Tensor) -> Tensor:
    """Return the part of a whole layer's gradient (out, in) that is the site's."""
    return G if site.rows is None else G[site.rows[0] : site.rows[1]]


def expert_part(site: Site, stacked: Tensor) -> Tensor:
    """Return one expert's gradient (out, in) of the stacked tensor's (E, ., .)."""
    return orient_expert(site.module, stacked[site.expert])
