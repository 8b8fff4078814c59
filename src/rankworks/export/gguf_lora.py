"""A LoRA file for llama.cpp (GGUF), exact or truncated: the rows permuted as the base's are when it becomes GGUF.

    general.type "adapter", general.architecture, adapter.type "lora", adapter.lora.alpha
    <base tensor>.lora_a (r, in)    <base tensor>.lora_b (out, r)        token_embd: lora_a (vocabulary, r)

llama.cpp multiplies by alpha / r_i with each tensor's own rank r_i; alpha is the commonest rank here and B of every
other rank carries the rest. Its LLaMA rotates neighbouring numbers where transformers rotates halves, so the rows of
each query and key head are interleaved: row (half h, pair p) of a head goes to row 2 p + h; A is not touched.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from rankworks.core.delta import Factors
from rankworks.core.errors import ExportError, did_you_mean
from rankworks.core.files import sync
from rankworks.core.state import Adapter
from rankworks.export.parts import Part, chosen, parts_of
from rankworks.export.place import check_file, check_room
from rankworks.export.plain import plain_factors, site_reports
from rankworks.export.report import ExportReport


@dataclass(frozen=True)
class Architecture:
    """One of llama.cpp's architectures: its name there, and whether query and key rows are interleaved."""

    name: str
    interleaved: bool = False


# model_type -> architecture. Only those whose conversion renames and at most permutes; others reshape fused weights.
ARCHITECTURES = {
    "llama": Architecture("llama", interleaved=True),
    "mistral": Architecture("llama", interleaved=True),
    "qwen2": Architecture("qwen2"),
    "qwen3": Architecture("qwen3"),
    "gemma": Architecture("gemma"),
    "gemma2": Architecture("gemma2"),
    "gemma3_text": Architecture("gemma3"),
    "gpt2": Architecture("gpt2"),
}
FLOATS = {None: np.float32, torch.float32: np.float32, torch.float16: np.float16}
TOLERANCE = {np.float32: 1e-4, np.float16: 1e-2}


@torch.no_grad()
def export_gguf(
    model: nn.Module,
    path: Path,
    name: str | None = None,
    rank: int | None = None,
    energy: float | None = None,
    dtype: torch.dtype | None = None,
) -> ExportReport:
    """Write one adapter as a GGUF LoRA file; returns the report.

    `rank` and `energy` as for kind="lora"; `dtype` float32 (default) or float16. Raises `ExportError` for an
    architecture whose conversion is not known here, and for what llama.cpp's LoRA does not hold.
    """
    architecture = _architecture(model)
    if dtype not in FLOATS:
        raise ExportError(f"a GGUF LoRA is written in float32 or float16, not {dtype}.")
    _, adapter = chosen(model, name)
    if adapter.full:
        raise ExportError(
            f"GGUF LoRA files hold no modules trained in full ({', '.join(adapter.full)}): export with kind='merged'."
        )
    found = plain_factors(adapter, parts_of(adapter, "gguf"), rank, energy)
    known = _name_map(model, architecture)
    names = {part.path: _tensor_name(model, architecture, part, known) for part in found}
    alpha = Counter(cut.factors.A.shape[0] for cut in found.values()).most_common(1)[0][0]
    arrays: dict[str, np.ndarray] = {}
    for part, cut in found.items():
        B, A = cut.factors
        B = B * (A.shape[0] / alpha)  # llama.cpp's scale alpha / r_i, undone
        if architecture.interleaved:
            B = interleave(model, part.path, B)
        if part.kind == "embedding":
            A = A.t()
        arrays[f"{names[part.path]}.lora_a"] = _array(A, FLOATS[dtype])
        arrays[f"{names[part.path]}.lora_b"] = _array(B, FLOATS[dtype])
    check_file(path)
    check_room(path, sum(a.nbytes for a in arrays.values()))
    meant = {names[part.path]: (part, cut.factors) for part, cut in found.items()}
    size, figure = _write(path, model, architecture, adapter, alpha, arrays, meant)
    return ExportReport(
        kind="gguf",
        path=path,
        adapter=adapter.name,
        method=adapter.spec.asked.method.title,
        sites=site_reports(found, {p.path: c.factors.A.shape[0] for p, c in found.items()}),
        bytes=size,
        verified=figure,
        exact=all(cut.error == 0 for cut in found.values()) and FLOATS[dtype] is np.float32,
    )


def _architecture(model: nn.Module) -> Architecture:
    kind = getattr(getattr(model, "config", None), "model_type", None)
    if kind not in ARCHITECTURES:
        raise ExportError(
            f"how llama.cpp stores a model of type {kind!r} is not known here (known: {', '.join(ARCHITECTURES)}). "
            f"Export with kind='merged' and convert that folder with llama.cpp.{did_you_mean(str(kind), ARCHITECTURES)}"
        )
    return ARCHITECTURES[kind]


