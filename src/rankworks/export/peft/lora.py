"""PEFT's LoRA and DoRA.

Written with the method's own rank and alpha, so that PEFT can go on training it. A start that was taken out of the
base (PiSSA, OLoRA) becomes the rank-2r adapter [B, -B0] [A; A0] against the original base, with alpha such that the
scale is the same. Row ranges of one layer are stacked into one pair, and scales that differ are folded into B.
DoRA is written around any inner change that has factors.

Biases that PEFT trained in place (bias="lora_only", or "all" where nothing but adapted layers moved) are read as the
change they made: a LoRA's c = (bias - the base's) / scale. Written again, they are PEFT's lora_bias.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from rankworks.core.delta import Delta, Factors
from rankworks.core.errors import ExportError, StoreError
from rankworks.core.forms.lowrank import LowRank
from rankworks.core.registry import MethodSpec, build
from rankworks.core.site import Site
from rankworks.core.state import Adapter, State
from rankworks.export.parts import Part
from rankworks.export.peft import layout
from rankworks.export.peft.config import pattern_value, patterns, target_modules
from rankworks.export.peft.family import Family, Written, nearest_kind
from rankworks.export.report import SiteExport


@dataclass(frozen=True)
class Entry:
    """One layer of a LoRA file: the factors without their scale, and the scale."""

    part: Part
    factors: Factors
    scale: float
    magnitude: Tensor | None = None
    bias: Tensor | None = None  # without the scale

    @property
    def rank(self) -> int:
        """The rank PEFT's file has."""
        return layout.rank_in_file(self.part.kind, self.part.module, self.factors.A.shape[0])

    def alpha(self, rslora: bool) -> float:
        """PEFT's lora_alpha for this scale, rounded to a whole number where it is one but for rounding."""
        alpha = self.scale * (math.sqrt(self.rank) if rslora else self.rank)
        return float(round(alpha)) if math.isclose(alpha, round(alpha), rel_tol=1e-12) else alpha


def plain_entry(part: Part, factors: Factors) -> Entry:
    """Return an entry of scale 1 for factors with every scale folded in."""
    return Entry(part, factors, 1.0)


def lora_file(
    model: nn.Module, adapter: Adapter, entries: list[Entry], rslora: bool, dora: bool, dropout: float
) -> Written:
    """Return a LoRA folder's fields and tensors for `entries`. Raises `ExportError` for layers PEFT has not."""
    for entry in entries:
        _check_conv(entry.part, dora)
    names = [e.part.path for e in entries]
    rank, rank_pattern = patterns({e.part.path: e.rank for e in entries})
    alpha, alpha_pattern = patterns({e.part.path: e.alpha(rslora) for e in entries})
    config = {
        "r": rank,
        "lora_alpha": alpha,
        "rank_pattern": rank_pattern,
        "alpha_pattern": alpha_pattern,
        "target_modules": target_modules(model, names, adapter.full),
        "lora_dropout": dropout,
        "use_rslora": rslora,
        "use_dora": dora,
        "fan_in_fan_out": any(e.part.kind == "conv1d_hf" for e in entries),
        "bias": "none",
        "init_lora_weights": True,
    }
    biased = any(e.bias is not None for e in entries)  # one switch for all layers: others get zeros
    config |= {"lora_bias": True} if biased else {}
    tensors = {}
    for entry in entries:
        part = entry.part
        found = layout.to_file(part.kind, part.module, entry.factors)
        if biased:
            found[layout.BIAS] = entry.factors.B.new_zeros(len(entry.factors.B)) if entry.bias is None else entry.bias
        if entry.magnitude is not None:
            found[layout.MAGNITUDE] = layout.magnitude_to_file(part.kind, part.module, entry.magnitude)
        tensors |= {f"{layout.PREFIX}{part.path}.{name}": tensor for name, tensor in found.items()}
    return Written(config, tensors, [SiteExport(e.part.path, e.rank) for e in entries])


def _check_conv(part: Part, dora: bool) -> None:
    """PEFT builds A's convolution without the base's dilation and padding mode: refuse where that matters."""
    module: Any = part.module
    if part.kind == "conv":
        dilated, padded = any(d != 1 for d in module.dilation), module.padding_mode != "zeros"
        if dilated or padded:
            what = f"dilation {tuple(module.dilation)}" if dilated else f"padding_mode {module.padding_mode!r}"
            raise ExportError(f"{part.path} has {what}, which PEFT's LoRA leaves out of A: export with kind='merged'.")
        if dora and module.groups > 1:
            raise ExportError(
                f"{part.path} is a grouped convolution, which PEFT's DoRA cannot take: export with kind='merged'."
            )
    elif part.kind == "embedding" and dora and getattr(module, "embed_scale", None) is not None:
        raise ExportError(
            f"{part.path} scales its output, which PEFT's DoRA leaves out of the change: export with kind='merged'."
        )


