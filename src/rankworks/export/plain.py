"""Any adapter as a plain LoRA with alpha = rank (scale 1), for servers that know nothing else.

Exact where the method's change has exact factors. Otherwise, and only when a rank or an energy is asked for, the best
approximation of that rank (Eckart-Young), with the error per site in the report and in a JSON beside the file.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import nn

from rankworks.core.errors import ExportError
from rankworks.core.progress import track
from rankworks.core.state import Adapter
from rankworks.export.parts import Part, chosen, parts_of
from rankworks.export.peft.lora import lora_file, plain_entry
from rankworks.export.peft.write import write_folder
from rankworks.export.report import ExportReport, SiteExport
from rankworks.export.truncate import Truncated, check_request, truncate


@torch.no_grad()
def export_lora(
    model: nn.Module,
    path: Path,
    name: str | None = None,
    rank: int | None = None,
    energy: float | None = None,
    dtype: torch.dtype | None = None,
) -> ExportReport:
    """Write one adapter as a plain LoRA in PEFT's format; returns the report with rank and error per site.

    `rank` is the largest rank of any site, `energy` the share of each change's squared norm to keep, in (0, 1].
    Raises `ExportError` where the change has no exact factors and neither is given.
    """
    _, adapter = chosen(model, name)
    found = plain_factors(adapter, parts_of(adapter, "lora"), rank, energy)
    parts = list(found)
    entries = [plain_entry(part, cut.factors) for part, cut in found.items()]
    written = lora_file(model, adapter, entries, rslora=False, dora=False, dropout=0.0)
    written.sites = site_reports(found, {s.site: s.rank for s in written.sites})
    meant = {part.path: cut.factors for part, cut in found.items()}
    return write_folder(model, path, "lora", adapter, parts, "LORA", written, dtype, meant)


def plain_factors(adapter: Adapter, parts: list[Part], rank: int | None, energy: float | None) -> dict[Part, Truncated]:
    """Return every layer's factors with all scales folded in, truncated where asked. Raises as `export_lora` does."""
    check_request(rank, energy)
    found: dict[Part, Truncated] = {}
    for part in track(parts, "factors of the change"):
        if part.bias() is not None:
            held = "kind='peft', which has a place for it (lora_bias), or " if part.key in ("lora", "hydra") else ""
            raise ExportError(
                f"{adapter.spec.asked.method.title} also changes the bias of {part.path}, and a plain LoRA holds a "
                f"change of the weight alone: export with {held}kind='merged'."
            )
        exact = part.factors()
        if exact is None and rank is None and energy is None:
            spec = adapter.spec.delta
            raise ExportError(
                f"the change of {spec.method.title} ({spec.key}) has no exact low-rank factors at {part.path}: give "
                "rank=... or energy=... (e.g. 0.99) for its best approximation, with the error per site in the report, "
                "or export with kind='merged', which is exact."
            )
        found[part] = truncate(exact if exact is not None else part.dense(), rank, energy)
    return found


def site_reports(found: Mapping[Part, Truncated], ranks: Mapping[str, int | None]) -> list[SiteExport]:
    """Return the report's rows."""
    return [SiteExport(p.path, ranks[p.path], cut.error, cut.energy) for p, cut in found.items()]
