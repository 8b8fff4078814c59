"""A site: a named place in a model that holds one weight, read and written in one orientation, (out, in).

| kind      | layer                                   | the weight as a matrix (out, in)              |
|-----------|-----------------------------------------|-----------------------------------------------|
| linear    | nn.Linear                               | weight                                        |
| conv1d_hf | transformers' Conv1D (GPT-2)            | weight^T                                      |
| conv      | nn.Conv1d, nn.Conv2d, nn.Conv3d         | weight flattened to (out, in/groups * kernel) |
| embedding | nn.Embedding                            | weight^T, (dimension, vocabulary)             |
| rows      | a row range of one of linear, conv1d_hf | those rows                                    |
| expert    | one slice of a stacked (E, ., .) tensor | that slice, transposed where stored (in, out) |
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from rankworks.core.errors import MergeError
from rankworks.core.weights.holders import dense_weight, is_quantised

KINDS = ("linear", "conv1d_hf", "conv", "embedding", "rows", "expert")


class Shape(tuple[int, int]):
    """The size of a weight seen as a matrix: `out` rows (features written) by `in_` columns (features read).

    `kernel` is the size of a convolution's kernel, (height, width) or another number of sides, and () elsewhere; a
    convolution's `in_` is its channels times all of these. A feed-forward block of k matrices has (k,) (core/block.py).
    """

    kernel: tuple[int, ...]

    def __new__(cls, out: int, in_: int, kernel: tuple[int, ...] = ()) -> Shape:
        """Make a pair that also knows its kernel; shapes of equal size are equal."""
        made = super().__new__(cls, (out, in_))
        made.kernel = tuple(kernel)
        return made

    def __getnewargs__(self) -> tuple[int, int, tuple[int, ...]]:
        """What a copy is made of."""
        return self[0], self[1], self.kernel

    @property
    def out(self) -> int:
        """Features written."""
        return self[0]

    @property
    def in_(self) -> int:
        """Features read."""
        return self[1]


@dataclass(eq=False)
class Site:
    """One weight of a model. `path` is the module's name; `rows` and `expert` narrow it to a part of the weight."""

    path: str
    kind: str
    module: Any  # the nn.Module that holds it
    param: str = "weight"
    rows: tuple[int, int] | None = None
    expert: int | None = None

    @property
    def name(self) -> str:
        """The site's full name: `path`, `path[start:stop]` for rows, `path.param#e` for expert e."""
        if self.rows is not None:
            return f"{self.path}[{self.rows[0]}:{self.rows[1]}]"
        if self.expert is not None:
            return f"{self.path}.{self.param}#{self.expert}"
        return self.path

    @property
    def key(self) -> str:
        """The site's name within its module, legal as a module name: `weight`, `rows_0_768`, `down_proj_3`."""
        if self.rows is not None:
            return f"rows_{self.rows[0]}_{self.rows[1]}"
        return self.param if self.expert is None else f"{self.param}_{self.expert}"

    @property
    def own_parameter(self) -> str | None:
        """The name of the module's parameter that is changed; None for a block of several layers."""
        return self.param

    @property
    def tensor(self) -> nn.Parameter:
        """The parameter that holds the weight, as the module stores it."""
        held = self.module._parameters.get(self.param)  # not getattr: an adapted stack's attribute is the changed one
        return getattr(self.module, self.param) if held is None else held

    @property
    def quantised(self) -> bool:
        """Whether the weight is held in fewer bits, so that `weight` is a dequantised copy."""
        return is_quantised(self.tensor)

    @property
    def weight(self) -> Tensor:
        """The weight as a matrix (out, in): a view where the layout allows, detached from autograd."""
        stored = dense_weight(self.tensor, self.module).detach()
        if self.expert is not None:
            return orient_expert(self.module, stored[self.expert])
        if self.kind in ("conv1d_hf", "embedding") or (self.rows is not None and is_conv1d_hf(self.module)):
            stored = stored.t()
        elif self.kind == "conv":
            stored = stored.flatten(1)
        return stored if self.rows is None else stored[self.rows[0] : self.rows[1]]

    @property
    def bias(self) -> Tensor | None:
        """The layer's bias at this site's rows, (out,), or None."""
        bias = getattr(self.module, "bias", None) if self.expert is None else None
        if bias is None or self.rows is None:
            return bias
        return bias[self.rows[0] : self.rows[1]]

    @property
    def shape(self) -> Shape:
        """(out, in) without touching the weight's data."""
        if self.quantised:
            return Shape(*_linear_shape(self.module))
        out, in_ = self.weight.shape
        return Shape(out, in_, self.tensor.shape[2:] if self.kind == "conv" else ())

    @torch.no_grad()
    def write(self, matrix: Tensor) -> None:
        """Overwrite the weight in place with `matrix` (out, in), cast once to the stored type."""
        if self.quantised:
            raise MergeError(
                f"{self.name}: the base weight is quantised and cannot be overwritten. Load the base in a floating "
                "type to merge, or keep the adapter beside it."
            )
        target = self.weight  # a view of the stored tensor for every kind
        target.copy_(matrix.reshape(target.shape))

    def __repr__(self) -> str:
        return f"Site({self.name}, {self.kind}, {tuple(self.shape)})"


def kind_of(module: nn.Module) -> str | None:
    """Return the site kind of a module, or None where it holds no weight a delta can change."""
    if isinstance(module, NonDynamicallyQuantizableLinear):
        return None  # the output projection in nn.MultiheadAttention: its weight is read there, its forward never runs
    if isinstance(module, nn.Linear):
        return "linear"
    if is_conv1d_hf(module):
        return "conv1d_hf"
    if isinstance(module, nn.Conv1d | nn.Conv2d | nn.Conv3d) and not isinstance(module, _TRANSPOSED):
        return "conv"
    return "embedding" if isinstance(module, nn.Embedding) else None


_TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)


def is_conv1d_hf(module: Any) -> bool:
    """Whether a module is transformers' Conv1D; told by name, since importing transformers takes seconds."""
    return any(c.__name__ == "Conv1D" and c.__module__.startswith("transformers.") for c in type(module).__mro__)


def orient_expert(module: nn.Module, matrix: Tensor) -> Tensor:
    """Turn one expert's slice to (out, in) or back. Stored (out, in) unless the module says `is_transposed`."""
    return matrix.t() if getattr(module, "is_transposed", False) else matrix


def stacked_parameters(module: nn.Module) -> list[str]:
    """Return the names of the module's own 3-D floating parameters: stacks of expert matrices."""
    if kind_of(module) is not None:
        return []
    return [n for n, p in module.named_parameters(recurse=False) if p.dim() == 3 and p.is_floating_point()]


def _linear_shape(module: Any) -> tuple[int, int]:
    return (module.nf, module.nx) if is_conv1d_hf(module) else (module.out_features, module.in_features)