class LoRAFamily(Family):
    """LoRA and DoRA, which PEFT keeps in one file type; also Hydra and gated factors, whose changes are LoRAs."""

    peft_type: ClassVar[str] = "LORA"
    deltas: ClassVar[tuple[str, ...]] = ("lora", "dora", "hydra", "gated")
    names: ClassVar[tuple[str, ...]] = (
        "lora_A.weight", "lora_B.weight", "lora_embedding_A", "lora_embedding_B", layout.MAGNITUDE, layout.BIAS,
        layout.BASE_BIAS,
    )  # fmt: skip
    fields: ClassVar[tuple[str, ...]] = (
        "r", "lora_alpha", "lora_dropout", "rank_pattern", "alpha_pattern", "use_rslora", "use_dora",
        "init_lora_weights", "eva_config", "lora_bias",
    )  # fmt: skip
    values: ClassVar[Mapping[str, tuple[Any, ...]]] = {"bias": ("all", "lora_only")}

    def write(self, model: nn.Module, state: State, adapter: Adapter, parts: list[Part]) -> Written:
        """Return the folder's content."""
        dora = any(part.key == "dora" for part in parts)
        if dora:
            entries = [_dora_entry(part) for part in parts]
            rslora = all(getattr(_inner(part), "scaling", "") == "rslora" for part in parts)
            dropouts = {part.pairs[0][1].dropout for part in parts}
        else:
            entries = [_lora_entry(part) for part in parts]
            rslora = all(getattr(d, "scaling", "") == "rslora" for part in parts for _, d in part.pairs)
            dropouts = {d.dropout for part in parts for _, d in part.pairs}
        written = lora_file(model, adapter, entries, rslora, dora, max(dropouts))
        if len(dropouts) > 1:
            written.notes.append(
                f"PEFT has one dropout for all layers: {max(dropouts)}; outputs in eval mode are the same"
            )
        if any(part.delta is None for part in parts):
            written.notes.append("row ranges of one layer were joined into one pair: PEFT would train their zeros too")
        return written

    def spec(self, config: Mapping[str, Any], site: Site | None, shapes: Mapping[str, tuple[int, ...]]) -> MethodSpec:
        """Return LoRA's or DoRA's settings; the rank is the tensors', and must be the configuration's."""
        rank, alpha = config.get("r", 8), config.get("lora_alpha", 8)
        scaling = "rslora" if config.get("use_rslora") else "standard"
        if site is not None:
            rank, alpha = self._rank_and_alpha(config, site, shapes)
        dora = bool(config.get("use_dora"))
        dropout = config.get("lora_dropout") or 0.0
        trained = layout.BASE_BIAS in shapes and not dora
        more = {"bias": True} if config.get("lora_bias") or trained else {}
        lora = build("delta", "lora", rank=rank, alpha=alpha, scaling=scaling, dropout=0.0 if dora else dropout, **more)
        return build("delta", "dora", inner=lora, dropout=dropout) if dora else lora

    def _rank_and_alpha(self, config: Mapping[str, Any], site: Site, shapes: Mapping[str, tuple[int, ...]]) -> tuple:
        wanted = {*layout.lora_names(site.kind), *((layout.MAGNITUDE,) if config.get("use_dora") else ())}
        wanted |= {layout.BIAS} if config.get("lora_bias") else set()
        if config.get("bias") in ("all", "lora_only"):  # a layer has one, or has not
            wanted |= {layout.BASE_BIAS} & set(shapes)
        if set(shapes) != wanted:
            raise StoreError(
                f"{site.path}: the file has {', '.join(sorted(shapes))} where a {site.kind} layer"
                f"{' with use_dora' if config.get('use_dora') else ''}"
                f"{' with lora_bias' if config.get('lora_bias') else ''} needs {', '.join(sorted(wanted))}."
            )
        held = shapes[layout.lora_names(site.kind)[0]][0]
        said = pattern_value(config.get("rank_pattern") or {}, site.path, config.get("r", 8))
        if held != said:
            raise StoreError(f"{site.path}: adapter_config.json says rank {said}, and the tensors have rank {held}.")
        alpha = pattern_value(config.get("alpha_pattern") or {}, site.path, config.get("lora_alpha", 8))
        groups = getattr(site.module, "groups", 1) if site.kind == "conv" else 1
        if groups == 1:
            return held, alpha
        rank = held // int(groups)  # the scale PEFT's larger rank gave must come out of ours
        return rank, alpha * (math.sqrt(rank / held) if config.get("use_rslora") else rank / held)

    def init(self, config: Mapping[str, Any]) -> Any:
        """PiSSA and OLoRA moved the base, so their start is rebuilt from it; others left it alone."""
        start = config.get("init_lora_weights", True)
        if start in (True, False, "gaussian", "orthogonal", "eva", "mica"):
            return "default"
        if start in ("pissa", "olora"):
            return start
        raise StoreError(
            f"the adapter started with init_lora_weights={start!r}, which changed the base weights in a way that its "
            "file does not hold. Save it in PEFT with path_initial_model_for_weight_conversion, which makes it a LoRA "
            "of the original base, and load that."
        )

    def fill(self, delta: Delta, site: Site, tensors: Mapping[str, Tensor]) -> None:
        """Copy the factors and, for DoRA, the magnitudes; a bias that was trained in place is the change it made."""
        factors = layout.from_file(site.kind, site.module, dict(tensors), site.path)
        lora: Any = delta.inner if layout.MAGNITUDE in tensors else delta  # type: ignore[attr-defined]
        pairs = [(lora.A, factors.A, "A"), (lora.B, factors.B, "B")]
        bias = tensors.get(layout.BIAS)
        if layout.BASE_BIAS in tensors:
            moved = _moved_bias(site, tensors[layout.BASE_BIAS])  # (out,), float64
            if lora is not delta and moved.any():
                raise StoreError(
                    f"{site.path}: the adapter is a DoRA and was trained with the layer's bias, which DoRA here does "
                    "not change: merge it in PEFT and use the merged model, or train it with bias='none'."
                )
            bias = moved / lora.scale if bias is None else bias.double() + moved / lora.scale
        if bias is not None and lora.c is not None:
            pairs.append((lora.c, bias, "bias"))
        if layout.MAGNITUDE in tensors:
            pairs.append((delta.m, tensors[layout.MAGNITUDE].flatten(), "magnitudes"))  # type: ignore[attr-defined]
        for own, given, what in pairs:
            copy(own, given, f"{site.path} {what}")


