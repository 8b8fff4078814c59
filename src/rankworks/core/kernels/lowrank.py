"""Frozen linear layers that read one input, and a low-rank change of each: y_i = x W_i^T + b_i + k (x m) A_i^T B_i^T.

x (t, in), W_i (out_i, in), b_i (out_i,), A_i (r_i, in), B_i (out_i, r_i); m is the dropout mask of zeros and ones and
k = 1/(1 - p), both absent without dropout. One layer alone is the case of a single i; q, k and v of an attention, or
gate and up, are several, and what belongs to their common input is done once, with the A's one below the other:

    read      [h_1 ... h_n] = k (x m) A^T            (t, sum r_i), small
    write i   y_i = x W_i^T + b_i,  then  y_i += h_i B_i^T  in place

With g_i = dL/dy_i the backward pass is

    write i   dL/dB_i = g_i^T h_i,    dL/dh_i = g_i B_i,    G += g_i W_i  in place
    read      e = k [dL/dh_1 ... dL/dh_n],    dL/dA = e^T (x m),    dL/dx = G,  then  += (e A) m  in place

Nothing of the size of an output or of x is made besides the y_i and one G. Plain autograd makes each change and its
sum with the frozen output apart, and two gradients of x per layer that it then adds. Kept for the backward pass are x
(or how it was made, where autograd keeps all that it was made of: `recall`) unless every A is frozen, the h_i, and the
positions of what was dropped. W_i and b_i get no gradient; one that needs it takes the plain form. The derivative of
the backward pass itself (create_graph=True) is taken of the same formulas in ordinary operations.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from rankworks.core.kernels.drop import draw, kept, zero_
from rankworks.core.kernels.mode import compute_dtype, no_autocast, sees_through, wants_gradient
from rankworks.core.kernels.recall import maker, recall
from rankworks.linalg.thin import thin


class Reading(NamedTuple):
    """What layers with a common input need of it: the input itself (..., in) and the h_i (t, r_i)."""

    x: Tensor
    h: tuple[Tensor, ...]
    total: _Sum


class _Sum:
    """G, while one backward pass adds to it: the first layer's g W, into which the others add theirs.

    It is the very tensor that the first layer returned to autograd as the gradient of the reading's x, and autograd
    holds it as it is until the read's own backward runs, since nothing but this reading's layers sees that x. Only a
    derivative of the backward pass would; from then on every layer returns its own (`apart`).
    """

    def __init__(self) -> None:
        self.task, self.apart = -1, False
        self.tensor: Tensor | None = None

    def add(self, g: Tensor, weight: Tensor) -> Tensor | None:
        """Add g W (t, in). Returns it where it is this pass's first, else None: then it is added already."""
        if self.apart or g.device.type != "cpu":  # elsewhere layers may run on streams of their own
            return g @ weight
        task = torch._C._current_graph_task_id()
        if self.tensor is not None and self.task == task:
            self.tensor.addmm_(g, weight)
            return None
        self.task, self.tensor = task, g @ weight
        return self.tensor


def fits(x: Tensor, weight: Tensor, bias: Tensor | None) -> bool:
    """Whether the passes here serve this product: frozen operands of one type, and nobody who looks through it."""
    if sees_through() or wants_gradient(weight, bias):
        return False
    return x.is_floating_point() and (x.dtype == weight.dtype or compute_dtype(x) != x.dtype)


def lowrank_linear(
    x: Tensor, weight: Tensor, bias: Tensor | None, A: Tensor, B: Tensor, p: float = 0.0, shift: Tensor | None = None
) -> Tensor:
    """Return x W^T + b + dropout_p(x) A^T B^T + shift: (..., in) -> (..., out), in x's type or autocast's.

    weight (out, in) and bias (out,) are frozen; A (r, in) and B (out, r) may be of another floating type and get their
    gradients in it; 0 <= p < 1. Call it where `fits` says so.
    """
    return write(read(x, (A,), p), 0, weight, bias, B, shift)


