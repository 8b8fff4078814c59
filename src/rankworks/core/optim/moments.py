"""The moments of Adam, and the direction they give, of a gradient or of what it was projected to.

    m = b1 m + (1 - b1) R        v = b2 v + (1 - b2) R^2
    N = m / (sqrt(v) + eps')     factor = sqrt(1 - b2^t) / (1 - b1^t)        step = lr factor N

eps' = eps as the code of GaLore, Fira and APOLLO has it ("released"), or eps sqrt(1 - b2^t), which makes it torch's
AdamW. The moments are kept in R's type, or in 8 bits (bits=8): blocks of 256 in the dynamic code books, float32 where R
has less than 4,096 numbers. In 8 bits everything is computed in float32, and the step is taken with the moments before
they are rounded again, a chunk after the other, so that nothing of R's size exists in float32 but N.

One pass: torch's fused kernel does it all where the tensors lie alike in memory on a CPU or a CUDA device. It is called
with a step count so large that it corrects no bias; factor does.
Source: arXiv:1412.6980; arXiv:2110.02861 for 8 bits.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.optim.adam import adam

from rankworks.core.codes.blocks import Blocks, dequantise_blocks, quantise_blocks
from rankworks.core.codes.books import dynamic_book

SMALLEST, BLOCK = 4096, 256  # below so many numbers 8 bits save nothing; numbers that share a scale
CHUNK = 1024 * BLOCK  # numbers that are in float32 at one time
ENDLESS = 1e30  # a count of steps at which no power of a beta is left


class Direction(NamedTuple):
    """Where to go and how far: the step is lr * factor * N."""

    N: Tensor
    factor: float


def adam_direction(
    state: dict[str, Any],
    R: Tensor,
    t: int,
    betas: tuple[float, float],
    eps: float,
    *,
    released: bool = True,
    bits: int | None = None,
) -> Direction:
    """Update the moments of R in `state` (any shape) for step t, from 1, and return the direction of the step."""
    factor, added = _corrected(t, betas, eps, released)
    R = R if bits is None else R.float()
    N = torch.zeros_like(R, memory_format=torch.contiguous_format)
    for part in _parts(state, R, N, bits):
        _adam(*part, betas, added, -1.0)
    return Direction(N, factor)


def adam_step(
    parameter: Tensor,
    gradient: Tensor,
    state: dict[str, Any],
    t: int,
    betas: tuple[float, float],
    eps: float,
    lr: float,
    decay: float = 0.0,
    *,
    released: bool = True,
    bits: int | None = None,
) -> None:
    """Take the step on a parameter of the gradient's shape in place, in one pass where the types are equal.

    decay: weight decay, after the step as the released code has it, W (1 - lr decay), or before it.
    """
    factor, added = _corrected(t, betas, eps, released)
    shrunk = 1 - lr * decay
    size = lr * factor * (shrunk if released else 1.0)
    R = gradient if bits is None else gradient.float()
    if R.dtype == parameter.dtype and _alike(parameter, R):
        for part in _parts(state, R, parameter, bits):
            _adam(*part, betas, added, size, 1 - shrunk)
        return
    N, _ = adam_direction(state, R, t, betas, eps, released=released, bits=bits)
    parameter.mul_(shrunk).add_(N, alpha=-size)


def _corrected(t: int, betas: tuple[float, float], eps: float, released: bool) -> tuple[float, float]:
    """The factor of the step, and what is added to the uncorrected root."""
    root = math.sqrt(1 - betas[1] ** t)
    return root / (1 - betas[0] ** t), eps if released else eps * root


Part = tuple[Tensor, Tensor, Tensor, Tensor]


def _parts(state: dict[str, Any], R: Tensor, moved: Tensor, bits: int | None) -> Iterator[Part]:
    """Yield (what is moved, R, m, v) as a whole, or in 8 bits in chunks whose moments are written back after each."""
    if bits != 8 or R.numel() < SMALLEST:
        yield moved, R, plain(state, "exp_avg", R), plain(state, "exp_avg_sq", R)
        return
    names = {"exp_avg": True, "exp_avg_sq": False}  # signed or not
    for name in names:
        make_codes(state, name, R)
    R, moved = R.reshape(-1), moved.view(-1)
    for start in range(0, len(R), CHUNK):
        part = slice(start, start + CHUNK)
        m, v = (_decoded(state, name, part, signed) for name, signed in names.items())
        yield moved[part], R[part], m, v
        _encode(state, "exp_avg", part, m, True)
        _encode(state, "exp_avg_sq", part, v, False)


def _adam(
    moved: Tensor, R: Tensor, m: Tensor, v: Tensor, betas: tuple[float, float], eps: float, size: float, lost: float = 0
) -> None:
    """Update m and v, and W <- (1 - lost) W - size m / (sqrt(v) + eps)."""
    b1, b2 = betas
    if R.device.type in ("cpu", "cuda") and all(_alike(moved, other) for other in (R, m, v)):
        step = torch.full((), ENDLESS, dtype=torch.float32, device=R.device)
        adam(
            [moved], [R], [m], [v], [], [step], fused=True, amsgrad=False, beta1=b1, beta2=b2, eps=eps, maximize=False,
            lr=size, weight_decay=lost / size if size else 0.0, decoupled_weight_decay=True,
        )  # fmt: skip
        return
    m.lerp_(R, 1 - b1)
    v.mul_(b2).addcmul_(R, R, value=1 - b2)
    if lost:
        moved.mul_(1 - lost)
    moved.addcdiv_(m, v.sqrt().add_(eps), value=-size)


def _alike(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors are of one type and lie alike in memory, without holes."""
    dense = a.is_contiguous() and b.is_contiguous()
    return a.dtype == b.dtype and a.shape == b.shape and a.device == b.device and dense