def _name_map(model: Any, architecture: Architecture) -> Any:
    """Return GGUF's map from transformers' names to its own for this architecture and depth."""
    import gguf

    arch = next(k for k, v in gguf.MODEL_ARCH_NAMES.items() if v == architecture.name)
    return gguf.get_tensor_name_map(arch, getattr(model.config, "num_hidden_layers", 0))


def _tensor_name(model: Any, architecture: Architecture, part: Part, known: Any) -> str:
    """Return the base tensor's name in GGUF. Raises `ExportError` for a tensor that llama.cpp's LoRA cannot reach."""
    name = known.get_name(part.path)
    if name is None or part.kind == "conv":
        raise ExportError(
            f"{part.path} has no name in GGUF's {architecture.name}: leave it out of targets, or use kind='merged'."
        )
    tied = getattr(model.config, "tie_word_embeddings", False)
    if tied and name in ("token_embd", "output"):
        raise ExportError(
            f"{part.path} shares its weight with another layer, and a tied model has one tensor for both in GGUF, "
            "which llama.cpp's LoRA cannot change for one of them: export with kind='merged'."
        )
    return f"{name}.weight"


def interleave(model: Any, path: str, B: Tensor) -> Tensor:
    """Return B (out, r) with the rows of each query or key head in llama.cpp's order; other layers as they are."""
    layer = path.rpartition(".")[2]
    config = model.config
    if layer not in ("q_proj", "k_proj"):
        return B
    heads = config.num_attention_heads
    if layer == "k_proj":
        heads = getattr(config, "num_key_value_heads", None) or heads
    return B.reshape(heads, 2, B.shape[0] // heads // 2, -1).transpose(1, 2).reshape(B.shape)


def deinterleave(model: Any, path: str, B: Tensor) -> Tensor:
    """Undo `interleave`."""
    order = interleave(model, path, torch.arange(B.shape[0]).unsqueeze(1)).squeeze(1)
    own = torch.empty_like(B)
    own[order] = B
    return own


def _array(tensor: Tensor, kind: type) -> np.ndarray:
    return np.ascontiguousarray(tensor.detach().cpu().to(torch.float64).numpy().astype(kind))


def _write(
    path: Path,
    model: nn.Module,
    architecture: Architecture,
    adapter: Adapter,
    alpha: int,
    arrays: Mapping[str, np.ndarray],
    meant: Mapping[str, tuple[Part, Factors]],
) -> tuple[int, float]:
    """Write beside the target, read back, compare, then take its place. Returns (bytes, largest difference)."""
    import gguf

    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.new")
    try:
        writer = gguf.GGUFWriter(temporary, architecture.name)
        writer.add_type(gguf.GGUFType.ADAPTER)
        writer.add_name(f"{adapter.spec.asked.method.title} ({adapter.name})")
        writer.add_string(gguf.Keys.Adapter.TYPE, "lora")
        writer.add_float32(gguf.Keys.Adapter.LORA_ALPHA, float(alpha))
        for name, array in arrays.items():
            writer.add_tensor(name, array)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        figure = _compare(temporary, model, architecture, alpha, meant)
        sync(temporary)
        size = temporary.stat().st_size
        os.replace(temporary, path)
    except OSError as error:
        raise ExportError(
            f"{path} could not be written: {error.strerror or error}. Free some space or choose another place."
        ) from error
    finally:
        temporary.unlink(missing_ok=True)
    return size, figure


def _compare(
    path: Path, model: nn.Module, architecture: Architecture, alpha: int, meant: Mapping[str, tuple[Part, Factors]]
) -> float:
    """Read the file as llama.cpp would and return the largest relative difference of any change."""
    worst = 0.0
    for name, given in read_gguf(path).items():
        part, factors = meant[name]
        B = deinterleave(model, part.path, given.B) if architecture.interleaved else given.B
        probe = torch.randn(factors.A.shape[1], 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        wanted = factors.B.double().cpu() @ (factors.A.double().cpu() @ probe)
        got = alpha / given.A.shape[0] * (B.double() @ (given.A.double() @ probe))
        apart = float((got - wanted).norm()) / (float(wanted.norm()) or 1.0)
        if apart > 1e-2:
            raise ExportError(
                f"{part.path}: read back, the GGUF file's change differs by {apart:.2g}, so nothing was written."
            )
        worst = max(worst, apart)
    return worst


def read_gguf(path: Path) -> dict[str, Factors]:
    """Return {base tensor: factors B (out, r), A (r, in)} of a GGUF LoRA file: its own row order, no scale."""
    import gguf

    tensors = {}
    for tensor in gguf.GGUFReader(path).tensors:
        values = gguf.dequantize(tensor.data, tensor.tensor_type)
        tensors[tensor.name] = torch.from_numpy(np.array(values, dtype=np.float32))
    names = [n.removesuffix(".lora_a") for n in tensors if n.endswith(".lora_a")]
    turned = {n: tensors[f"{n}.lora_a"].t() if n.startswith("token_embd") else tensors[f"{n}.lora_a"] for n in names}
    return {n: Factors(tensors[f"{n}.lora_b"], turned[n]) for n in names}
