"""The one frozen base in memory that all arms share, and the proof that each of them gives it back bit for bit.

A seed also decides what a base is born with: a new classification head, or all weights where the start is random. Those
tensors are kept per seed and put in place before a run, so that `rankworks train` with this seed has the same base. A
quantised base may differ from one adapter to the next (compare/quantised.py).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from rankworks.compare.quantised import PLAIN, QuantisedBase
from rankworks.core.adapt import adapters, detach
from rankworks.core.errors import TrainingError
from rankworks.core.evidence import Evidence
from rankworks.core.hub import load_model
from rankworks.train.config import RunConfig
from rankworks.train.processes import processes
from rankworks.train.quantising import Products
from rankworks.train.sources import Task

CHUNK = 1 << 22


class Base:
    """The model of a comparison, its tokenizer, and the checksum it has with every seed."""

    def __init__(self, config: RunConfig, task: Task, seed: int):
        self.config, self.task, self.seed = config, task, seed
        self.model, self.tokenizer = self._load(seed)
        settings: Any = config.model
        self.quantised = None if settings.quantise is None else QuantisedBase(self.model, settings.quantise)
        self._own: dict[int, dict[str, Tensor]] = {}  # per seed, what differs from the first one's base
        self._sums = {self._state: checksum(self.model)}
        self._first = seed
        self._copy: dict[str, Tensor] | None = None
        self._flags = {name: p.requires_grad for name, p in self.model.named_parameters()}

    def _load(self, seed: int) -> tuple[Any, Any]:
        settings: Any = self.config.model
        labels = self.task.classes if settings.task == "classification" else None
        return load_model(
            settings.name,
            settings.dtype,
            settings.device or processes().device,
            settings.task,
            labels=labels,
            **born(settings, seed),
        )

    def use(self, seed: int, wanted: Products = PLAIN) -> nn.Module:
        """Return the model as it is born with a seed, quantised as an adapter's start wants it where it is quantised.

        What that start is made of is then in `evidence`.
        """
        if seed != self.seed and born(self.config.model, seed):
            if self.quantised is not None:
                self.quantised.give_back()
            self._turn(seed)
            if self.quantised is not None:
                self.quantised.take(wanted)
        if self.quantised is not None:
            self.quantised.switch(wanted)
        if self._state not in self._sums:
            self._sums[self._state] = checksum(self.model)
        return self.model

    @property
    def evidence(self) -> Evidence | None:
        """What quantising left over, or None where the base is not quantised."""
        return None if self.quantised is None else self.quantised.evidence

    @property
    def _state(self) -> tuple[Any, ...]:
        """What the base's bits follow from."""
        return self.seed, () if self.quantised is None else self.quantised.state

    def _turn(self, seed: int) -> None:
        """Put the tensors of a seed in place."""
        tensors = dict(named_tensors(self.model))
        if self.seed != self._first:
            _fill(tensors, self._own[self._first])
        if seed != self._first:
            if seed not in self._own:
                self._meet(seed, tensors)
            _fill(tensors, self._own[seed])
        self.seed = seed

    def _meet(self, seed: int, tensors: dict[str, Tensor]) -> None:
        """Load the base of a seed and keep what differs from the first one's."""
        other, _ = self._load(seed)
        new = {n: t for n, t in named_tensors(other) if not torch.equal(t, tensors[n])}
        self._own[seed] = new
        first = self._own.setdefault(self._first, {})
        first.update({n: tensors[n].detach().clone() for n in new if n not in first})

    def keep(self) -> None:
        """Remember every weight: before the whole model is trained."""
        self._copy = {n: t.detach().to("cpu", copy=True) for n, t in named_tensors(self.model)}

    def restore(self, arm: str) -> None:
        """Take all adapters off and check that the base is what it was. Raises `TrainingError` naming the arm."""
        if adapters(self.model):
            detach(self.model)
        if self._copy is not None:
            _fill(dict(named_tensors(self.model)), self._copy)
            self._copy = None
            for name, parameter in self.model.named_parameters():
                parameter.grad = None
                (getattr(parameter, "_post_accumulate_grad_hooks", None) or {}).clear()  # of layer-wise updates
                parameter.requires_grad_(self._flags[name])
        self.model.eval()
        if checksum(self.model) != self._sums[self._state]:
            raise TrainingError(
                f"the arm {arm} left the base model changed, so what would come after it could not be trusted, and the "
                "comparison stopped. Finished runs are kept: take the arm out of methods and give the command again."
            )


def born(settings: Any, seed: int) -> dict[str, Any]:
    """Return what `load_model` is told beyond the model's name, which may depend on the seed."""
    told: dict[str, Any] = {"seed": seed} if settings.task == "classification" else {}
    if getattr(settings, "start", "pretrained") == "random":
        told |= {"seed": seed, "start": settings.start}
    for name in ("tokenizer", "shape"):
        if getattr(settings, name, None) is not None:
            told[name] = getattr(settings, name)
    return told


def named_tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Yield every parameter and buffer once."""
    yield from model.named_parameters()
    yield from model.named_buffers()


@torch.no_grad()
def _fill(tensors: dict[str, Tensor], values: dict[str, Tensor]) -> None:
    for name, value in values.items():
        tensors[name].copy_(value)


@torch.no_grad()
def checksum(model: nn.Module) -> str:
    """Return a digest of every bit of the parameters and buffers, computed where they lie.

    The bytes of each tensor, as integers, are summed times odd numbers that depend on their place, modulo 2^64: a
    single changed number changes its product, whatever its place.
    """
    total = 0
    for number, (name, tensor) in enumerate(named_tensors(model)):
        flat = tensor.detach().contiguous().reshape(-1).view(torch.uint8)
        if flat.numel() % 4 == 0:
            flat = flat.view(torch.int32)
        here = sum(map(ord, name)) + number
        for start in range(0, flat.numel(), CHUNK):
            part = flat[start : start + CHUNK].to(torch.int64)
            place = torch.arange(start, start + part.numel(), device=part.device, dtype=torch.int64)
            here += int((part * (2 * place * 0x9E3779B1 + 0x85EBCA6B)).sum())
        total = (total * 0x100000001B3 + here) % (1 << 64)
    return f"{total:016x}"
