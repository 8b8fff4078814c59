"""A PEFT folder on disk: its configuration, and what its file holds by layer, before any tensor is read."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

from rankworks.core.errors import StoreError, did_you_mean
from rankworks.export.peft import lora, miss, randlora, sparse, vera
from rankworks.export.peft.family import Family
from rankworks.export.peft.layout import CONFIG, PREFIX, WEIGHTS

_ALL: tuple[Family, ...] = (lora.FAMILY, vera.FAMILY, randlora.FAMILY, sparse.FAMILY, miss.FAMILY)
FAMILIES: dict[str, Family] = {f.peft_type: f for f in _ALL}
CONFIG_LIMIT = 16 << 20  # bytes
PICKLES = (".bin", ".pt", ".pth", ".pkl", ".ckpt")

# Fields that say which layers were chosen or how the adapter came to be: the file's tensors are the truth of it.
PASSIVE = (
    "peft_type", "task_type", "auto_mapping", "base_model_name_or_path", "revision", "inference_mode", "peft_version",
    "target_modules", "exclude_modules", "layers_to_transform", "layers_pattern", "modules_to_save", "fan_in_fan_out",
    "init_weights", "megatron_core", "runtime_config", "loftq_config", "corda_config", "lora_ga_config",
    "qalora_group_size",
)  # fmt: skip
REST = (None, False, 0, "none", "", [], {})  # the values at which a field does nothing


@dataclass
class PeftFolder:
    """One folder: tensor names and shapes by layer, those shared by all, and the modules trained in full."""

    path: Path
    config: dict[str, Any]
    family: Family
    layers: dict[str, dict[str, str]] = field(default_factory=dict)  # layer -> tensor's short name -> key in the file
    shared: list[str] = field(default_factory=list)
    full: dict[str, dict[str, str]] = field(default_factory=dict)  # module -> parameter -> key in the file
    base: dict[str, str] = field(default_factory=dict)  # layer -> key of a copy of its base weight
    biases: dict[str, str] = field(default_factory=dict)  # layer that is not adapted -> key of its bias (bias "all")
    shapes: dict[str, tuple[int, ...]] = field(default_factory=dict)

    def layer_shapes(self, layer: str) -> dict[str, tuple[int, ...]]:
        """Return the shapes of a layer's tensors by their short names."""
        return {name: self.shapes[key] for name, key in self.layers[layer].items()}

    def read(self, keys: Mapping[str, str]) -> dict[str, Tensor]:
        """Return {name: tensor} for {name: key}."""
        with safe_open(self.path / WEIGHTS, framework="pt") as data:
            return {name: data.get_tensor(key) for name, key in keys.items()}


def is_peft_folder(path: Path) -> bool:
    """Whether a folder is PEFT's: it has adapter_config.json, and no adapter of ours."""
    return (path / CONFIG).is_file() and not (path / "adapter.json").exists()


def open_folder(path: Path) -> PeftFolder:
    """Return a PEFT folder's content, checked. Raises `StoreError` naming everything that cannot be honoured."""
    config = _read_config(path / CONFIG)
    kind = config.get("peft_type")
    if kind not in FAMILIES:
        raise StoreError(
            f"{path} holds a PEFT adapter of type {kind!r}, which is not read here (read: {', '.join(FAMILIES)}). "
            f"Merge it in PEFT, or turn it into a LoRA there (peft.convert_to_lora).{did_you_mean(str(kind), FAMILIES)}"
        )
    family = FAMILIES[kind]
    others = {k: v for k, v in config.items() if k not in (*PASSIVE, *family.fields) and v not in REST}
    refused = [f"{k}={v!r}" for k, v in others.items() if v not in family.values.get(k, ())]
    if refused:
        raise StoreError(
            f"{path / CONFIG} sets {', '.join(refused)}, which cannot be honoured here: the adapter would compute "
            "something else. Merge it in PEFT and use the merged model."
        )
    folder = PeftFolder(path, config, family)
    _sort(folder)
    return folder


def _read_config(file: Path) -> dict[str, Any]:
    if file.stat().st_size > CONFIG_LIMIT:
        raise StoreError(
            f"{file} has {file.stat().st_size:,} bytes, more than any adapter_config.json: it was not read."
        )
    try:
        config = json.loads(file.read_text())
    except (ValueError, UnicodeDecodeError) as error:
        raise StoreError(f"{file} is not valid JSON ({error}): the folder is damaged; take it from a copy.") from None
    if not isinstance(config, dict):
        raise StoreError(f"{file} is not a PEFT configuration: the folder is damaged; take it from a copy.")
    return config


def _sort(folder: PeftFolder) -> None:
    """Sort the file's keys: a layer's tensors, shared tensors, modules trained in full, copies of base weights."""
    file = folder.path / WEIGHTS
    if not file.exists():
        pickles = [f.name for f in folder.path.iterdir() if f.suffix in PICKLES]
        if pickles:
            raise StoreError(
                f"{folder.path} holds {pickles[0]}, a pickle: reading it could execute code, so rankworks never does. "
                "Convert it to safetensors where you trust it (peft: save_pretrained(..., safe_serialization=True))."
            )
        raise StoreError(f"{file} is missing: the folder is incomplete; take it from a copy.")
    try:
        with safe_open(file, framework="pt") as data:
            folder.shapes = {k: tuple(data.get_slice(k).get_shape()) for k in data.keys()}  # noqa: SIM118 - not a mapping
    except SafetensorError as error:
        raise StoreError(f"{file} is truncated or not a safetensors file ({error}); take it from a copy.") from None
    full = folder.config.get("modules_to_save") or []
    strange = []
    for key in folder.shapes:
        if key in folder.family.shared:
            folder.shared.append(key)
        elif not key.startswith(PREFIX) or not _place(folder, key, full):
            strange.append(key)
    if strange:
        raise StoreError(
            f"{file} holds {len(strange)} tensors that are no part of a {folder.family.peft_type} adapter "
            f"({', '.join(strange[:5])}): trained biases or tokens, or another method. Merge it in PEFT and use the "
            "merged model."
        )


def _place(folder: PeftFolder, key: str, full: list[str]) -> bool:
    """Put a key in its place; false where it has none."""
    name = key.removeprefix(PREFIX)
    if name.rpartition(".")[2] in folder.family.copies:
        return True
    for tensor in folder.family.names:
        if name.endswith("." + tensor):
            folder.layers.setdefault(name.removesuffix("." + tensor), {})[tensor] = key
            return True
    if name.endswith(".base_layer.weight"):
        folder.base[name.removesuffix(".base_layer.weight")] = key
        return True
    trains_biases = folder.config.get("bias") == "all"
    module = next((m for m in _prefixes(name) if any(m.endswith(f) for f in full)), None)
    if module is not None:
        inner = name.removeprefix(module + ".")
        repeated = inner.startswith(
            ("modules_to_save.", "original_module.")
        )  # PEFT's wrapper; its bias stands alone too
        if not (trains_biases and repeated):
            folder.full.setdefault(module, {})[inner] = key
        return True
    if trains_biases and name.endswith(".bias"):
        folder.biases[name.removesuffix(".bias")] = key
        return True
    return False


def _prefixes(name: str) -> list[str]:
    """Return `a`, `a.b`, ... for `a.b.c`: the modules a parameter's name passes through."""
    parts = name.split(".")
    return [".".join(parts[:n]) for n in range(1, len(parts))]
