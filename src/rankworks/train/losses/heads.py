"""Split a language model into the part that makes hidden states and the head that makes logits of them.

Families differ in what happens after the head (Gemma 2 caps its logits, Cohere and Granite scale them), so the split is
not trusted: it is tried on a few tokens against the model's own logits, and a model that does not agree keeps its
own forward pass.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from rankworks.train.tried import remembered


@dataclass(frozen=True)
class SplitModel:
    """A backbone and a head with `head(backbone(ids)) == model(ids).logits`."""

    backbone: Any
    projection: nn.Module
    vocabulary: int
    cap: float | None = None
    factor: float = 1.0

    def head(self, hidden: Tensor) -> Tensor:
        """Hidden states (..., width) to logits (..., vocabulary), scaled and capped as the model's family does."""
        logits = self.projection(hidden)
        if self.factor != 1.0:
            logits = logits * self.factor
        if self.cap is not None:
            logits = torch.tanh(logits / self.cap) * self.cap
        return logits

    def hidden(self, **inputs: Any) -> Tensor:
        """Return the last hidden states (batch, length, width) of the backbone."""
        return first_output(self.backbone(**inputs))


def first_output(outputs: Any) -> Tensor:
    """Return the tensor a backbone computes, whether it comes in an output object or a tuple."""
    state = getattr(outputs, "last_hidden_state", None)
    return outputs[0] if state is None else state


def split_model(model: nn.Module) -> SplitModel | None:
    """Return the verified split of a causal language model, or None where it has none that agrees."""
    find_head, find_decoder = getattr(model, "get_output_embeddings", None), getattr(model, "get_decoder", None)
    projection = find_head() if find_head is not None else None
    backbone = find_decoder() if find_decoder is not None else getattr(model, "base_model", None)
    if not isinstance(projection, nn.Module) or not isinstance(backbone, nn.Module) or backbone is model:
        return None
    config: Any = getattr(model, "config", None)
    config = config.get_text_config() if hasattr(config, "get_text_config") else config
    factor = float(getattr(config, "logit_scale", None) or 1.0) / float(getattr(config, "logits_scaling", None) or 1.0)
    embeddings: Any = model.get_input_embeddings()  # type: ignore[operator]
    ids = (torch.arange(6, device=embeddings.weight.device) * 7 + 3).reshape(2, 3) % embeddings.weight.shape[0]
    vocabulary = int(getattr(projection, "out_features", embeddings.weight.shape[0]))
    split = SplitModel(backbone, projection, vocabulary, getattr(config, "final_logit_softcapping", None), factor)
    return split if remembered(model, "split", lambda: _agrees(model, split, ids)) else None


def _agrees(model: nn.Module, split: SplitModel, ids: Tensor) -> bool:
    """Compare the split with the model's own logits on a few tokens."""
    with evaluating(model), torch.no_grad(), torch.random.fork_rng(devices=_cuda_of(ids.device)):
        try:
            ours = split.head(split.hidden(input_ids=ids, use_cache=False))
        except (TypeError, RuntimeError, AttributeError):  # a backbone with another signature or other widths
            return False
        theirs = model(input_ids=ids, use_cache=False).logits
    if ours.shape != theirs.shape:
        return False
    scale = theirs.abs().max().clamp_min(1e-6)
    tolerance = 1e-4 if theirs.dtype in (torch.float32, torch.float64) else 2e-2
    return bool(((ours - theirs).abs().max() <= tolerance * scale).item())


def _cuda_of(device: torch.device) -> list[torch.device]:
    return [device] if device.type == "cuda" else []


@contextlib.contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Put every module in eval mode for a while and give each its own mode back."""
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes.items():
            module.training = mode