def read(x: Tensor, A: Sequence[Tensor], p: float = 0.0) -> Reading:
    """Return what layers with the factors A (each (r_i, in)) need of their common input x (..., in)."""
    total, dtype = _Sum(), compute_dtype(x)
    if wants_gradient(x, *A):
        shared, *h = _Read.apply(x, dtype, p, total, *A)  # type: ignore[misc]
        return Reading(shared, tuple(h), total)
    cast, h, _ = _read(x, dtype, p, A)
    return Reading(cast, h, total)


def write(
    reading: Reading, i: int, weight: Tensor, bias: Tensor | None, B: Tensor, shift: Tensor | None = None
) -> Tensor:
    """Return layer i's output (..., out) from its frozen weight (out, in) and bias (out,) and its B (out, r_i).

    `shift` (out,) is a trained vector added to the change: one more column of B, whose h is 1, and no pass of its own.
    """
    x, h = reading.x, reading.h[i]
    if shift is not None:
        h = torch.cat([h, h.new_ones(len(h), 1)], dim=1)
        B = torch.cat([B, shift.to(B.dtype).unsqueeze(1)], dim=1)
    if wants_gradient(x, h, B):
        return _Write.apply(x, weight, bias, h, B, reading.total)  # type: ignore[return-value]
    return _write(x, weight, bias, h, B)


def _read(
    x: Tensor, dtype: torch.dtype, p: float, A: Sequence[Tensor]
) -> tuple[Tensor, tuple[Tensor, ...], Tensor | None]:
    """Return x in the type it is computed in, the h_i, and what was dropped."""
    with no_autocast(x):
        cast = x.to(dtype)
        flat = cast.reshape(-1, x.shape[-1])  # (t, in)
        dropped = draw(flat, p) if p else None
        h = thin(_masked(flat, dropped), _stack(A, dtype))
        if p:
            h.mul_(1 / (1 - p))
    return cast, h.split([a.shape[0] for a in A], 1) if len(A) > 1 else (h,), dropped


def _write(x: Tensor, weight: Tensor, bias: Tensor | None, h: Tensor, B: Tensor) -> Tensor:
    with no_autocast(x):
        # The layer's own call, so that a change of zero leaves its output as it is to the bit.
        y = F.linear(x, weight.to(x.dtype), None if bias is None else bias.to(x.dtype)).contiguous()
        y.view(-1, y.shape[-1]).addmm_(h, B.to(x.dtype).t())
    return y


def _stack(A: Sequence[Tensor], dtype: torch.dtype) -> Tensor:
    """The A's one below the other, (sum r_i, in)."""
    return torch.cat([a.to(dtype) for a in A]) if len(A) > 1 else A[0].to(dtype)


def _masked(flat: Tensor, dropped: Tensor | None) -> Tensor:
    """Return x m: a copy with the dropped coordinates at zero, or x itself without dropout."""
    return flat if dropped is None else zero_(flat.clone(memory_format=torch.contiguous_format), dropped)


