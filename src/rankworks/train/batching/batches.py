"""From examples to batches: which examples come when, and how they lie in tensors.

The order is a pure function of (seed, position): epoch after epoch a fresh permutation, without a break, so that every
batch is full and a run resumes from one number. The global batch of a step is the same for any number of
micro-batches and processes; it is cut into parts of similar length, so that little is padded.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from rankworks.core.errors import ConfigError, DataError
from rankworks.train.batching.packing import cheapest_rows
from rankworks.train.losses.loss import IGNORE


@dataclass(frozen=True)
class Example:
    """One tokenised example.

    input_ids: tokens; labels: for a language model one per token (its own id where it is learned, else -100); for a
    sequence classifier `label` is the class and `labels` is empty. segments: lengths of the documents in it, when
    it is a row of several.
    """

    input_ids: tuple[int, ...]
    labels: tuple[int, ...] = ()
    label: int | None = None
    segments: tuple[int, ...] = ()

    @property
    def learned(self) -> int:
        """How many positions count in the loss; the first token of a document follows nothing."""
        if self.label is not None:
            return 1
        starts = _starts(self.segments or (len(self.input_ids),))
        return sum(label != IGNORE for i, label in enumerate(self.labels) if i not in starts)


@dataclass(frozen=True)
class Batch:
    """Tensors of one micro-batch of one process.

    inputs: what the model takes (input_ids, position_ids or attention_mask), each (rows, width); labels: (rows, width),
    or (rows,) for a sequence classifier; tokens: how many of the rows x width are not padding; learned: labels in it.
    """

    inputs: dict[str, Tensor]
    labels: Tensor
    tokens: int
    learned: int
    documents: tuple[int, ...] | None = None  # the lengths in the one row, where attention goes by document

    def to(self, device: torch.device) -> Batch:
        """Return the batch on a device."""
        inputs = {name: tensor.to(device, non_blocking=True) for name, tensor in self.inputs.items()}
        return replace(self, inputs=inputs, labels=self.labels.to(device, non_blocking=True))


@dataclass
class Sampler:
    """An endless, seeded order over `size` examples. `position` counts the examples taken; it is the whole state."""

    size: int
    seed: int = 0
    position: int = 0
    _epoch: int = field(default=-1, repr=False)
    _order: list[int] = field(default_factory=list, repr=False)

    def __post_init__(self) -> None:
        if self.size < 1:
            raise DataError("there are no training examples: give data with at least one record.")

    @property
    def epoch(self) -> int:
        """How many whole passes are done."""
        return self.position // self.size

    def take(self, count: int) -> list[int]:
        """Return the next `count` indices."""
        taken = []
        for _ in range(count):
            if self._epoch != self.epoch:
                self._epoch = self.epoch
                generator = torch.Generator().manual_seed(self.seed * 1_000_003 + self.epoch)
                self._order = torch.randperm(self.size, generator=generator).tolist()
            taken.append(self._order[self.position % self.size])
            self.position += 1
        return taken

    def state_dict(self) -> dict[str, int]:
        """Return (seed, size, position)."""
        return {"seed": self.seed, "size": self.size, "position": self.position}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Go on at a saved position; raises `DataError` when the data or the seed is another."""
        if (state["seed"], state["size"]) != (self.seed, self.size):
            raise DataError(
                f"the checkpoint was written with {state['size']} examples and seed {state['seed']}, this run has "
                f"{self.size} and {self.seed}: use the same data and seed to resume."
            )
        self.position, self._epoch = state["position"], -1


@dataclass(frozen=True)
class Collator:
    """Examples to tensors.

    pad: the filler id; packing: put several in a row; multiple: widths are rounded up to it; by_document: with packing,
    put all in one row without padding, for attention that goes by document.
    """

    pad: int = 0
    packing: bool = False
    multiple: int = 1
    by_document: bool = False

    def micro_batches(
        self, examples: Sequence[Example], accumulate: int = 1, rank: int = 0, world: int = 1
    ) -> list[Batch]:
        """Cut a global batch into `accumulate` micro-batches and return this process's share of each.

        Raises `ConfigError` when the examples cannot be shared out evenly.
        """
        parts = accumulate * world
        if len(examples) % parts:
            raise ConfigError(
                f"a global batch of {len(examples)} examples cannot be cut into {accumulate} x {world} equal parts."
            )
        ordered = sorted(examples, key=lambda e: len(e.input_ids), reverse=True)  # stable: deterministic
        size = len(examples) // parts
        mine = [(m * world + rank) * size for m in range(accumulate)]
        return [self.batch(ordered[start : start + size]) for start in mine]

    def batch(self, examples: Sequence[Example]) -> Batch:
        """Return one batch of the examples (a sequence classifier's when they carry a class)."""
        if examples[0].label is not None:
            return self._classified(examples)
        lengths = [len(e.input_ids) for e in examples]
        one_row = self.packing and self.by_document
        if one_row:
            rows = [list(range(len(examples)))]
        else:
            rows = cheapest_rows(lengths) if self.packing else [[i] for i in range(len(examples))]
        longest = max(sum(lengths[i] for i in row) for row in rows)
        width = longest if one_row else self._width(longest)
        ids = torch.full((len(rows), width), self.pad)
        positions = torch.arange(width).repeat(len(rows), 1)
        labels = torch.full((len(rows), width), IGNORE)
        for r, row in enumerate(rows):
            at = 0
            for example in (examples[i] for i in row):
                end = at + len(example.input_ids)
                ids[r, at:end] = torch.tensor(example.input_ids)
                labels[r, at:end] = torch.tensor(example.labels)
                for length in example.segments or (len(example.input_ids),):
                    positions[r, at:] = torch.arange(width - at)
                    labels[r, at] = IGNORE  # the first token of a document follows nothing
                    at += length
            if len(row) > 1 and at < width:
                positions[r, at:] = torch.arange(width - at)  # padding is a document of its own
        learned = int((labels[:, 1:] != IGNORE).sum())
        documents = tuple(n for e in examples for n in e.segments or (len(e.input_ids),)) if one_row else None
        return Batch({"input_ids": ids, "position_ids": positions}, labels, sum(lengths), learned, documents)

    def _classified(self, examples: Sequence[Example]) -> Batch:
        width = self._width(max(len(e.input_ids) for e in examples))
        ids = torch.full((len(examples), width), self.pad)
        mask = torch.zeros(len(examples), width, dtype=torch.long)
        for r, example in enumerate(examples):
            ids[r, : len(example.input_ids)] = torch.tensor(example.input_ids)
            mask[r, : len(example.input_ids)] = 1
        labels = torch.tensor([-1 if e.label is None else e.label for e in examples])
        tokens = int(mask.sum())
        return Batch({"input_ids": ids, "attention_mask": mask}, labels, tokens, len(examples))

    def _width(self, longest: int) -> int:
        return -(-longest // self.multiple) * self.multiple


def _starts(segments: Sequence[int]) -> set[int]:
    """Return where each segment begins."""
    starts, at = set(), 0
    for length in segments:
        starts.add(at)
        at += length
    return starts
