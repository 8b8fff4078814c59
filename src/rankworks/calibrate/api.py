"""calibrate: run data through a model once and return what a method asks to know before it starts."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from rankworks.calibrate.statistics import STATISTICS, Statistic
from rankworks.calibrate.tap import expert_part, inputs_of, part, tap
from rankworks.core.build import needs_of, resolve
from rankworks.core.errors import ConfigError, UnknownNameError, did_you_mean
from rankworks.core.evidence import Evidence, Need, as_needs
from rankworks.core.progress import track
from rankworks.core.site import Site
from rankworks.core.spec import AdaptSpec
from rankworks.core.targets import find_sites

Loss = Callable[[nn.Module, Any], Tensor]
Kept = dict[str, dict[str, Statistic]]


def needed(model: nn.Module, spec: AdaptSpec) -> tuple[Need, ...]:
    """Return what an adapter of this spec needs to know from data, in a fixed order; often nothing."""
    return needs_of(resolve(model, spec), spec)


def calibrate(
    model: nn.Module,
    data: Iterable[Any],
    needs: Sequence[str | Need] | AdaptSpec = ("gradient",),
    *,
    targets: str | Sequence[str] = "all-linear",
    exclude: Sequence[str] = (),
    loss: Loss | None = None,
    progress: bool = True,
) -> Evidence:
    """Return {site name: {statistic: tensor}} over the batches of `data`, for `adapt(..., evidence=...)`.

    Args:
        model: the model as it is; in the end its tensors, flags, hooks and mode are what they were.
        data: batches, each used once in its order: mappings of the model's keyword arguments (with labels), or
            whatever `loss` takes.
        needs: names of statistics (`calibrate.STATISTICS`), such as "gradient" or "input_second_moment", or the
            `AdaptSpec` of an adapter: then what it needs is measured at its sites.
        targets, exclude: which weights, as in `adapt`.
        loss: `loss(model, batch)`, a scalar; by default `model(**batch).loss`.
        progress: show a bar where it takes long.

    The model runs in eval mode, so that equal calls give equal numbers. Sums stand on the CPU in at least float32; on
    the model's device no more than about one layer's gradient exists at a time. Raises `ConfigError`,
    `UnknownNameError` or `TargetError`.
    """
    if isinstance(needs, AdaptSpec):
        resolved = resolve(model, needs)
        sites, wanted = [site for site, _ in resolved], needs_of(resolved, needs)
    else:
        sites, wanted = find_sites(model, targets, exclude), as_needs(needs)
    _check(wanted)
    kept: Kept = {site.name: {n.name: STATISTICS[n.name](**n.options) for n in wanted} for site in sites}
    backward = any(STATISTICS[n.name].backward for n in wanted)
    _refuse(sites, [n.name for n in wanted])
    loss = loss or _model_loss
    count = 0
    with ExitStack() as stack:
        stack.enter_context(_quiet(model))
        watch = stack.enter_context(_watched(sites, kept, backward))
        for batch in track(data, "calibrating") if progress else data:
            with torch.set_grad_enabled(backward):
                value = loss(model, batch)
            if backward:
                watch.backward(value)
            count += 1
    if not count:
        raise ConfigError("calibrate was given no data: give at least one batch.")
    unused = [name for name, found in kept.items() if any(_empty(s) for s in found.values())]
    if unused:
        raise ConfigError(
            f"{unused[0]}" + (f" and {len(unused) - 1} more" if unused[1:] else "") + " took no part in the loss of "
            "these data, so nothing could be measured there: leave it out of targets (exclude), or give data that use "
            "it."
        )
    return {name: _results(found) for name, found in kept.items()}


def _results(found: Mapping[str, Statistic]) -> dict[str, Tensor]:
    """Return one site's results; the parts of a statistic that has several are "name.part"."""
    results: dict[str, Tensor] = {}
    for name, statistic in found.items():
        result = statistic.result()
        results |= {name: result} if isinstance(result, Tensor) else {f"{name}.{k}": t for k, t in result.items()}
    return results


