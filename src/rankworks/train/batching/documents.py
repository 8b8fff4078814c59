"""Attention over packed documents, one document at a time: the work of documents that lie in one row, and no more.

A mask that keeps packed documents apart still has attention compute every pair of the row: n documents of length l cost
(n l)^2 instead of n l^2 / 2. Here the row is cut into its documents, each goes through torch's fused causal attention,
and nothing is masked or padded.

transformers looks its attention up by name in a table that others may add to. A model that finds `NAME` there, and is
called with `documents` (the lengths, in order) and a mask of four dimensions (which it hands through as it is), gets
this; any other call gets what "sdpa" does. A compiler leaves it as it is: every batch has other lengths. Which models
pass `documents` on is not guessed but tried: `by_document`.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from rankworks.core.kernels.mode import compute_dtype, no_autocast
from rankworks.train.batching.packing import packed_as_alone

NAME = "rankworks_documents"

SHORT = 192
"""Tokens up to which torch's backward pass of attention on a CPU is faster in float32 than in bfloat16: 0.6 against
1.6 ms at 62 tokens, 1.5 against 3.2 at 128, 4.9 against 4.6 at 256 (9 heads of 64, one thread)."""


@torch.compiler.disable
def document_attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **settings: Any
) -> tuple[Tensor, None]:
    """Attend within each of `settings["documents"]`; without them, as "sdpa" does.

    query (1, heads, width, size), key and value (1, key heads, width, size); returns (1, width, heads, size).
    """
    documents: Sequence[int] | None = settings.pop("documents", None)
    if documents is None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, **settings)
    kind = compute_dtype(query)  # which may be autocast's
    if kind == torch.bfloat16 and query.device.type == "cpu" and torch.is_grad_enabled() and max(documents) <= SHORT:
        with no_autocast(query):
            return _apart(query.float(), key.float(), value.float(), documents, settings).to(kind), None
    return _apart(query, key, value, documents, settings), None


def _apart(query: Tensor, key: Tensor, value: Tensor, documents: Sequence[int], settings: dict[str, Any]) -> Tensor:
    """Each document's attention, one behind the other: (1, width, heads, size)."""
    window = settings.get("sliding_window")
    parts = []
    for q, k, v in zip(query.split(documents, 2), key.split(documents, 2), value.split(documents, 2), strict=True):
        near = None if window is None or q.shape[2] <= window else _within(q.shape[2], window, q.device)
        out = F.scaled_dot_product_attention(
            q,
            k,
            v,
            attn_mask=near,
            dropout_p=settings.get("dropout", 0.0),
            is_causal=near is None,
            scale=settings.get("scaling"),
            enable_gqa=k.shape[1] != q.shape[1],
        )
        parts.append(out.transpose(1, 2))  # (1, length, heads, size)
    return torch.cat(parts, dim=1)


def _within(length: int, window: int, device: torch.device) -> Tensor:
    """Return (length, length): whether a token may look at another, at most window - 1 places back."""
    places = torch.arange(length, device=device)
    back = places[:, None] - places
    return (back >= 0) & (back < window)


AttentionInterface.register(NAME, document_attention)
AttentionMaskInterface.register(NAME, sdpa_mask)


def document_inputs(documents: Sequence[int], device: torch.device) -> dict[str, Any]:
    """Return what a model must be called with, besides the tokens and their positions, within `by_document`."""
    return {"documents": list(documents), "attention_mask": torch.ones(1, 1, 1, 1, dtype=torch.bool, device=device)}


@contextlib.contextmanager
def by_document(model: nn.Module) -> Iterator[bool]:
    """Within the block the model attends document by document where it can; yields whether it does.

    Only models whose attention is "sdpa" change, and only where three packed documents come out as they do alone.
    """
    config = _config(model)
    before = getattr(config, "_attn_implementation", None)
    if before == NAME:  # within another such block
        yield True
        return
    if before != "sdpa":
        yield False
        return
    config._attn_implementation = NAME
    try:
        works = packed_as_alone(model, document_inputs)
        if not works:
            config._attn_implementation = before
        yield works
    finally:
        config._attn_implementation = before


def attends_by_document(model: nn.Module) -> bool:
    """Whether the model is within a `by_document` block that works."""
    return getattr(_config(model), "_attn_implementation", None) == NAME


def _config(model: nn.Module) -> Any:
    config: Any = getattr(model, "config", None)
    return config.get_text_config() if hasattr(config, "get_text_config") else config