def _moved_bias(site: Site, given: Tensor) -> Tensor:
    """Return how far the bias in a file is from the layer's own, (out,): zero where it is the same in its type."""
    own = site.bias
    if own is None or own.shape != given.shape:
        raise StoreError(
            f"{site.path}: the file has a bias of shape {tuple(given.shape)}, and this model's layer has no such one. "
            "Load the base named in adapter_config.json."
        )
    own = own.detach().to(given.device)
    same = torch.equal(given.to(own.dtype), own)
    return torch.zeros_like(own, dtype=torch.float64) if same else given.double() - own.double()


@torch.no_grad()
def copy(own: Tensor, given: Tensor, what: str) -> None:
    """Copy `given` into `own`. Raises `StoreError` where the shapes differ: the file was made for another base."""
    if own.shape != given.shape:
        raise StoreError(
            f"{what} has shape {tuple(given.shape)} in the file and {tuple(own.shape)} for this model: it was made for "
            "another base. Load the base named in adapter_config.json."
        )
    own.copy_(given)


def _lora_entry(part: Part) -> Entry:
    """Return a layer's factors with the method's own scale where it has one scale, else folded into B."""
    delta = part.delta
    if isinstance(delta, LowRank) and hasattr(delta, "A"):
        return Entry(part, delta.unscaled(), delta.scale, bias=getattr(delta, "c", None))
    factors = part.factors()
    assert factors is not None  # LoRA and Hydra always have them
    return Entry(part, factors, 1.0, bias=part.bias())


def _inner(part: Part) -> Delta:
    return part.pairs[0][1].inner


def _dora_entry(part: Part) -> Entry:
    """Return a layer's direction as a pair, and its magnitudes."""
    if part.delta is None:
        raise ExportError(f"PEFT's DoRA has no row ranges, and {part.path} has one: {nearest_kind([part])}.")
    inner = _inner(part)
    factors = inner.factors_on(part.pairs[0][0].weight)
    if factors is None:
        raise ExportError(
            f"PEFT's DoRA is around a LoRA, and the inner change at {part.path} ({inner.spec.key}) has no factors: "
            f"{nearest_kind([part])}."
        )
    m: Tensor = part.delta.m
    if not len(factors.A):  # PEFT's files have no rank 0
        factors = Factors(factors.B.new_zeros(len(factors.B), 1), factors.A.new_zeros(1, factors.A.shape[1]))
    elif isinstance(inner, LowRank):
        return Entry(part, inner.unscaled(), inner.scale, m)
    return Entry(part, factors, 1.0, m)


FAMILY = LoRAFamily()
__all__ = ["FAMILY", "Entry", "copy", "lora_file", "plain_entry"]
