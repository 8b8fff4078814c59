"""LISA: a few blocks of the model are trained at a time, chosen at random, and what surrounds the blocks always.

    at steps 0, K, 2 K, ...     choose gamma of the N blocks without replacement, each with probability gamma / N
    until the next choice       these, embeddings, the last norm and the head are trained by the `base`; the others rest

K = `refresh`, gamma = `blocks`. A block that rests has no gradient, takes no step and does not decay. Its state is
dropped when its rest begins, so that the memory is that of gamma blocks; `at_switch: keep` leaves it there, as the
released callback does, and a block goes on with old moments when its turn comes again. gamma = N is the base, gamma = 0
trains what surrounds the blocks alone.

Blocks are the elements of the model's stacks (core/optim/stack.py); `stack` names one where others are not meant. What
the model does not train stays frozen. The choice is a function of (seed, period), so processes and resumed runs agree.
Several processes: DistributedDataParallel must be told that some parameters get no gradient (find_unused_parameters);
the own loop does so. After a run everything can be trained again.

Defaults: gamma 2 is the paper's setting for LLaMA (its scripts have 1), K 20 that of its scripts. State: the base's, of
what surrounds the blocks and of gamma blocks; formulas count gamma blocks spread evenly, exact where all are alike:
LLaMA-7B with gamma 2 trains 666,914,816 numbers at a time.
Source: arXiv:2403.17919, algorithm 1, and its released code.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from rankworks.core.draw import Draw
from rankworks.core.errors import ConfigError
from rankworks.core.fields import Setting
from rankworks.core.hooks import Hook, Moment
from rankworks.core.optim.method import Group
from rankworks.core.optim.over import Over
from rankworks.core.optim.resting import rest, wake
from rankworks.core.optim.stack import stacked_blocks
from rankworks.core.registry import optimizer


@optimizer("lisa", title="LISA", year=2024, paper="arXiv:2403.17919")
class LISA(Over):
    """Any optimizer on a few random blocks at a time."""

    try_with: ClassVar[Mapping[str, Any]] = {"blocks": 1, "refresh": 2}

    blocks: int = Setting(2, "how many blocks are trained at a time", ge=0)
    refresh: int = Setting(20, "steps from one choice of blocks to the next", ge=1)
    at_switch: Literal["drop", "keep"] = Setting("drop", "what becomes of a block's state when its rest begins")
    stack: str | None = Setting(None, "the module whose children are the blocks; null: all stacks of the model")
    seed: int = Setting(0, "of the choices")

    def groups(self, model: nn.Module, lr: float) -> list[Group]:
        """The base's, with the number of each parameter's block, None around them, and how many there are."""
        blocks = list(stacked_blocks(model, self.stack).values())
        if self.blocks > len(blocks):
            raise ConfigError(
                f"lisa is to train {self.blocks} blocks at a time and the model has {len(blocks)}: lower `blocks`, or "
                f"use {self.spec.base.key} alone."
            )
        place = {id(p): number for number, block in enumerate(blocks) for p in block.parameters()}
        return [
            {**group, "blocks": [place.get(id(p)) for p in group["params"]], "of": len(blocks)}
            for group in super().groups(model, lr)
        ]

    def extra_hook(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> Hook:
        """What changes the blocks."""
        return Switching(self.blocks, self.refresh, self.at_switch == "drop", self.seed)

    def state_bytes(self, parameter: Tensor, group: Group) -> int:
        """The base's of what surrounds the blocks and of `blocks` of them; of all where state is kept."""
        told, of, block = super().state_bytes(parameter, group), group["of"], _block(parameter, group)
        if block is None or self.at_switch == "keep":
            return told
        return told * ((block + 1) * self.blocks // of - block * self.blocks // of)

    def rests(self, parameter: Tensor, group: Group) -> bool:
        """All blocks but `blocks` of them: the first ones, whose gradients go through the whole backward pass."""
        block = _block(parameter, group)
        return block is not None and block >= self.blocks


def _block(parameter: Tensor, group: Group) -> int | None:
    return next(b for p, b in zip(group["params"], group["blocks"], strict=True) if p is parameter)


class Switching(Hook):
    """Chooses the blocks of a period before its first forward pass, and lets the others rest. It has no state."""

    freezes = True

    def __init__(self, count: int, refresh: int, drop: bool, seed: int):
        self.count, self.refresh, self.drop, self.seed = count, refresh, drop, seed
        self.period = -1

    def active(self, period: int, of: int) -> list[int]:
        """Return the numbers of the blocks that are trained in a period, from 0."""
        return Draw(self.seed, f"blocks of period {period}").choice(of, self.count).tolist()

    def on_start(self, moment: Moment) -> None:
        """Enter the period of the next step."""
        self.period = -1
        self._enter(moment, moment.step // self.refresh)

    def before_forward(self, moment: Moment) -> None:
        """Enter the period of this step."""
        self._enter(moment, (moment.step - 1) // self.refresh)

    def on_end(self, moment: Moment) -> None:
        """Let everything be trained again."""
        for parameter, _, _ in _placed(moment.optimizer):
            wake(parameter)

    def _enter(self, moment: Moment, period: int) -> None:
        if period == self.period:
            return
        self.period = period
        for parameter, block, of in _placed(moment.optimizer):
            if block is None or block in self.active(period, of):
                wake(parameter)
                continue
            rest(parameter)
            if self.drop:
                moment.optimizer.state.pop(parameter, None)


def _placed(optimizer: torch.optim.Optimizer) -> Iterator[tuple[nn.Parameter, int | None, int]]:
    """Yield every parameter with its block, None around them, and how many blocks there are."""
    for group in optimizer.param_groups:
        for parameter, block in zip(group["params"], group["blocks"], strict=True):
            yield parameter, block, group["of"]
