"""Cross-entropy where a label stands, in chunks, so that the full logits never exist.

The logits of a language model are its largest tensor by far: 4 x 512 positions times a vocabulary of 49,152 are 400 MB
in float32, and the softmax and its gradient as much again. Fine-tuning needs them only where a label stands, and even
there not all at once. `chunked_cross_entropy` walks over the labelled positions in chunks; in each it makes the
logits, the loss and at once the gradients of the loss by the hidden states and by the head's trainable parameters:

    l = sum_t logsumexp(z_t) - z_t[y_t],  z_t = head(h_t);   dl/dh_t and dl/dtheta = sum_t dl_t/dtheta

Both are linear in the gradient g that flows into l, so the backward pass only multiplies what was kept by g: no logits
are computed twice. The head is called as a module, so an adapted, wrapped or quantised head counts.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

IGNORE = -100
"""The label of a position that has none."""

CHUNK_BYTES = 128 * 2**20
"""Upper bound of one chunk's float32 logits; the peak is about three times that (logits, softmax, gradient)."""


Answers = Callable[[Tensor], Tensor]
"""Makes of a chunk of targets (rows, ...) what is to be predicted there: probabilities (rows, vocabulary)."""


def chunk_rows(vocabulary: int, chunk_bytes: int = CHUNK_BYTES) -> int:
    """Return how many positions fit in one chunk of float32 logits (at least one)."""
    return max(1, chunk_bytes // (4 * vocabulary))


def chunked_cross_entropy(
    hidden: Tensor,
    targets: Tensor,
    head: Callable[[Tensor], Tensor],
    parameters: Sequence[Tensor],
    rows: int,
    answers: Answers | None = None,
) -> Tensor:
    """Return the SUM of the cross-entropies of `head(hidden)` against `targets`, a float32 (or float64) scalar.

    hidden: (n, width), the states at labelled positions; targets: (n,), the ids that follow them; head: hidden states
    to logits (n, vocabulary); parameters: the tensors the head uses that need a gradient; rows: positions in a chunk;
    answers: called on every chunk of targets (n, ...) where probabilities are to be predicted, and not ids.
    """
    trainable = [p for p in parameters if p.requires_grad]
    if torch.is_grad_enabled() and (hidden.requires_grad or trainable):
        return _ChunkedCrossEntropy.apply(hidden, targets, head, rows, answers, *trainable)  # type: ignore[return-value]
    total = hidden.new_zeros((), dtype=_wide_type(hidden.dtype))
    for h, t in zip(hidden.split(rows), targets.split(rows), strict=True):
        total = total + _loss(h, t, head, answers)
    return total


def wide(logits: Tensor) -> Tensor:
    """Return logits in the type that losses are computed in."""
    return logits.to(_wide_type(logits.dtype))


def _wide_type(dtype: torch.dtype) -> torch.dtype:
    """Return the type losses are summed in: float64 stays, everything else is float32."""
    return dtype if dtype == torch.float64 else torch.float32


def _loss(hidden: Tensor, targets: Tensor, head: Callable[[Tensor], Tensor], answers: Answers | None) -> Tensor:
    logits = head(hidden)  # (rows, vocabulary)
    return F.cross_entropy(wide(logits), targets if answers is None else answers(targets), reduction="sum")


class _ChunkedCrossEntropy(torch.autograd.Function):
    """Sum of cross-entropies whose gradients are made chunk by chunk in the forward pass (see the module)."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, targets: Tensor, head: Any, rows: int, answers: Any, *parameters: Tensor
    ) -> Tensor:
        total = hidden.new_zeros((), dtype=_wide_type(hidden.dtype))
        of_hidden = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None  # (n, width)
        of_parameters: list[Tensor | None] = [None] * len(parameters)
        for start in range(0, hidden.shape[0], rows):
            h = hidden[start : start + rows].detach()
            h.requires_grad_(of_hidden is not None)
            with torch.enable_grad():
                loss = _loss(h, targets[start : start + rows], head, answers)
            wanted = ([h] if of_hidden is not None else []) + list(parameters)
            gradients = list(torch.autograd.grad(loss, wanted, allow_unused=True))
            if of_hidden is not None:
                of_hidden[start : start + rows] = gradients.pop(0)
            for i, gradient in enumerate(gradients):
                if gradient is not None:
                    so_far = of_parameters[i]
                    of_parameters[i] = gradient if so_far is None else so_far.add_(gradient)
            total += loss.detach()
        ctx.of_hidden, ctx.of_parameters = of_hidden, of_parameters
        return total

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():  # what was kept is constant, so a second derivative would be silently wrong
            raise RuntimeError("the chunked loss has no second derivative: take the loss of all logits at once")
        (g,) = upstream
        of_hidden = None if ctx.of_hidden is None else ctx.of_hidden * g.to(ctx.of_hidden.dtype)
        of_parameters = [None if p is None else p * g.to(p.dtype) for p in ctx.of_parameters]
        return of_hidden, None, None, None, None, *of_parameters
