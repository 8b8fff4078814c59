"""Blocks: sites that are a part of a model rather than one weight, for deltas that stand beside it (`weightless`).

| kind  | module               | shape                                    | the weight that stands for it (out, in)    |
|-------|----------------------|------------------------------------------|--------------------------------------------|
| ffn   | a feed-forward block | (d, k m), kernel (k,): k matrices (d, m) | [W_gate^T, W_up^T, W_down], or two of them |
| front | a model's backbone   | (d, vocabulary)                          | its word table^T, as the backbone reads it |

A feed-forward block is known by the names of its linear layers, of which it must have no others, and of its activation:

    gated    down(act(gate(x)) * up(x))          plain    down(act(up(x)))

Patterns name a block by its module (`mlp`, `model.layers.*.mlp`); `all-linear`, the default, means all blocks of a
model where the method takes blocks.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from rankworks.core.errors import MergeError
from rankworks.core.front import backbone_of
from rankworks.core.site import Shape, Site, is_conv1d_hf, kind_of
from rankworks.core.weights.holders import is_quantised

BLOCKS = ("ffn", "front")
_GATED = (("gate_proj", "up_proj", "down_proj"), ("w1", "w3", "w2"), ("wi_0", "wi_1", "wo"))
_PLAIN = (
    ("up_proj", "down_proj"),
    ("c_fc", "c_proj"),
    ("fc1", "fc2"),
    ("wi", "wo"),
    ("lin1", "lin2"),
    ("dense_h_to_4h", "dense_4h_to_h"),
)
_ACTIVATIONS = ("act_fn", "act", "activation_fn", "activation")

Replacement = tuple[Any, str, Any]  # (object, attribute, new value)


@dataclass(frozen=True)
class FFN:
    """A feed-forward block read through its parts; `gate` is None for the plain form."""

    gate: Any
    up: Any
    down: Any
    act: Callable[[Tensor], Tensor]

    @classmethod
    def of(cls, module: nn.Module) -> FFN | None:
        """Return the block's parts, or None where the module is no such block."""
        children = dict(module.named_children())
        linears = {n for n, m in children.items() if kind_of(m) in ("linear", "conv1d_hf")}
        others = [m for n, m in children.items() if n not in linears and n != "adapters"]
        act = next((getattr(module, n) for n in _ACTIVATIONS if callable(getattr(module, n, None))), None)
        if act is None or any(True for m in others for _ in m.parameters()):
            return None
        for names in (*_GATED, *_PLAIN):
            if linears == set(names):
                gate = children[names[0]] if len(names) == 3 else None
                return cls(gate, children[names[-2]], children[names[-1]], act)
        return None

    @property
    def layers(self) -> list[Any]:
        """Gate (where there is one), up, down."""
        return [layer for layer in (self.gate, self.up, self.down) if layer is not None]

    def widened(self, gate: Tensor | None, up: Tensor, down: Tensor) -> list[Replacement]:
        """Return what makes the block wider by r hidden units: rows `gate` and `up` (r, d), columns `down` (d, r)."""
        changes: list[Replacement] = []
        for layer, more, dim in ((self.gate, gate, 0), (self.up, up, 0), (self.down, down, 1)):
            if layer is None or more is None:
                continue
            if is_quantised(layer.weight):
                raise MergeError(
                    "the feed-forward block's weights are quantised and cannot be widened: load the base in a floating "
                    "type to merge, or keep the adapter beside it."
                )
            turned = is_conv1d_hf(layer)
            held = layer.weight.detach()
            piece = (more.t() if turned else more).to(held)
            wide = torch.cat([held, piece], dim=1 - dim if turned else dim)
            changes.append((layer, "weight", nn.Parameter(wide, layer.weight.requires_grad)))
            if dim == 0 and layer.bias is not None:
                bias = torch.cat([layer.bias.detach(), layer.bias.new_zeros(len(more))])
                changes.append((layer, "bias", nn.Parameter(bias, layer.bias.requires_grad)))
            width = wide.shape[1 - dim if turned else dim]
            size = ("nf" if dim == 0 else "nx") if turned else ("out_features" if dim == 0 else "in_features")
            changes.append((layer, size, width))
        return changes


def told_width(model: nn.Module) -> list[Replacement]:
    """Return what lets a model's configuration tell the width of its feed-forward blocks, where all have one width."""
    blocks = [found for module in model.modules() if (found := FFN.of(module)) is not None]
    widths = {Site("", kind_of(b.down) or "", b.down).shape.in_ for b in blocks}
    config = getattr(model, "config", None)
    name = next((n for n in ("intermediate_size", "d_ff", "n_inner", "ffn_dim") if hasattr(config, n)), None)
    return [(config, name, widths.pop())] if name is not None and len(widths) == 1 else []


@dataclass(eq=False)
class Block(Site):
    """A feed-forward block, or the front of a backbone, as a site. Its weight can be read, and nobody writes it."""

    @property
    def name(self) -> str:
        """The module's name."""
        return self.path or "model"

    @property
    def ffn(self) -> FFN:
        """The block's parts."""
        found = FFN.of(self.module)
        assert found is not None
        return found

    @property
    def own_parameter(self) -> str | None:
        """None: what it stands beside is a module."""
        return None

    @property
    def key(self) -> str:
        """The kind."""
        return self.kind

    @property
    def tensor(self) -> nn.Parameter:
        """The down projection's parameter, or the word table, for its device and type."""
        return self._table.weight if self.kind == "front" else self.ffn.down.weight

    @property
    def _table(self) -> Any:
        return self.module.get_input_embeddings()

    @property
    def weight(self) -> Tensor:
        """[W_gate^T, W_up^T, W_down] (d, k m), or the table's words as the backbone reads them (d, vocabulary)."""
        if self.kind == "front":
            scale = getattr(self._table, "embed_scale", None)
            words = Site("", "embedding", self._table).weight
            return words if scale is None else words * torch.as_tensor(scale).to(words)
        *reading, writing = [Site("", kind_of(layer) or "", layer).weight for layer in self.ffn.layers]
        return torch.cat([*(w.t() for w in reading), writing], dim=1)

    @property
    def bias(self) -> Tensor | None:
        """None."""
        return None

    @property
    def shape(self) -> Shape:
        """(d, k m), with kernel (k,); or (d, vocabulary)."""
        if self.kind == "front":
            return Site("", "embedding", self._table).shape
        layers = self.ffn.layers
        d, m = Site("", kind_of(layers[-1]) or "", layers[-1]).shape
        return Shape(d, len(layers) * m, (len(layers),))

    def write(self, matrix: Tensor) -> None:
        """Refuse: a block's matrices are not one weight."""
        raise MergeError(f"{self.name} is a block of layers, which no single matrix can replace.")


def blocks_of(path: str, module: nn.Module, kinds: tuple[str, ...], model: nn.Module) -> list[Site]:
    """Return the block at a module of the model, where it is of one of the kinds wanted."""
    if "front" in kinds and module is backbone_of(model):
        return [Block(path, "front", module)]
    if "ffn" in kinds and path and FFN.of(module) is not None:
        return [Block(path, "ffn", module)]
    return []
