"""What a site's weight multiplies, so that one line of mathematics serves every kind of layer.

A weight seen as a matrix (out, in) multiplies different things: a linear layer's weight multiplies vectors, a
convolution's kernel multiplies patches of an image, an embedding table multiplies one-hot rows. A method writes
`linear(linear(x, A), B)` and never asks which it is:

    Tensor    (..., in)                linear(x, M) = x M^T
    Patches   an image and a stride    linear(x, M) = the image convolved with the rows of M as kernels
    OneHot    token numbers            linear(x, M) = the columns of M those numbers name

M is (k, in); the result is always an ordinary tensor (..., k), channels last.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor

from rankworks.core import kernels

_CONV: dict[int, Any] = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}


@dataclass(frozen=True)
class Patches:
    """The patches a convolution with `groups == 1` reads from `image` (N, C, *spatial); in = C * prod(kernel)."""

    image: Tensor
    module: Any  # the convolution: kernel size, stride, padding and dilation are taken from it

    @property
    def dtype(self) -> torch.dtype:
        """The floating type of the image."""
        return self.image.dtype

    def linear(self, matrix: Tensor) -> Tensor:
        """Convolve with the rows of `matrix` (k, C * prod(kernel)) as kernels; returns (N, *spatial', k)."""
        conv = self.module
        if not len(matrix):  # a convolution has at least one output; a change without ranks has none
            return self.linear(matrix.new_zeros(1, matrix.shape[1]))[..., :0]
        kernel = matrix.to(self.image.dtype).reshape(-1, self.image.shape[1], *conv.kernel_size)  # (k, C, *kernel)
        return convolve(self.image, kernel, conv, groups=1).movedim(1, -1)

    def tokens(self) -> Tensor:
        """Return the patches themselves, (N, *spatial', in). Costs prod(kernel) times the image's memory."""
        size = self.image.shape[1] * torch.Size(self.module.kernel_size).numel()
        return self.linear(torch.eye(size, device=self.image.device, dtype=self.image.dtype))

    def dropout(self, p: float) -> Patches:
        """Drop pixels of the image with probability p."""
        return Patches(kernels.dropout(self.image, p), self.module)


@dataclass(frozen=True)
class OneHot:
    """Rows of an identity matrix named by `index` (...), as an embedding reads them; in = vocabulary size."""

    index: Tensor
    dtype: torch.dtype  # the type results have, which a table of integers cannot tell
    size: int
    padding_idx: int | None = None

    def linear(self, matrix: Tensor) -> Tensor:
        """Return the columns of `matrix` (k, vocabulary) at `index`: (..., k)."""
        return F.embedding(self.index, matrix.t(), self.padding_idx).to(self.dtype)

    def tokens(self) -> Tensor:
        """Return the one-hot rows themselves, (..., vocabulary)."""
        return F.one_hot(self.index, self.size).to(self.dtype)

    def dropout(self, p: float) -> OneHot:
        """Return itself: a look-up has no input coordinates to drop."""
        return self


Input: TypeAlias = Tensor | Patches | OneHot


def linear(x: Input, matrix: Tensor) -> Tensor:
    """Multiply the input by `matrix` (k, in): (..., in) -> (..., k), in the input's floating type."""
    if isinstance(x, Tensor):
        # Contiguous: on other strides matmul chooses its kernel by which operand needs a gradient, and a start's
        # trained and frozen factors, equal in number, must give products equal to the bit.
        return F.linear(x.contiguous(), matrix.to(x.dtype))
    return x.linear(matrix)


def tokens(x: Input) -> Tensor:
    """Return the input as an ordinary tensor (..., in), whatever that costs in memory."""
    return x if isinstance(x, Tensor) else x.tokens()


def dropout(x: Input, p: float, training: bool) -> Input:
    """Zero each input coordinate with probability p and scale the rest by 1/(1-p), in training only."""
    if not training or p == 0.0:
        return x
    return kernels.dropout(x, p) if isinstance(x, Tensor) else x.dropout(p)


def convolve(image: Tensor, kernel: Tensor, module: Any, groups: int) -> Tensor:
    """Apply `kernel` with the stride, padding (and its mode) and dilation of the convolution `module`, no bias."""
    padding = module.padding
    if module.padding_mode != "zeros":
        image = F.pad(image, module._reversed_padding_repeated_twice, mode=module.padding_mode)
        padding = 0
    return _CONV[kernel.dim() - 2](image, kernel, None, module.stride, padding, module.dilation, groups)
