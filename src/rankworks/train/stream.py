"""Learning from a stream as it is read: test-time training of a memory, or of any adapter, chunk by chunk.

    stream = rw.Stream(model)              # a model that carries a locas adapter
    for text in texts:
        stream.read(tokenizer(text).input_ids)
    stream.perplexity                      # of every token before anything was learned from it

For every chunk: the loss of its tokens after at most `window - chunk` earlier ones, which is what a reader has to pay;
then one optimizer step on that loss, for the trained tensors alone. A Locas memory is started from the first chunk
(`calibrate.memory.memorise`) after that chunk is scored. Moments are kept over the whole stream.

Chunks of 1,024 tokens in a window of 2,048, one AdamW step each (betas 0.9 and 0.999, no decay), at a rate of 4e-3: the
rate and the window are those of arXiv:2602.05085, the others are not given there.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from rankworks.calibrate.memory import memorise
from rankworks.core.errors import ConfigError, DivergedError
from rankworks.core.progress import track
from rankworks.core.state import state_of
from rankworks.train.losses.loss import IGNORE
from rankworks.train.losses.objective import Objective
from rankworks.train.optim import make_optimizer


@dataclass(frozen=True)
class Chunk:
    """A chunk that was read: the place of its first token in the stream, its scored tokens and their mean loss."""

    start: int
    tokens: int
    loss: float


class Stream:
    """Reads tokens and learns from them. `chunks` tells how it went.

    Args:
        model: a causal language model with an adapter that acts.
        chunk: tokens that are scored, and then learned from, at once.
        window: tokens the model sees at once, those before the chunk included.
        lr: learning rate of AdamW.
        learn: whether to learn at all; without it the stream is only scored.
        name: the adapter that is started from the first chunk, where it is a Locas memory.

    Raises `ConfigError` where the window is too narrow or nothing acts on the model.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        chunk: int = 1024,
        window: int = 2048,
        lr: float = 4e-3,
        learn: bool = True,
        name: str = "default",
    ):
        if not 1 <= chunk < window:
            raise ConfigError(
                f"a chunk of {chunk} tokens is read after earlier ones, within a window of {window}: make the window "
                "larger than the chunk, and both positive."
            )
        adapter = state_of(model).adapter(name)
        self.model, self.chunk, self.window, self.learn, self.name = model, chunk, window, learn, name
        self.memory = adapter.spec.delta.key == "locas"
        self.optimizer = make_optimizer(model, "adamw", lr, betas=(0.9, 0.999), weight_decay=0.0) if learn else None
        self.objective = Objective(model)
        self.context: list[int] = []  # the last tokens read
        self.read_tokens = 0
        self.chunks: list[Chunk] = []

    @property
    def loss(self) -> float:
        """Mean loss over all scored tokens."""
        scored = sum(c.tokens for c in self.chunks)
        return math.fsum(c.loss * c.tokens for c in self.chunks) / scored if scored else math.nan

    @property
    def perplexity(self) -> float:
        """exp(loss)."""
        return math.exp(self.loss)

    def read(self, tokens: Iterable[int], progress: bool = True) -> list[Chunk]:
        """Read more of the stream; returns its chunks, the last one shorter where the tokens do not fill it."""
        given = list(tokens)
        parts = [given[i : i + self.chunk] for i in range(0, len(given), self.chunk)]
        shown = track(parts, "reading") if progress else parts
        found = [self._chunk(part) for part in shown]
        self.chunks += found
        return found

    def _chunk(self, part: list[int]) -> Chunk:
        before = self.context[-(self.window - self.chunk) :]
        ids = torch.tensor([before + part])
        labels = torch.tensor([[IGNORE] * len(before) + part])
        start, scored = self.read_tokens, len(part) - (not before)  # the very first token follows nothing
        self.context = (self.context + part)[-self.window :]
        self.read_tokens += len(part)
        loss = self._learn(ids, labels, scored, first=not before) if scored else 0.0
        return Chunk(start, scored, loss)

    def _learn(self, ids: Tensor, labels: Tensor, scored: int, first: bool) -> float:
        device = next(self.model.parameters()).device
        ids, labels = ids.to(device), labels.to(device)
        learn = self.optimizer is not None
        mode = self.model.training
        self.model.train(learn)
        try:
            with torch.set_grad_enabled(learn):
                loss = self.objective({"input_ids": ids}, labels) / scored
            value = float(loss.detach())
            if not math.isfinite(value):
                raise DivergedError(
                    f"the loss became {value} at token {self.read_tokens} of the stream: lower lr, or start again from "
                    "a saved adapter. Nothing was learned from that chunk."
                )
            if self.optimizer is not None:
                if first and self.memory and ids.shape[1] > 1:
                    memorise(self.model, ids, self.name)  # then the chunk is learned from with the memory it started
                    with torch.enable_grad():
                        loss = self.objective({"input_ids": ids}, labels) / scored
                self.optimizer.zero_grad(set_to_none=True)
                loss.backward()
                self.optimizer.step()
                self.optimizer.zero_grad(set_to_none=True)
        finally:
            self.model.train(mode)
        return value
