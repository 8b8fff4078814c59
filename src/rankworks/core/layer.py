"""The adapted layer: the same module object with its class swapped for one derived from its own.

`nn.Linear` becomes `AdaptedLinear(AdaptedLayer, nn.Linear)`: still a Linear, still with `weight` and `bias` under
their old names, so base checkpoints, tied weights, `isinstance` and the model's own code see no change. The adapters'
tensors live below it as `adapters.<adapter name>.<site key>`. Swapping the class back gives the base bit for bit.

`_active` holds the (site, delta) pairs that act now; with none the base's own forward runs.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn

from rankworks.core.block import FFN, Block
from rankworks.core.delta import Delta
from rankworks.core.front import NAME as FRONT
from rankworks.core.front import Front
from rankworks.core.inputs import Input, OneHot, Patches, convolve
from rankworks.core.share import SharedInput
from rankworks.core.site import Site, kind_of
from rankworks.core.weights.stack import AdaptedStack, unwrap_stack, wrap_stack

Active = tuple[tuple[Site, Delta], ...]


class AdaptedLayer(nn.Module):
    """Mixed in before the layer's own class: adds the active deltas' changes to its output."""

    adapters: nn.ModuleDict  # adapter name -> ModuleDict(site key -> Delta)
    _active: Active
    _shared: SharedInput | None = None  # with the layers that read the same input

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        """The base's output with the active changes. Every kind of layer takes one argument, by place or by name."""
        if not self._active:
            return super().forward(*args, **kwargs)
        x: Tensor = args[0] if args else next(iter(kwargs.values()))
        kind = kind_of(self)
        if kind == "conv":
            return _conv(self, super().forward, x)
        if kind == "embedding":
            return _embedding(self, x)
        return _apply(self._active, x, BaseCall(self, super().forward, x, x))


class BaseCall:
    """The frozen layer for one call: `base(x)` runs it once and remembers, `weight` and `bias` read it."""

    __slots__ = ("_call", "_layer", "_output", "_raw", "_view", "site")

    def __init__(self, layer: Any, call: Callable[..., Tensor], raw: Tensor, view: Input, site: Site | None = None):
        self._layer, self._call, self._raw, self._view, self.site = layer, call, raw, view, site
        self._output: Tensor | None = None

    def __call__(self, x: Input) -> Tensor:
        """Return the frozen output for x, channels last, bias included."""
        if x is self._view:
            if self._output is None:
                self._output = self._run(self._raw)
            return self._output
        return self._run(x.image if isinstance(x, Patches) else x.index if isinstance(x, OneHot) else x)

    def _run(self, raw: Tensor) -> Tensor:
        out = self._call(raw)
        return out.movedim(1, -1) if isinstance(self._view, Patches) else out

    @property
    def weight(self) -> Tensor:
        """The frozen weight (out, in)."""
        assert self.site is not None
        return self.site.weight

    @property
    def bias(self) -> Tensor | None:
        """The frozen bias (out,), or None."""
        assert self.site is not None
        return self.site.bias

    @property
    def ffn(self) -> FFN:
        """The parts of the feed-forward block that is called."""
        assert isinstance(self.site, Block)
        return self.site.ffn

    @property
    def linear(self) -> tuple[Tensor, Tensor | None] | None:
        """(weight, bias) where the base is exactly F.linear of them and nothing else happens in it."""
        if self._output is not None or self.site is None or self.site.kind not in ("linear", "conv1d_hf"):
            return None
        if not _is_plain(type(self._layer)) or self.site.quantised:
            return None
        weight = self._layer.weight
        return (weight if self.site.kind == "linear" else weight.t()), self._layer.bias

    @property
    def shared(self) -> SharedInput | None:
        """The low-rank products of this call's input, where other layers read it too."""
        return self._layer._shared


class RowsCall(BaseCall):
    """The frozen layer restricted to a row range; it shares the whole layer's one run."""

    __slots__ = ("_whole",)

    def __init__(self, whole: BaseCall, site: Site):
        super().__init__(whole._layer, whole._call, whole._raw, whole._view, site)
        self._whole = whole

    def __call__(self, x: Input) -> Tensor:
        """Return the rows of the frozen output for x."""
        assert self.site is not None
        assert self.site.rows is not None
        return self._whole(x)[..., self.site.rows[0] : self.site.rows[1]]


