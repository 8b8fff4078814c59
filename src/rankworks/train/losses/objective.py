"""The loss of a model on a batch, as a module: what accelerate wraps where there are several processes."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rankworks.train.batching.batches import Batch
from rankworks.train.batching.documents import attends_by_document, document_inputs
from rankworks.train.losses.heads import SplitModel, first_output, split_model
from rankworks.train.losses.loss import CHUNK_BYTES, IGNORE, chunk_rows, chunked_cross_entropy
from rankworks.train.precision import Precision, autocast


class Objective(nn.Module):
    """Sum of the cross-entropies over the labels of a batch; the caller divides by how many the global batch has.

    A causal language model is split into backbone and head, and logits are made only where a label stands; one whose
    family cannot be split keeps its own forward pass. A sequence classifier gives one cross-entropy per row.
    """

    split: SplitModel | None
    call: Any
    whole_graph: bool = False  # somebody may take a second derivative, so the loss is made of plain operations

    def __init__(self, model: nn.Module, chunk_bytes: int = CHUNK_BYTES, precision: Precision = "float32"):
        super().__init__()
        self.model = model
        self.precision: Precision = precision
        self.chunk_bytes = chunk_bytes
        split = split_model(model)
        call: Any = model if split is None else split.backbone
        object.__setattr__(self, "split", split)  # parts of `model`, not submodules of their own
        object.__setattr__(self, "call", call)

    def forward(self, inputs: dict[str, Any], labels: Tensor, documents: tuple[int, ...] | None = None) -> Tensor:
        """Return the summed loss, a float32 scalar.

        labels: (rows, width), or (rows,) for a classifier. documents: the lengths in the one row, within `by_document`.
        """
        if documents is not None:
            if not attends_by_document(self.model):  # it would attend across all of them, and backwards
                raise RuntimeError("a batch in one row needs a model within `by_document`")
            inputs = inputs | document_inputs(documents, labels.device)
        with autocast(labels.device, self.precision):
            if labels.ndim == 1:
                logits = self.call(**inputs).logits  # (rows, classes)
                return F.cross_entropy(logits.float(), labels, reduction="sum")
            where = labels[:, 1:] != IGNORE  # the state at t predicts the token at t + 1
            targets = labels[:, 1:][where]  # (n,)
            if self.split is None or (self.whole_graph and torch.is_grad_enabled()):
                logits = self.model(**inputs, use_cache=False).logits[:, :-1][where]  # (n, vocabulary)
                return F.cross_entropy(
                    logits.float() if logits.dtype != torch.float64 else logits, targets, reduction="sum"
                )
            hidden = first_output(self.call(**inputs, use_cache=False))[:, :-1][where]  # (n, width)
            parameters = list(self.split.projection.parameters())
            rows = chunk_rows(self.split.vocabulary, self.chunk_bytes)
            return chunked_cross_entropy(hidden, targets, self.split.head, parameters, rows)

    def loss(self, batch: Batch) -> Tensor:
        """Return the summed loss of a batch, which is brought to the model's device."""
        batch = batch.to(next(self.model.parameters()).device)
        return self(batch.inputs, batch.labels, batch.documents)
