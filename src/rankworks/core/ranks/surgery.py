"""Rank surgery: remove, add or replace ranks of a trained pair while it trains, the optimizer's moments with them.

The tensors with an axis along the rank are A (rank, in), B (out, rank) and, where there are gates, g (rank,). A cut or
grown tensor is a new parameter in the same place of the module and of its parameter group; every tensor of the
optimizer's state that has the parameter's shape is cut and grown like it (new ranks have moments of zero), other
state, such as the step, stays. An optimizer that keeps something else of a tensor (a row of means, say) begins anew
with it. What is left keeps its scale: alpha follows the rank.

What is kept of the factors, moments and gradients is kept to the bit, and so is the next elementwise update from the
same gradients. The outputs after removing a rank that is zero are the same sums with terms of zero left out: the same
to the bit where the sums are exact, else to rounding, since a BLAS adds in an order that depends on the rank. The scale
is alpha/rank with the alpha that gives it; where no float does, it moves by one unit in the last place.

A run over several processes gathers gradients of parameters as they were when it began, so ranks change in a run of
one process, or between runs.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim import Optimizer

from rankworks.core.config import read
from rankworks.core.delta import Delta
from rankworks.core.errors import TrainingError
from rankworks.core.forms.lowrank import Pair
from rankworks.core.merge import refuse_merged
from rankworks.core.state import NAME, State, state_of

AXES = {"A": 0, "B": 1, "gate": 0}
"""The axis along the rank of every tensor that has one."""


def ranked(delta: Delta) -> dict[str, tuple[nn.Module, Tensor]]:
    """Return the trained tensors with an axis along the rank: {"A": (the module that holds it, the tensor), ...}.

    Raises `TrainingError` for a delta without a trained pair.
    """
    pair = delta.pair
    if not isinstance(pair, Pair):
        raise TrainingError(f"{delta.spec.key} has no trained pair of factors whose ranks could be changed.")
    found: dict[str, tuple[nn.Module, Tensor]] = {"A": (pair, pair.A), "B": (pair, pair.B)}
    gate = gated_of(delta)
    if gate is not None:
        found["gate"] = (gate, gate.gate)
    return found


def gated_of(delta: Delta) -> Any:
    """Return the `gated` delta (deltas/gated.py), this one or one inside, that holds a gate per rank; None without."""
    return next((m for m in delta.modules() if isinstance(m._parameters.get("gate"), nn.Parameter)), None)


@torch.no_grad()
def compact(model: nn.Module, name: str = "default", optimizer: Optimizer | None = None) -> dict[str, int]:
    """Remove the ranks whose gate is zero from every site of an adapter, the output unchanged; return what is left.

    A site without a trained pair, whose factors come from elsewhere (vera, lora-xs), keeps its gates of zero.
    Raises `MergeError` while adapters are merged.
    """
    state = state_of(model)
    refuse_merged(state, "cut ranks of")
    deltas = state.adapter(name).deltas
    for delta in {id(d): d for d in deltas.values()}.values():
        cut_closed(delta, optimizer)
    gates = {key: gated_of(delta) for key, delta in deltas.items()}
    return {key: int(torch.count_nonzero(gated.gate)) for key, gated in gates.items() if gated is not None}


@torch.no_grad()
def cut_closed(delta: Delta, optimizer: Optimizer | None = None) -> None:
    """Remove the ranks whose gate is zero, where the ranks can be removed."""
    gated = gated_of(delta)
    if gated is None or delta.pair is None:
        return
    index = gated.gate.nonzero().flatten()
    if len(index) < len(gated.gate):
        keep_ranks(delta, index, optimizer)


@torch.no_grad()
def keep_ranks(delta: Delta, index: Tensor, optimizer: Optimizer | None = None) -> None:
    """Keep the ranks of `index` (k,), in that order, and drop the others; the scale stays as it is."""
    scale = pair_of(delta).scale
    for name, (module, old) in ranked(delta).items():
        cut = _selecting(AXES[name], index)
        _put(module, name, nn.Parameter(cut(old.detach())), optimizer, cut)
    settle(delta, len(index), scale)


@torch.no_grad()
def grow_ranks(delta: Delta, more: Mapping[str, Tensor], optimizer: Optimizer | None = None) -> None:
    """Add ranks behind the others: `more` has A (n, in), B (out, n) and, where there are gates, "gate" (n,)."""
    scale = pair_of(delta).scale
    for name, (module, old) in ranked(delta).items():
        new = more[name].to(old)
        grown = nn.Parameter(torch.cat([old.detach(), new], dim=AXES[name]))
        _put(module, name, grown, optimizer, _padding(AXES[name], new.shape[AXES[name]]))
    settle(delta, len(pair_of(delta).A), scale)


@torch.no_grad()
def replace_ranks(delta: Delta, tensors: Mapping[str, Tensor], optimizer: Optimizer | None = None) -> None:
    """Put other factors in the place of the old, of any rank; their moments begin anew, the scale stays as it is."""
    scale = pair_of(delta).scale
    for name, (module, old) in ranked(delta).items():
        _put(module, name, nn.Parameter(tensors[name].to(old, copy=True)), optimizer, None)
    settle(delta, len(pair_of(delta).A), scale)


def pair_of(delta: Delta) -> Any:
    """Return the trained pair (`lowrank.Pair`) of a delta that has one."""
    ranked(delta)
    return delta.pair


def settle(delta: Delta, rank: int, scale: float) -> None:
    """Let a pair's settings say the rank it has now, at this scale."""
    pair_of(delta).settle(rank, scale)


