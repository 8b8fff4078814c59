"""The loss of a model on a batch, as a module: what accelerate wraps where there are several processes."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rankworks.train.batching.batches import Batch
from rankworks.train.batching.documents import attends_by_document, document_inputs
from rankworks.train.losses.heads import SplitModel, first_output, split_model
from rankworks.train.losses.loss import CHUNK_BYTES, IGNORE, Answers, chunk_rows, chunked_cross_entropy, wide
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

    def forward(
        self, inputs: dict[str, Any], labels: Tensor, documents: tuple[int, ...] | None = None, teacher: Any = None
    ) -> Tensor:
        """Return the summed loss, a float32 scalar.

        labels: (rows, width), or (rows,) for a classifier. documents: the lengths in the one row, within `by_document`.
        teacher: see `Hook.teacher`. The loss is then the teacher's against the labels and, added to it, the model's
        against the probabilities that the teacher gives.
        """
        if documents is not None:
            if not attends_by_document(self.model):  # it would attend across all of them, and backwards
                raise RuntimeError("a batch in one row needs a model within `by_document`")
            inputs = inputs | document_inputs(documents, labels.device)
        where = None if labels.ndim == 1 else labels[:, 1:] != IGNORE  # the state at t predicts the token at t + 1
        targets = labels if where is None else labels[:, 1:][where]  # (n,)
        split = None if where is None or (self.whole_graph and torch.is_grad_enabled()) else self.split
        with autocast(labels.device, self.precision):
            if teacher is None:
                return self._against(targets, self._states(inputs, where, split), split)
            with teacher():
                known = self._states(inputs, where, split)
                taught = self._against(targets, known, split)

            def answers(states: Tensor) -> Tensor:
                with torch.no_grad(), teacher():  # the head may be another one too
                    return wide(states if split is None else split.head(states)).softmax(-1)

            return taught + self._against(known.detach(), self._states(inputs, where, split), split, answers)

    def _states(self, inputs: dict[str, Any], where: Tensor | None, split: SplitModel | None) -> Tensor:
        """Return what a head that was split off reads at the n labelled positions, (n, width), or else the logits."""
        if where is None:
            return self.call(**inputs).logits  # (rows, classes)
        if split is None:
            return self.model(**inputs, use_cache=False).logits[:, :-1][where]  # (n, vocabulary)
        return first_output(self.call(**inputs, use_cache=False))[:, :-1][where]

    def _against(
        self, targets: Tensor, states: Tensor, split: SplitModel | None, answers: Answers | None = None
    ) -> Tensor:
        """Return the summed cross-entropy of states (or logits) against classes, or what `answers` makes of targets."""
        if split is None:
            return F.cross_entropy(wide(states), targets if answers is None else answers(targets), reduction="sum")
        parameters = list(split.projection.parameters())
        rows = chunk_rows(split.vocabulary, self.chunk_bytes)
        return chunked_cross_entropy(states, targets, split.head, parameters, rows, answers)

    def loss(self, batch: Batch) -> Tensor:
        """Return the summed loss of a batch, which is brought to the model's device."""
        batch = batch.to(next(self.model.parameters()).device)
        return self(batch.inputs, batch.labels, batch.documents)