class _Watch:
    """The sites under watch: gathers G over the uses of a layer within a batch and hands it to the statistics."""

    def __init__(self, sites: Sequence[Site], kept: Kept, anchor: Tensor):
        self.kept, self.anchor = kept, anchor
        self.stacks: dict[int, list[Site]] = {}
        for site in sites:
            if site.expert is not None:
                self.stacks.setdefault(id(site.tensor), []).append(site)
        self.parameters = [group[0].tensor for group in self.stacks.values()]
        self.again: dict[str, Tensor] = {}  # gradients of layers that a batch uses more than once
        self.uses: dict[int, int] = {}

    def read(self, group: Sequence[Site], x: Tensor) -> None:
        """Take one use's input."""
        for site in group:
            for statistic in self.kept[site.name].values():
                statistic.read(inputs_of(site, x))

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
                self._hand_on(site, mine)

    def _hand_on(self, site: Site, G: Tensor) -> None:
        for statistic in self.kept[site.name].values():
            statistic.gradient(G)

    def stacked(self, parameter: Tensor) -> None:
        """Take a stacked tensor's gradient and free it."""
        assert parameter.grad is not None
        for site in self.stacks[id(parameter)]:
            self._hand_on(site, expert_part(site, parameter.grad))
        parameter.grad = None

    def backward(self, value: Tensor) -> None:
        """Run the backward pass of a batch's loss as far as the taps reach."""
        if value.requires_grad:
            value.backward(inputs=[self.anchor, *self.parameters])
        self.anchor.grad = None
        for name, G in self.again.items():  # a use that the loss does not depend on has no gradient
            for statistic in self.kept[name].values():
                statistic.gradient(G)
        self.again.clear()
        self.uses.clear()


@contextmanager
def _watched(sites: Sequence[Site], kept: Kept, backward: bool) -> Any:
    """Put taps on the sites' layers, and take them off again whatever happens."""
    device = sites[0].tensor.device
    watch = _Watch(sites, kept, torch.zeros((), device=device, requires_grad=True))
    layers: dict[int, list[Site]] = {}
    for site in sites:
        if site.expert is None:
            layers.setdefault(id(site.module), []).append(site)
    reads = any(type(s).read is not Statistic.read for found in kept.values() for s in found.values())
    hooks = []
    try:
        for group in layers.values():
            hooks.append(_tapped(watch, group, reads, backward))
        for parameter in watch.parameters if backward else ():
            parameter.requires_grad_(True)
            hooks.append(parameter.register_post_accumulate_grad_hook(watch.stacked))
        yield watch
    finally:
        for hook in hooks:
            hook.remove()
        for parameter in watch.parameters:
            parameter.grad = None


def _tapped(watch: _Watch, group: list[Site], reads: bool, backward: bool) -> Any:
    module = group[0].module

    def count(x: Tensor) -> None:
        watch.uses[id(module)] = watch.uses.get(id(module), 0) + 1
        if reads:
            watch.read(group, x)

    return tap(module, watch.anchor, count, (lambda G: watch.found(group, G)) if backward else None)


@contextmanager
def _quiet(model: nn.Module) -> Any:
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


def _model_loss(model: nn.Module, batch: Any) -> Tensor:
    if not isinstance(batch, Mapping):
        raise ConfigError(
            f"a calibration batch is a mapping of the model's keyword arguments, not {type(batch).__name__}: give "
            "loss=lambda model, batch: ... for other data."
        )
    value = getattr(model(**batch), "loss", None)
    if value is None:
        raise ConfigError(
            "the model returned no loss for the calibration batch: put labels into it, or give loss=lambda model, "
            "batch: ..."
        )
    return value


def _check(needs: Sequence[Need]) -> None:
    for need in needs:
        if need.name not in STATISTICS:
            raise UnknownNameError(f"no statistic is called {need.name!r}.{did_you_mean(need.name, STATISTICS)}")


def _refuse(sites: Sequence[Site], needs: Sequence[str]) -> None:
    """Inputs are known for layers that read vectors or images."""
    reads = [n for n in needs if STATISTICS[n].read is not Statistic.read]
    for site in sites if reads else ():
        odd = site.kind in ("embedding", "expert") or getattr(site.module, "groups", 1) > 1
        if odd:
            raise ConfigError(
                f"{reads[0]} is not defined at {site.name}, of kind {site.kind!r}, whose inputs are no vectors of "
                "their own: leave it out of targets (exclude)."
            )


def _empty(statistic: Statistic) -> bool:
    return getattr(statistic, "total", statistic) is None
