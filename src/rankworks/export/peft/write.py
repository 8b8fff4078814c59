"""Write an adapter as a PEFT folder, adapter_config.json and safetensors, read back before it is final."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from rankworks.core.delta import Factors
from rankworks.core.errors import ExportError
from rankworks.core.files import atomic_folder
from rankworks.core.state import Adapter, State
from rankworks.export.parts import Part, chosen, parts_of
from rankworks.export.peft.config import common
from rankworks.export.peft.family import Family, Written, nearest_kind
from rankworks.export.peft.folder import FAMILIES
from rankworks.export.peft.layout import CONFIG, PREFIX, WEIGHTS
from rankworks.export.peft.read import build_adapter
from rankworks.export.place import check_folder, check_room, folder_bytes, system_errors
from rankworks.export.report import ExportReport, write_report

PROBES = 4  # random vectors by which two changes are compared
TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 5e-2}


@torch.no_grad()
def export_peft(
    model: nn.Module, path: Path, name: str | None = None, dtype: torch.dtype | None = None
) -> ExportReport:
    """Write one adapter in PEFT's own format for its method; returns the report.

    Raises `ExportError`, naming the reason and the nearest kind, for what PEFT's format cannot say.
    """
    state, adapter = chosen(model, name)
    parts = parts_of(adapter, "peft")
    family = _family(adapter, parts)
    written = family.write(model, state, adapter, parts) if parts else Written({"r": 8, "target_modules": []}, {}, [])
    return write_folder(model, path, "peft", adapter, parts, family.peft_type, written, dtype)


def _family(adapter: Adapter, parts: list[Part]) -> Family:
    key = adapter.spec.delta.key
    for family in FAMILIES.values():
        if key in family.deltas:
            return family
    title = adapter.spec.asked.method.title
    raise ExportError(f"PEFT's formats written here do not hold {title} ({key}): {nearest_kind(parts)}.")


def write_folder(
    model: nn.Module,
    path: Path,
    kind: str,
    adapter: Adapter,
    parts: list[Part],
    peft_type: str,
    written: Written,
    dtype: torch.dtype | None,
    meant: Mapping[str, Factors] | None = None,
) -> ExportReport:
    """Put a folder on disk atomically, after reading it back and comparing what it does with what the adapter does.

    `meant` gives the factors by layer where they approximate the adapter's on purpose.
    """
    if not parts:
        raise ExportError(
            "the adapter changes no weight by a delta, and PEFT's format needs one: export with kind='merged'."
        )
    tensors = {k: _cast(t, dtype) for k, t in written.tensors.items()}
    for module, copy in adapter.full.items():
        tensors |= {f"{PREFIX}{module}.{k}": _cast(t, dtype) for k, t in copy.state_dict().items()}
    config = {**common(model, peft_type, adapter.full), **written.config}
    check_folder(path)
    check_room(path, sum(t.numel() * t.element_size() for t in tensors.values()))
    notes = list(written.notes)
    if adapter.full:
        notes.append(
            f"trained in full, as modules_to_save: {', '.join(adapter.full)}; servers of plain LoRA refuse those"
        )
    with atomic_folder(path) as folder:
        with system_errors():
            save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
        (folder / CONFIG).write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
        figure = _compare(model, folder, parts, tensors, meant or {})
        report = ExportReport(
            kind=kind,
            path=path,
            adapter=adapter.name,
            method=adapter.spec.asked.method.title,
            sites=written.sites,
            bytes=folder_bytes(folder),
            verified=figure,
            exact=all(s.error == 0 for s in written.sites) and dtype in (None, _widest(written.tensors)),
            notes=notes,
        )
        write_report(report, folder)
    return report


def _cast(tensor: Tensor, dtype: torch.dtype | None) -> Tensor:
    tensor = tensor.detach().cpu()
    return (tensor.to(dtype) if dtype is not None and tensor.is_floating_point() else tensor).clone().contiguous()


def _widest(tensors: dict[str, Tensor]) -> torch.dtype:
    """Return the widest floating type among the tensors."""
    kinds = [t.dtype for t in tensors.values() if t.is_floating_point()]
    return max(kinds, key=lambda d: torch.finfo(d).bits, default=torch.float32)


def _compare(
    model: nn.Module, folder: Path, parts: list[Part], tensors: Mapping[str, Tensor], meant: Mapping[str, Factors]
) -> float:
    """Read the folder back, off the model, and return the largest relative difference of any layer's change.

    Two changes are compared by what they do to a few random vectors, so that neither is formed where it has factors.
    """
    back = build_adapter(model, State(), folder, "exported", check_base=True)
    kinds = [t.dtype for t in tensors.values() if t.is_floating_point()]
    tolerance = max(TOLERANCE.get(kind, 0.0) for kind in kinds)
    worst = 0.0
    for part in parts:
        site = part.whole
        probe = torch.randn(site.shape.in_, PROBES, generator=torch.Generator().manual_seed(0)).to(site.tensor.device)
        wanted = _times(meant[part.path], probe) if part.path in meant else part.times(probe)
        read = Part(part.path, part.kind, part.module, ((site, back.deltas[site.name]),))
        given = read.times(probe)
        bias, biased = part.bias(), read.bias()
        if bias is not None or biased is not None:  # beside the product, as the factor of an input that is always 1
            none = given.new_zeros(len(given))
            given = torch.cat([given, (none if biased is None else biased.to(none)).unsqueeze(1)], dim=1)
            wanted = torch.cat([wanted, (none if bias is None else bias).to(wanted).unsqueeze(1)], dim=1)
        size = float(wanted.double().norm())
        apart = float((given.double() - wanted.double()).norm()) / (size or 1.0)
        if apart > tolerance:
            raise ExportError(
                f"{part.path}: read back, the exported change differs from the adapter's by {apart:.2g} (up to "
                f"{tolerance:g} is rounding), so nothing was written. Export in a wider dtype, or with kind='merged'."
            )
        worst = max(worst, apart)
    return worst


def _times(factors: Factors, probe: Tensor) -> Tensor:
    return factors.B @ (factors.A @ probe.to(factors.A.dtype))