def plain(state: dict[str, Any], name: str, like: Tensor) -> Tensor:
    """Return a tensor of the state in `like`'s shape and type, zeros at first."""
    if name not in state:
        state[name] = torch.zeros_like(like, memory_format=torch.contiguous_format)
    return state[name]


# ---- in 8 bits -----------------------------------------------------------------------------------------------------


def read_codes(state: dict[str, Any], name: str, like: Tensor, *, signed: bool) -> Tensor:
    """Return the float32 tensor of `like`'s shape that stands in the state in 8 bits; zeros where there is none yet."""
    if name not in state:
        return torch.zeros_like(like, dtype=torch.float32)
    return _decoded(state, name, slice(None), signed).reshape(like.shape)


def write_codes(state: dict[str, Any], name: str, value: Tensor, *, signed: bool) -> None:
    """Keep a tensor in 8 bits: `name` (n,) uint8 and `name`_scales (blocks,) float32."""
    make_codes(state, name, value)
    _encode(state, name, slice(None), value, signed)


def make_codes(state: dict[str, Any], name: str, like: Tensor) -> None:
    """Make the codes and scales of a tensor of zeros where the state has none."""
    if name not in state:
        n = like.numel()
        state[name] = torch.zeros(n, dtype=torch.uint8, device=like.device)
        state[f"{name}_scales"] = torch.zeros(-(-n // BLOCK), dtype=torch.float32, device=like.device)


def _blocks_of(part: slice) -> slice:
    return part if part.start is None else slice(part.start // BLOCK, -(-part.stop // BLOCK))


def _decoded(state: dict[str, Any], name: str, part: slice, signed: bool) -> Tensor:
    codes, scales = state[name][part], state[f"{name}_scales"][_blocks_of(part)]
    book = dynamic_book(signed).to(codes.device)
    return dequantise_blocks(Blocks(codes, scales, book, BLOCK, codes.shape))


def _encode(state: dict[str, Any], name: str, part: slice, value: Tensor, signed: bool) -> None:
    found = quantise_blocks(value, dynamic_book(signed).to(value.device), BLOCK)
    state[name][part] = found.codes
    state[f"{name}_scales"][_blocks_of(part)] = found.scales


def adam_bytes(numbers: int, element_size: int, bits: int | None = None) -> int:
    """Return the bytes of both moments of so many numbers."""
    if bits == 8 and numbers >= SMALLEST:
        return 2 * (numbers + 4 * -(-numbers // BLOCK))
    return 2 * numbers * (element_size if bits is None else 4)
