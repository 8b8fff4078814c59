"""Merging: fold the active adapters' changes into the base weights, and give the base back.

Every change is computed in at least float32, added, checked for non-finite values and cast once. The base's own
numbers are kept, so that `unmerge` is bit-exact in every type. A weight that several modules share is given a copy of
its own before it is written, unless one adapter serves all of them.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from rankworks.core.block import Replacement, told_width
from rankworks.core.delta import Delta
from rankworks.core.errors import MergeError
from rankworks.core.progress import track
from rankworks.core.site import Site
from rankworks.core.state import NAME, Adapter, State, state_of
from rankworks.core.weights.fold import Copied, folded, folded_bias
from rankworks.core.weights.tied import holders


@torch.no_grad()
def merge(model: nn.Module, names: str | Iterable[str] | None = None) -> nn.Module:
    """Fold the active adapters (or `names`) into the base, in place; merging what is merged changes nothing.

    Raises `MergeError` for a change that is not finite or a weight that cannot be written, with the model as it was.
    """
    state = state_of(model)
    refuse_switched(state, "merge")
    chosen = state.active if names is None else (names,) if isinstance(names, str) else tuple(names)
    for name in chosen:
        state.adapter(name)
    if state.merged is not None:
        if chosen in (state.merged_names, state.active):
            return model
        raise MergeError(f"the adapters {', '.join(state.merged_names)} are merged already: unmerge(model) first.")
    groups = _changes(state, chosen)
    shared = _shared(model, groups)
    state.merged, state.merged_names = {}, chosen
    try:
        for key, group in track(list(groups.items()), "merging"):
            _fold(model, state, key, group, key in shared)
        for name in chosen:
            _fold_full(model, state, name)
        _fuse(model, state, chosen)
    except BaseException:  # also where somebody stops it: half merged is no state to leave a model in
        unmerge(model)
        raise
    state.refresh()
    return model


@torch.no_grad()
def unmerge(model: nn.Module) -> nn.Module:
    """Give the base its own weights back, bit for bit, and let the adapters act again."""
    state = state_of(model)
    if state.merged is None:
        return model
    for owner, attribute, old in reversed(state.replaced):
        _put(owner, attribute, old)
    state.replaced = []
    for path, parameter in state.untied:
        module = model.get_submodule(path)
        twin_path, twin_name = state.twins[path, parameter]
        module._parameters[parameter] = model.get_submodule(twin_path)._parameters[twin_name]
    for key, kept in state.merged.items():
        _held(model, key).data.copy_(kept)
    if state.tie_flag is not None:
        model.config.tie_word_embeddings = state.tie_flag  # type: ignore[union-attr]
    state.merged, state.merged_names, state.untied, state.tie_flag = None, (), [], None
    state.twins = {}
    state.refresh()
    return model


def is_merged(model: nn.Module) -> bool:
    """Whether adapters are folded into the model's weights now."""
    state = getattr(model, NAME, None)
    return state is not None and state.merged is not None


def refuse_merged(state: State, verb: str) -> None:
    """Raise `MergeError` while adapters are merged: what acts is in the weights and cannot be switched."""
    refuse_switched(state, verb)
    if state.merged is not None:
        raise MergeError(
            f"cannot {verb} adapters while {', '.join(state.merged_names)} are merged into the weights: "
            "unmerge(model) first."
        )


def refuse_switched(state: State, verb: str) -> None:
    """Raise `MergeError` while a sparse adapter's entries stand in the weights (`rankworks.switch`)."""
    if state.switched is not None:
        raise MergeError(
            f"cannot {verb} adapters while {state.switched.name} is switched into the weights: switch(model, None) "
            "first."
        )


def original(state: State, site: Site) -> Site:
    """Return the site as the base has it: while adapters are merged, on the numbers that were kept."""
    refuse_switched(state, "read the base beside")
    kept = (state.merged or {}).get(_key(site))
    if kept is None:
        return site
    return Copied(site.path, site.kind, site.module, site.param, site.rows, site.expert, kept)


Changes = dict[str, list[tuple[Adapter, Site, Delta]]]


def _changes(state: State, names: Iterable[str]) -> Changes:
    """Gather the changes by the name of the parameter they change."""
    groups: Changes = {}
    for name in names:
        adapter = state.adapter(name)
        for key, site in adapter.sites.items():
            if not adapter.deltas[key].weightless:
                groups.setdefault(_key(site), []).append((adapter, site, adapter.deltas[key]))
    return groups


def _fuse(model: nn.Module, state: State, names: Iterable[str]) -> None:
    """Put what weightless deltas make of the base's parts in their place, after all weights are folded."""
    beside = [(d, a.sites[key]) for a in map(state.adapter, names) for key, d in a.deltas.items() if d.weightless]
    for delta, site in beside:
        _replace(state, delta.fused(site), site.name)
    if beside:
        _replace(state, told_width(model), "config")


