"""An adapter in front of the model as the two constants that inference needs, in one safetensors file.

    prompt.safetensors    prompt (m, d): embeddings put in front of every input
                          shift (n, d): row t is added to the embedding of position t

Whatever made them in training (attention, projections, a gate) does not depend on the input and is not in the file.
"""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from rankworks.core.errors import ExportError
from rankworks.core.files import atomic_folder
from rankworks.export.parts import chosen
from rankworks.export.place import check_folder, check_room, folder_bytes, system_errors
from rankworks.export.report import ExportReport, SiteExport, write_report

FILE = "prompt.safetensors"


@torch.no_grad()
def export_prompt(
    model: nn.Module, path: Path, name: str | None = None, dtype: torch.dtype | None = None
) -> ExportReport:
    """Write the prompt and the shift of one adapter; returns the report. Raises `ExportError` for other methods."""
    _, adapter = chosen(model, name)
    (key, delta), *_ = adapter.deltas.items()
    if delta.kind != "front":
        raise ExportError(
            f"{adapter.spec.asked.method.title} has no prompt: export with kind='lora' or kind='merged', or save it."
        )
    made: dict[str, Tensor] = delta.cached()  # type: ignore[operator]
    tensors = {n: t.to("cpu", dtype or t.dtype).contiguous() for n, t in made.items()}
    check_folder(path)
    check_room(path, sum(t.nbytes for t in tensors.values()))
    with atomic_folder(path) as folder:
        with system_errors():
            save_file(tensors, folder / FILE)
        read = load_file(folder / FILE)
        apart = max(float((read[n].to(t) - t.cpu()).abs().max()) if t.numel() else 0.0 for n, t in made.items())
        report = ExportReport(
            kind="prompt",
            path=path,
            adapter=adapter.name,
            method=adapter.spec.asked.method.title,
            sites=[SiteExport(key, None)],
            bytes=folder_bytes(folder),
            verified=apart,
            exact=all(tensors[n].dtype == t.dtype for n, t in made.items()),
        )
        write_report(report, folder)
    return report