def _apply(active: Active, x: Input, base: BaseCall) -> Tensor:
    """Sum the changes of the active deltas onto the base's output; one delta alone may fuse base and change."""
    y: Tensor | None = None
    for site, delta in active:
        if site.rows is None:
            base.site = site
            if y is None:
                y = delta(x, base)
            else:
                y = y + (delta.branch(x) if delta.additive else delta(x, base) - base(x))
    for site, delta in active:
        if site.rows is not None:
            y = base(x) if y is None else y
            start, stop = site.rows
            rows = RowsCall(base, site)
            change = delta.branch(x) if delta.additive else delta(x, rows) - rows(x)
            y = torch.slice_scatter(y, y[..., start:stop] + change, -1, start, stop)
    assert y is not None
    return y


def _conv(layer: Any, call: Callable[..., Tensor], image: Tensor) -> Tensor:
    """A convolution: the deltas see patches, channels last. Grouped kernels apply the dense change directly."""
    if image.dim() < layer.weight.dim():  # a single image
        return _conv(layer, call, image.unsqueeze(0)).squeeze(0)
    if layer.groups == 1:
        view = Patches(image, layer)
        return _apply(layer._active, view, BaseCall(layer, call, image, view)).movedim(-1, 1)
    y = call(image)
    for site, delta in layer._active:
        change = delta.acting_dense(site.weight).to(image.dtype).reshape(layer.weight.shape)
        y = y + convolve(image, change, layer, layer.groups)
        bias = delta.bias_change(site.weight, site.bias)  # (out,)
        if bias is not None:
            y = y + bias.to(y.dtype).reshape(-1, *[1] * (y.dim() - 2))
    return y


def _embedding(layer: Any, index: Tensor) -> Tensor:
    """A look-up: the deltas see one-hot rows. A table that scales its output scales the change alike (Gemma, BART)."""
    view = OneHot(index, layer.weight.dtype, layer.num_embeddings, layer.padding_idx)
    y = _apply(layer._active, view, BaseCall(layer, lambda i: nn.Embedding.forward(layer, i), index, view))
    scale = getattr(layer, "embed_scale", None)
    if scale is None:
        return y
    return y * (scale.to(layer.weight.dtype) if isinstance(scale, Tensor) else scale)


Host = AdaptedLayer | AdaptedStack | Front


@cache
def derived(cls: type) -> type:
    """Return the adapted class of a layer class; made once, so that equal layers stay of one class."""
    return type(f"Adapted{cls.__name__}", (AdaptedLayer, cls), {"__module__": __name__, "__doc__": cls.__doc__})


def _is_plain(cls: type) -> bool:
    """Whether the class below the adapted one computes F.linear and nothing more."""
    return cls.__mro__[2].__name__ in ("Linear", "Conv1D")


def host_of(site: Site) -> Host | None:
    """Return the place in the model that holds this site's deltas, or None where it has none yet."""
    if site.kind == "front":
        return site.module._modules.get(FRONT)
    return site.module if isinstance(site.module, AdaptedLayer | AdaptedStack) else None


def wrap(site: Site) -> Host:
    """Give the site's module a place for adapters, swapping its class in place."""
    host = host_of(site)
    if host is not None:
        return host
    if site.kind == "front":
        return Front(site.module)
    if site.expert is not None:
        stack = wrap_stack(site.module)
        _follow(stack)
        return stack
    site.module.__class__ = derived(type(site.module))
    layer: Any = site.module
    layer.adapters = nn.ModuleDict()
    layer._active = ()
    _follow(layer)
    return layer


def unwrap(site: Site) -> None:
    """Give the module its own class back, with the base's parameters as they are."""
    host: Any = host_of(site)
    if isinstance(host, Front):
        host.leave(site.module)
        return
    if isinstance(host, AdaptedStack):
        unwrap_stack(host)
    elif host is not None:
        del host.adapters, host._active
        host.__dict__.pop("_shared", None)
        host.__class__ = type(host).__mro__[2]
    if host is not None:
        _follow(host)


def _follow(module: Any) -> None:
    """Let accelerate's hook (offloading, device maps), which keeps the forward it found, call the present one."""
    if "_old_forward" in vars(module):
        module._old_forward = MethodType(type(module).forward, module)