def refuse_several_processes(what: str) -> None:
    """Raise `TrainingError` where ranks cannot change, in a run over several processes."""
    if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
        raise TrainingError(
            f"{what} changes the shapes of trained tensors in the middle of a run, which gradients gathered over "
            f"{dist.get_world_size()} processes do not allow: train it in one process."
        )


def _put(
    module: nn.Module,
    name: str,
    new: nn.Parameter,
    optimizer: Optimizer | None,
    change: Callable[[Tensor], Tensor] | None,
) -> None:
    """Put a parameter in another's place, in the module and in the optimizer; `change` makes its moments, or None."""
    old: Any = module._parameters[name]
    new.requires_grad_(old.requires_grad)
    if old.grad is not None and change is not None:
        new.grad = change(old.grad)
    setattr(module, name, new)
    if optimizer is not None:
        swap(optimizer, old, new, change)


def swap(
    optimizer: Optimizer, old: nn.Parameter, new: nn.Parameter, change: Callable[[Tensor], Tensor] | None = None
) -> None:
    """Let an optimizer train `new` in the place of `old`; what it does not train it leaves alone."""
    for group in optimizer.param_groups:
        group["params"] = [new if p is old else p for p in group["params"]]
    state = optimizer.state.pop(old, None)
    if state is None or change is None:
        return
    if any(isinstance(value, Tensor) and value.dim() and value.shape != old.shape for value in state.values()):
        return
    optimizer.state[new] = {
        key: change(value) if isinstance(value, Tensor) and value.dim() else value for key, value in state.items()
    }


def _selecting(axis: int, index: Tensor) -> Callable[[Tensor], Tensor]:
    return lambda tensor: tensor.index_select(axis, index.to(tensor.device))


def _padding(axis: int, count: int) -> Callable[[Tensor], Tensor]:
    def padded(tensor: Tensor) -> Tensor:
        shape = list(tensor.shape)
        shape[axis] = count
        return torch.cat([tensor, tensor.new_zeros(shape)], dim=axis)

    return padded


# ---- resuming ------------------------------------------------------------------------------------------------------


def site_settings(model: nn.Module) -> dict[str, dict[str, Any]]:
    """Return every site's settings as they are now, {adapter: {site: settings}}: part of a checkpoint."""
    state: State | None = getattr(model, NAME, None)
    adapters = state.adapters_by_name if state is not None else {}
    return {
        name: {site: delta.current_spec().model_dump(mode="json") for site, delta in adapter.deltas.items()}
        for name, adapter in adapters.items()
    }


def adopt_settings(model: nn.Module, settings: Mapping[str, Mapping[str, Any]]) -> None:
    """Make every delta as a checkpoint's was, so that its tensors fit; adapters it does not know stay."""
    state: State | None = getattr(model, NAME, None)
    for name, adapter in (state.adapters_by_name if state is not None else {}).items():
        for site, delta in adapter.deltas.items():
            saved = settings.get(name, {}).get(site)
            if saved is not None and saved != delta.current_spec().model_dump(mode="json"):
                delta.adopt(read(type(delta.spec), saved, f"the checkpoint's settings of {site}"))


def rebind(optimizer: Optimizer, model: nn.Module) -> None:
    """Let an optimizer whose groups carry `names` train the parameters that have these names now."""
    parameters = dict(model.named_parameters())
    for group in optimizer.param_groups:
        if "names" in group:
            group["params"] = [parameters[name] for name in group["names"]]