class _Read(torch.autograd.Function):
    """x -> x (for the layers that write), h_1, ..., h_n; see the module's text."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, dtype: torch.dtype, p: float, total: _Sum, *A: Tensor) -> tuple[Tensor, ...]:
        cast, h, dropped = _read(x, dtype, p, A)
        shared = cast.detach()
        if not ctx.needs_input_grad[0]:
            ctx.mark_non_differentiable(shared)
        ctx.set_materialize_grads(False)
        ctx.reads = any(ctx.needs_input_grad[4:])  # a frozen A has no use for x afterwards
        ctx.maker = maker(x) if cast is x and ctx.reads else None
        ctx.save_for_backward(shared if ctx.reads and ctx.maker is None else None, dropped, *A)
        ctx.k, ctx.dtype, ctx.shape, ctx.total = 1 / (1 - p), x.dtype, x.shape, total
        return shared, *h

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        G, *of_h = gradients
        x, dropped, *A = ctx.saved_tensors
        x = x if ctx.maker is None else recall(ctx.maker)
        ctx.total.tensor = None
        ctx.total.apart |= torch.is_grad_enabled()
        pairs = [(e, a) for e, a in zip(of_h, A, strict=True) if e is not None]  # whose output led to the loss
        if ctx.total.apart and G is not None:
            G = G.clone()  # it may be another's tensor too, and is changed below
        of_x: Tensor | None = G
        parts: Iterator[Tensor] = iter(())
        if pairs:
            with no_autocast(pairs[0][0]):
                e = torch.cat([e for e, _ in pairs], dim=1) if len(pairs) > 1 else pairs[0][0]  # (t, sum r_i)
                used = [a for _, a in pairs]
                backward = _read_again if torch.is_grad_enabled() else _read_backward
                of_x, stacked = backward(G, e, x, dropped, used, ctx.k, ctx.shape if ctx.needs_input_grad[0] else None)
                parts = iter([] if stacked is None else stacked.split([a.shape[0] for a in used]))
        of_A = [None if e is None or not ctx.reads else next(parts).to(a.dtype) for e, a in zip(of_h, A, strict=True)]
        return None if of_x is None else of_x.to(ctx.dtype), None, None, None, *of_A


Shape = tuple[int, ...]


def _read_backward(
    G: Tensor | None,
    e: Tensor,
    x: Tensor | None,
    dropped: Tensor | None,
    A: Sequence[Tensor],
    k: float,
    shape: Shape | None,
) -> tuple[Tensor | None, Tensor | None]:
    """Return dL/dx (..., in), which is G changed in place, and dL/dA (sum r_i, in).

    The first is None where no `shape` of it is given, the second where x is not.
    """
    if dropped is not None:
        e = e * k
    of_A = None if x is None else thin(e.t(), _masked(x.reshape(-1, x.shape[-1]), dropped).t())
    if shape is None:
        return None, of_A
    stacked = _stack(A, e.dtype)
    if G is not None and dropped is None:
        G.view(-1, shape[-1]).addmm_(e, stacked)
        return G, of_A
    through = (e @ stacked) if dropped is None else zero_(e @ stacked, dropped)
    return through.view(shape) if G is None else G.add_(through.view(shape)), of_A


def _read_again(
    G: Tensor | None,
    e: Tensor,
    x: Tensor | None,
    dropped: Tensor | None,
    A: Sequence[Tensor],
    k: float,
    shape: Shape | None,
) -> tuple[Tensor | None, Tensor | None]:
    """The same in operations that autograd can differentiate once more."""
    e = e * k
    flat = None if x is None else x.reshape(-1, x.shape[-1])
    of_A = None if flat is None else e.t() @ (flat if dropped is None else flat * kept(flat, dropped))
    if shape is None:
        return None, of_A
    through = e @ _stack(A, e.dtype)  # (t, in)
    through = (through if dropped is None else through * kept(through, dropped)).view(shape)
    return through if G is None else G + through, of_A


class _Write(torch.autograd.Function):
    """x, h, B -> y; see the module's text."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, h: Tensor, B: Tensor, total: _Sum) -> Tensor:
        ctx.save_for_backward(weight, h if ctx.needs_input_grad[4] else None, B)
        ctx.shape, ctx.total = x.shape, total
        return _write(x, weight, bias, h, B)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (g,) = gradients
        weight, h, B = ctx.saved_tensors
        need_x, _, _, need_h, need_B, _ = ctx.needs_input_grad
        of_x = of_h = of_B = None
        with no_autocast(g):
            g = g.reshape(-1, g.shape[-1])  # (t, out)
            if need_B:
                of_B = thin(h.t(), g.t()).t().to(B.dtype)  # h^T g reads g along its rows, g^T h across them
            if need_h:
                of_h = thin(g, B.to(g.dtype).t())
            if need_x:
                weight = weight.to(g.dtype)
                of_x = g @ weight if torch.is_grad_enabled() else ctx.total.add(g, weight)
        return None if of_x is None else of_x.view(ctx.shape), None, None, of_h, of_B, None
