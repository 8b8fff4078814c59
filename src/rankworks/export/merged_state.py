"""The base's weights with adapters folded in, as a new state dict: nothing in the model is touched.

Every change is computed in at least float32 against the base's own weight, added, checked, and cast once to the type
asked for. A tensor that several names hold stays one where the changes of all its names agree (one adapter that serves
them all, or none), and becomes several where an adapter changes one of them alone.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from rankworks.core.delta import Delta
from rankworks.core.errors import ExportError
from rankworks.core.front import Front
from rankworks.core.full import FullHost
from rankworks.core.layer import AdaptedLayer
from rankworks.core.progress import track
from rankworks.core.site import Site
from rankworks.core.state import NAME, Adapter
from rankworks.core.weights.fold import folded, folded_bias
from rankworks.core.weights.stack import AdaptedStack
from rankworks.export.parts import refuse_weightless


def base_state(model: nn.Module) -> dict[str, Tensor]:
    """Return the base's own state dict, under the names and with the storage of a fresh model."""
    ours = [f"{NAME}."]
    for name, module in model.named_modules():
        if isinstance(module, AdaptedLayer | AdaptedStack):
            ours.append(f"{name}.adapters.")
        elif isinstance(module, Front):
            ours.append(f"{name}.")
        elif isinstance(module, FullHost):
            ours.append(f"{name}.copies.")
    return {key: t for key, t in model.state_dict().items() if not any(key.startswith(prefix) for prefix in ours)}


@torch.no_grad()
def merged_state(
    model: nn.Module, adapters: Iterable[Adapter], dtype: torch.dtype | None = None
) -> tuple[dict[str, Tensor], list[str]]:
    """Return the merged state dict on the CPU, and the names of tensors that were shared and are no longer.

    Tensors that are still shared share their storage. Raises `ExportError` for a change that is not finite or a base
    weight that is held in fewer bits.
    """
    adapters = list(adapters)
    base = base_state(model)
    changed = _folded(adapters)
    for adapter in adapters:  # the last adapter with a copy of a module acts, and its copy takes the base's place
        for path, copy in adapter.full.items():
            changed |= {f"{path}.{name}": tensor.detach() for name, tensor in copy.state_dict().items()}
    untied: list[str] = []
    merged: dict[str, Tensor] = {}
    for names in _shared(base):
        values = [changed.get(name, base[name]) for name in names]
        same = all(v is values[0] or torch.equal(v.to(values[0].dtype), values[0]) for v in values)
        casts = [_cast(values[0], dtype, base[names[0]])] * len(names) if same else []
        casts = casts or [_cast(value, dtype, base[name]) for name, value in zip(names, values, strict=True)]
        merged |= dict(zip(names, casts, strict=True))
        untied += [] if same else names
    for name, tensor in merged.items():
        if tensor.is_floating_point() and not torch.isfinite(tensor).all():
            raise ExportError(
                f"{name} would hold NaN or infinite values: the adapter has diverged, or {tensor.dtype} is too narrow "
                "for it. Load an earlier checkpoint, or give a wider dtype."
            )
    return {name: merged[name] for name in base}, untied


def _folded(adapters: list[Adapter]) -> dict[str, Tensor]:
    """Return {parameter name: weight with all changes added, in at least float32} for every changed parameter."""
    groups: dict[str, list[tuple[Site, Delta]]] = {}
    for adapter in adapters:
        for name, site in adapter.sites.items():
            refuse_weightless(name, adapter.deltas[name], "merged")
            if site.quantised:
                raise ExportError(
                    f"{name}: the base weight is quantised. Load the base in a floating type, load the adapter on it, "
                    "and export that."
                )
            groups.setdefault(f"{site.path}.{site.param}", []).append((site, adapter.deltas[name]))
    changed: dict[str, Tensor] = {}
    for key, pairs in track(list(groups.items()), "folding changes in"):
        changed[key] = folded(pairs)
        bias = folded_bias(pairs)
        if bias is not None:
            changed[f"{pairs[0][0].path}.bias"] = bias
    return changed


def _shared(base: dict[str, Tensor]) -> list[list[str]]:
    """Group the names by the tensor they hold."""
    groups: dict[tuple, list[str]] = {}
    for name, tensor in base.items():
        pointer = tensor.data_ptr() or id(tensor)
        groups.setdefault((tensor.device, pointer, tuple(tensor.shape), tensor.stride()), []).append(name)
    return list(groups.values())


def _cast(tensor: Tensor, dtype: torch.dtype | None, base: Tensor) -> Tensor:
    """Return the tensor on the CPU in the type asked for, else the base's."""
    if not base.is_floating_point():
        return tensor.detach().cpu().contiguous()
    return tensor.detach().to("cpu", dtype or base.dtype).contiguous()
