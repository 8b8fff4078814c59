"""An adapter's folder as it lies on the disk, ours or PEFT's: what it says of itself and what its tensors are.

No model is needed: the settings stand in a JSON file, shapes in the header of the safetensors file.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rankworks.core.errors import StoreError

PEFT_META, PEFT_TENSORS = "adapter_config.json", "adapter_model.safetensors"
PEFT_HEAD = "base_model.model."


@dataclass
class Stored:
    """One tensor of the file."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    numbers: int
    bytes: int
    norm: float


@dataclass
class SiteTensors:
    """The tensors of one site (or of one module trained in full), and the shape of its weight where that is known."""

    site: str
    shape: tuple[int, ...] | None = None
    rank: int | None = None
    tensors: list[Stored] = field(default_factory=list)

    @property
    def numbers(self) -> int:
        """How many numbers the file holds for this site."""
        return sum(tensor.numbers for tensor in self.tensors)

    @property
    def bytes(self) -> int:
        """How many bytes of the file are this site's."""
        return sum(tensor.bytes for tensor in self.tensors)


@dataclass
class Folder:
    """An adapter's folder. `format` is "rankworks" or "peft"; `parameters` are the trained ones."""

    path: Path
    format: str
    method: str
    settings: dict[str, Any]
    base: str
    sites: list[SiteTensors]
    full: list[SiteTensors]
    parameters: int
    bytes: int
    written_by: str


def adapter_folder(path: Path) -> Path:
    """Return the adapter's own folder, given it or the output folder of a run that holds it."""
    if not (path / "adapter.json").exists() and not (path / PEFT_META).exists() and (path / "adapter").is_dir():
        return path / "adapter"
    return path


def read_folder(path: Path) -> Folder:
    """Read an adapter's folder. Raises `StoreError` where it is none, or is damaged."""
    path = adapter_folder(path)
    return _read_peft(path) if (path / PEFT_META).is_file() else _read_ours(path)


def _read_ours(path: Path) -> Folder:
    from rankworks.core.store import TENSORS, read_meta

    meta = read_meta(path)
    try:
        shapes = {site: tuple(known["shape"]) for site, known in meta["base"].items()}
        sites = {
            key: SiteTensors(key, shapes.get(key), _rank(meta["adapt"], meta["sites"][key])) for key in meta["sites"]
        }
        full = {name: SiteTensors(name) for name in meta.get("full", [])}
        settings = dict(meta["adapt"])
        if settings.get("ranks") and settings["delta"] == "gated":  # the schedule's gates, around what was asked for
            settings |= settings.pop("inner")
        trained, base, version = int(meta["parameters"]), str(meta.get("model", "")), str(meta.get("rankworks", ""))
    except (KeyError, TypeError, AttributeError) as error:
        raise StoreError(
            f"{path / 'adapter.json'} lacks {error}: the folder is damaged; take it from a copy."
        ) from None
    _place(read_tensors(path / TENSORS), sites, full)
    return Folder(
        path=path,
        format="rankworks",
        method=str(settings.pop("delta")),
        settings=settings,
        base=base,
        sites=list(sites.values()),
        full=list(full.values()),
        parameters=trained,
        bytes=(path / TENSORS).stat().st_size,
        written_by=f"rankworks {version}",
    )


def _place(tensors: list[Stored], sites: Mapping[str, SiteTensors], full: Mapping[str, SiteTensors]) -> None:
    """Give each tensor to its site: the longest name that its own begins with."""
    names = sorted([*sites, *full], key=len, reverse=True)
    for tensor in tensors:
        bare = tensor.name.removeprefix("full.")
        owner = next((name for name in names if bare.startswith(f"{name}.")), None)
        if owner is None:
            continue
        tensor.name = bare.removeprefix(f"{owner}.")
        holder = full if owner in full else sites
        holder[owner].tensors.append(tensor)


def _rank(adapt: Mapping[str, Any], own: Mapping[str, Any]) -> int | None:
    """Return the rank a site was given: its own, else the adapter's, else that of the delta within."""
    inner = own.get("inner") or adapt.get("inner")
    rank = own.get("rank", adapt.get("rank"))
    return rank if rank is not None else inner.get("rank") if isinstance(inner, Mapping) else None


def _read_peft(path: Path) -> Folder:
    file = path / PEFT_META
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
        kind = str(config["peft_type"]).lower()
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise StoreError(f"{file} is not PEFT's ({error}): the folder is damaged; take it from a copy.") from None
    if not (path / PEFT_TENSORS).is_file():
        pickled = (path / "adapter_model.bin").is_file()
        raise StoreError(
            f"{path} has no {PEFT_TENSORS}."
            + (
                " adapter_model.bin is a pickle: reading it could execute code, so rankworks never does. Convert it "
                "where you trust it (peft: save_pretrained(..., safe_serialization=True))."
                if pickled
                else " The folder is incomplete; take it from a copy."
            )
        )
    sites: dict[str, SiteTensors] = {}
    full: dict[str, SiteTensors] = {}
    trained = 0
    for tensor in read_tensors(path / PEFT_TENSORS):
        name, _, part = tensor.name.removeprefix(PEFT_HEAD).partition(f".{_peft_prefix(tensor.name)}")
        holder, part = (sites, part.lstrip("_.").removesuffix(".weight")) if part else (full, name.rpartition(".")[2])
        owner = name if holder is sites else name.rpartition(".")[0]
        tensor.name = part
        holder.setdefault(owner, SiteTensors(owner)).tensors.append(tensor)
        trained += tensor.numbers
    for site in sites.values():
        by_name = {t.name: t for t in site.tensors}
        if {"A", "B"} <= set(by_name) and kind == "lora":
            site.shape, site.rank = (by_name["B"].shape[0], by_name["A"].shape[-1]), by_name["A"].shape[0]
    settings = {k: v for k, v in config.items() if v not in (None, False, [], {}) and k not in ("peft_type",)}
    return Folder(
        path=path,
        format="peft",
        method=kind,
        settings=settings,
        base=str(config.get("base_model_name_or_path") or ""),
        sites=list(sites.values()),
        full=list(full.values()),
        parameters=trained,
        bytes=(path / PEFT_TENSORS).stat().st_size,
        written_by=f"peft {config.get('peft_version') or ''}".strip(),
    )


def _peft_prefix(name: str) -> str:
    """Return PEFT's mark before the name of a tensor of its own, e.g. `lora_` in `...q_proj.lora_A.weight`."""
    last = name.removesuffix(".weight").rpartition(".")[2]
    marks = ("lora_", "vera_", "shira_", "miss_", "bone_", "hada_", "lokr_", "oft_", "ia3_", "boft_", "randlora_")
    return next((mark for mark in marks if last.startswith(mark)), "\0")


def read_tensors(file: Path) -> list[Stored]:
    """Return what a safetensors file holds. Raises `StoreError` where it is missing, truncated or another format."""
    from safetensors import SafetensorError, safe_open

    if not file.is_file():
        raise StoreError(f"{file} is missing: the folder is incomplete; take it from a copy.")
    found = []
    try:
        with safe_open(file, framework="pt") as data:
            for name in data.keys():  # noqa: SIM118 - not a mapping
                tensor = data.get_tensor(name)
                norm = float(tensor.float().norm()) if tensor.is_floating_point() else 0.0
                kind = str(tensor.dtype).removeprefix("torch.")
                found.append(Stored(name, tuple(tensor.shape), kind, tensor.numel(), tensor.nbytes, norm))
    except SafetensorError as error:
        raise StoreError(f"{file} is truncated or not a safetensors file ({error}); take it from a copy.") from None
    return found
