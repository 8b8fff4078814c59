"""A model under watch: taps on the layers of the sites, which gather inputs and gradients batch by batch."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from rankworks.calibrate.inputs import Kept, Reader
from rankworks.calibrate.statistic import Statistic
from rankworks.calibrate.tap import expert_part, part, tap
from rankworks.core.site import Site


class Watch:
    """The sites under watch: gathers G over the uses of a layer within a batch and hands it to the statistics."""

    def __init__(self, sites: Sequence[Site], kept: Kept, reader: Reader):
        device = sites[0].tensor.device
        self.kept, self.reader = kept, reader
        self.anchor = torch.zeros((), device=device, requires_grad=True)
        self.stacks: dict[int, list[Site]] = {}
        for site in sites:
            if site.expert is not None:
                self.stacks.setdefault(id(site.tensor), []).append(site)
        self.parameters = [group[0].tensor for group in self.stacks.values()]
        self.again: dict[str, Tensor] = {}  # gradients of layers that a batch uses more than once
        self.uses: dict[int, int] = {}

    def used(self, group: Sequence[Site], x: Tensor) -> None:
        """Take note of one use of a layer, and of its input where somebody asks for it."""
        module = id(group[0].module)
        self.uses[module] = self.uses.get(module, 0) + 1
        for site in group:
            if self.reader.reading[site.name]:
                self.reader.read(site, x)

    def found(self, group: Sequence[Site], G: Tensor) -> None:
        """Take one use's gradient; the last use of the batch hands the sum on."""
        module = id(group[0].module)
        self.uses[module] -= 1
        for site in group:
            mine = part(site, G)
            if site.name in self.again:
                mine = mine + self.again.pop(site.name).to(mine.device)
            if self.uses[module]:
                self.again[site.name] = mine.cpu()
            else:
                self._hand_on(site.name, mine)

    def _hand_on(self, site: str, G: Tensor) -> None:
        for statistic in self.kept[site].values():
            if not statistic.idle:
                statistic.gradient(G)

    def stacked(self, parameter: Tensor) -> None:
        """Take a stacked tensor's gradient and free it."""
        assert parameter.grad is not None
        for site in self.stacks[id(parameter)]:
            self._hand_on(site.name, expert_part(site, parameter.grad))
        parameter.grad = None

    def backward(self, value: Tensor) -> None:
        """Run the backward pass of a batch's loss as far as the taps reach."""
        if value.requires_grad:
            value.backward(inputs=[self.anchor, *self.parameters])
        self.anchor.grad = None
        for name, G in self.again.items():  # a use that the loss does not depend on has no gradient
            self._hand_on(name, G)

    def end(self) -> None:
        """Finish a batch, and let the statistics decide which of them are done."""
        self.again.clear()
        self.uses.clear()
        self.reader.end()
        by_name: dict[str, dict[str, Statistic]] = {}
        for site, found in self.kept.items():
            for name, statistic in found.items():
                by_name.setdefault(name, {})[site] = statistic
        for statistics in by_name.values():
            type(next(iter(statistics.values()))).settle(statistics)


@contextmanager
def watched(sites: Sequence[Site], kept: Kept, reader: Reader, backward: bool) -> Iterator[Watch]:
    """Put taps on the sites' layers, and take them off again whatever happens."""
    watch = Watch(sites, kept, reader)
    layers: dict[int, list[Site]] = {}
    for site in sites:
        if site.expert is None:
            layers.setdefault(id(site.module), []).append(site)
    hooks = []
    try:
        for group in layers.values():
            hooks.append(_tapped(watch, group, backward))
        for parameter in watch.parameters if backward else ():
            parameter.requires_grad_(True)
            hooks.append(parameter.register_post_accumulate_grad_hook(watch.stacked))
        yield watch
    finally:
        for hook in hooks:
            hook.remove()
        for parameter in watch.parameters:
            parameter.grad = None


def _tapped(watch: Watch, group: list[Site], backward: bool) -> Any:
    found = (lambda G: watch.found(group, G)) if backward else None
    return tap(group[0].module, watch.anchor, lambda x: watch.used(group, x), found)


@contextmanager
def quiet(model: nn.Module) -> Iterator[None]:
    """Eval mode and no parameter that asks for a gradient, within the block; both are put back."""
    modes = {name: module.training for name, module in model.named_modules()}
    flags = {name: p.requires_grad for name, p in model.named_parameters()}
    grads = {name: p.grad for name, p in model.named_parameters()}
    model.eval()
    model.requires_grad_(False)
    try:
        yield
    finally:
        for name, module in model.named_modules():
            module.training = modes[name]
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(flags[name])
            parameter.grad = grads[name]
