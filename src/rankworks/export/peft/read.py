"""Read a PEFT folder onto a model: our own deltas with its numbers, which then save, merge and train like any other.

Which layers are adapted is read from the tensors' names, never guessed from target_modules, and everything is built
and checked before the model is touched.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn

from rankworks.core import full as full_modules
from rankworks.core.adapt import attach
from rankworks.core.build import make_adapter
from rankworks.core.errors import FingerprintError, StoreError, TargetError
from rankworks.core.refuse import check
from rankworks.core.site import Site
from rankworks.core.spec import AdaptSpec
from rankworks.core.state import NAME, Adapter, State
from rankworks.core.targets import find_named
from rankworks.export.peft.folder import PeftFolder, open_folder
from rankworks.export.peft.lora import copy

SAME_BASE = 0.02  # relative difference that rounding to bfloat16 explains


def read_peft(model: nn.Module, path: Path, name: str, check_base: bool = True) -> nn.Module:
    """Put a PEFT adapter on the model under `name` and let it act; returns the model.

    Raises `StoreError` (damaged, or something that cannot be honoured), `TargetError` or `FingerprintError` (another
    base), always with the model untouched.
    """
    state: State = getattr(model, NAME, None) or State()
    adapter = build_adapter(model, state, path, name, check_base)
    attach(model, state, adapter, {n: model.get_submodule(n) for n in adapter.full})
    return model


def build_adapter(model: nn.Module, state: State, path: Path, name: str, check_base: bool) -> Adapter:
    """Return a folder's adapter, built off the model; on an error `state` is as it was."""
    folder = open_folder(path)
    with state.trial():
        return _build(model, state, folder, name, check_base)


def _build(model: nn.Module, state: State, folder: PeftFolder, name: str, check_base: bool) -> Adapter:
    family = folder.family
    config = family.complete(folder.config, lambda: folder.read({key: key for key in folder.shared}))
    sites = _sites(model, folder)
    resolved = [(site, family.spec(config, site, folder.layer_shapes(site.path))) for site in sites]
    spec = AdaptSpec(
        delta=family.spec(config, None, {}),
        init=family.init(config),
        targets=[site.name for site in sites] or "all-linear",
        full=list(folder.full),
    )
    check(resolved, spec)
    _check_biases(model, folder)
    if check_base:
        _check_base(folder, {site.path: site for site in sites})
    full = _modules(model, folder)
    adapter = make_adapter(model, state, name, resolved, spec, start=spec.init.key != "default")
    for site in sites:
        family.fill(adapter.deltas[site.name], site, folder.read(folder.layers[site.path]))
    if sites:
        family.check_shared(config, folder.read({key: key for key in folder.shared}), adapter, state)
    adapter.full = full
    return adapter


def _sites(model: nn.Module, folder: PeftFolder) -> list[Site]:
    try:
        sites = find_named(model, folder.layers)
    except TargetError as error:
        raise TargetError(
            f"{folder.path} was made for another model: {error} Load the base named in its adapter_config.json "
            f"({folder.config.get('base_model_name_or_path')!r})."
        ) from None
    if not sites and not folder.full:
        raise StoreError(
            f"{folder.path} holds no tensors: the adapter was saved empty, or its shards were not gathered."
        )
    return sites


def _check_biases(model: nn.Module, folder: PeftFolder) -> None:
    """Raise where the file trained the bias of a layer that it does not adapt: no change of ours would hold it."""
    moved = []
    for layer, key in folder.biases.items():
        try:
            own = model.get_submodule(layer).bias
        except AttributeError:
            own = None
        if not isinstance(own, Tensor):
            raise TargetError(
                f"{folder.path} has a bias of {layer}, which this model does not have: load the base named in its "
                f"adapter_config.json ({folder.config.get('base_model_name_or_path')!r})."
            )
        given = folder.read({"bias": key})["bias"].to(own)
        if not torch.equal(given, own.detach()):
            moved.append(layer)
    if moved:
        raise StoreError(
            f"{folder.path} was trained with bias='all', and changes the biases of {len(moved)} layers that it does "
            f"not adapt ({', '.join(moved[:3])}{', ...' if moved[3:] else ''}), where no LoRA stands to hold them: "
            "merge it in PEFT and use the merged model, or train it with bias='lora_only', which is read."
        )


def _check_base(folder: PeftFolder, sites: dict[str, Site]) -> None:
    """PEFT stores a copy of an adapted embedding's base weight: it tells one base from another."""
    for layer, key in folder.base.items():
        site = sites.get(layer)
        if site is None:
            raise StoreError(
                f"{folder.path} replaces the base weight of {layer}, which it does not adapt: it was resized."
            )
        given, own = folder.read({"weight": key})["weight"], site.tensor.detach()
        if given.shape != own.shape:
            raise FingerprintError(
                f"{layer} has shape {tuple(given.shape)} in {folder.path} and {tuple(own.shape)} here: resize the "
                "model's embeddings as they were when the adapter was trained, or load the base it was made for."
            )
        apart = float((given.double() - own.cpu().double()).norm() / own.double().norm().clamp_min(1e-30))
        if apart > SAME_BASE:
            raise FingerprintError(
                f"the adapter was made for another base model: the numbers of {layer} differ by {apart:.0%}. Load the "
                "base it was trained on, or pass check_base=False if you know better."
            )


@torch.no_grad()
def _modules(model: nn.Module, folder: PeftFolder) -> dict[str, nn.Module]:
    """Return the adapter's own copies of the modules it trains in full, with the file's numbers."""
    copies = {}
    for name, keys in folder.full.items():
        try:
            copies[name] = full_modules.own_copy(model.get_submodule(name))
        except AttributeError:
            raise TargetError(f"{folder.path} trains {name} in full, which this model does not have.") from None
        own = copies[name].state_dict()
        odd = sorted(set(own) ^ set(keys))
        if odd:
            raise StoreError(f"{folder.path}: the parameters of {name} differ from the model's ({', '.join(odd[:5])}).")
        for key, tensor in folder.read(keys).items():
            copy(own[key], tensor, f"{name}.{key}")
    return copies