def _replace(state: State, changes: Iterable[Replacement], name: str) -> None:
    for owner, attribute, new in changes:
        if isinstance(new, Tensor):
            _check_finite(new, f"{name} ({attribute})")
        state.replaced.append((owner, attribute, getattr(owner, attribute)))
        _put(owner, attribute, new)


def _put(owner: Any, attribute: str, value: object) -> None:
    """Set a parameter where it stands, so that the order of the state stays; or another attribute."""
    if isinstance(value, nn.Parameter):
        owner._parameters[attribute] = value
    else:
        setattr(owner, attribute, value)


def _shared(model: nn.Module, groups: Changes) -> set[str]:
    """Return the parameters that stay shared: every adapter that changes one of the twins serves them all."""
    tied = {key: [f"{p}.{n}" for p, n in holders(model, group[0][1])] for key, group in groups.items()}
    serving = {key: all(_serves(a, [key, *twins]) for a, _, _ in groups[key]) for key, twins in tied.items() if twins}
    return {key for key, good in serving.items() if good and all(serving.get(twin, False) for twin in tied[key])}


def _serves(adapter: Adapter, keys: Iterable[str]) -> bool:
    return adapter.spec.tied == "shared" and set(keys) <= {_key(site) for site in adapter.sites.values()}


def _fold(model: nn.Module, state: State, key: str, group: list[tuple[Adapter, Site, Delta]], shared: bool) -> None:
    """Add the changes to one parameter; all are measured against the base's own weight."""
    site = group[0][1]
    assert state.merged is not None
    if shared and any(f"{path}.{name}" in state.merged for path, name in holders(model, site)):
        return  # the twin's change is this one, and stands already
    if site.quantised:
        site.write(site.weight)  # raises with the remedy
    total = folded((site, delta) for _, site, delta in group)
    bias = folded_bias((site, delta) for _, site, delta in group)
    _check_finite(total.to(site.tensor.dtype), site.name)  # also what the stored type is too narrow for
    if not shared:
        _untie(model, state, site)
    state.merged.setdefault(key, site.tensor.detach().clone())
    site.tensor.data.copy_(total)
    if bias is not None:
        _check_finite(bias.to(site.module.bias.dtype), f"{site.path}.bias")
        state.merged.setdefault(f"{site.path}.bias", site.module.bias.detach().clone())
        site.module.bias.data.copy_(bias)


def _fold_full(model: nn.Module, state: State, name: str) -> None:
    """Put the numbers of an adapter's fully trained modules, buffers included, in the base's place."""
    assert state.merged is not None
    for path, twin in state.adapter(name).full.items():
        for key, trained in [
            *twin.named_parameters(remove_duplicate=False),
            *twin.named_buffers(remove_duplicate=False),
        ]:
            _check_finite(trained, f"{path}.{key}")
            where, _, leaf = f"{path}.{key}".rpartition(".")
            if isinstance(trained, nn.Parameter):
                _untie(model, state, Site(where, "linear", model.get_submodule(where), leaf))
            held = _held(model, f"{where}.{leaf}")
            state.merged.setdefault(f"{where}.{leaf}", held.detach().clone())
            held.data.copy_(trained)


def _check_finite(tensor: Tensor, name: str) -> None:
    if tensor.is_floating_point() and not torch.isfinite(tensor).all():
        raise MergeError(
            f"{name}: the merged weight would hold NaN or infinite values, so nothing was merged. The adapter has "
            "diverged, or the base's type is too narrow: load an earlier checkpoint, or load the base in a wider type."
        )


def _untie(model: nn.Module, state: State, site: Site) -> None:
    """Give the module a weight of its own where another holds the same storage; remembered for `unmerge`."""
    others = holders(model, site)
    if not others:
        return
    own = nn.Parameter(site.tensor.detach().clone(), requires_grad=site.tensor.requires_grad)
    site.module._parameters[site.param] = own  # in its place, so that the order of the state stays
    state.untied.append((site.path, site.param))
    state.twins[site.path, site.param] = others[0]
    config = getattr(model, "config", None)
    if site.module not in _word_layers(model):
        return
    if state.tie_flag is None and getattr(config, "tie_word_embeddings", False):
        state.tie_flag = True
        config.tie_word_embeddings = False  # type: ignore[union-attr]


def _word_layers(model: nn.Module) -> list[nn.Module]:
    """A transformers model's word embedding and head: the pair that its config calls tied."""
    getters = [getattr(model, name, None) for name in ("get_input_embeddings", "get_output_embeddings")]
    return [layer for getter in getters if callable(getter) and isinstance(layer := getter(), nn.Module)]


def _key(site: Site) -> str:
    """The parameter's name in the model."""
    return f"{site.path}.{site.param}" if site.path else site.param


def _held(model: nn.Module, key: str) -> Tensor:
    """Return a parameter or buffer as the module holds it (an adapted stack's attribute is the changed tensor)."""
    path, _, name = key.rpartition(".")
    module = model.get_submodule(path)
    tensor = module._parameters.get(name)
    tensor = module._buffers[name] if tensor is None else tensor
    assert tensor is not None
    return tensor
