"""The model a plan is about, on torch's meta device: shapes and names without numbers or memory.

It comes from a built-in shape, a configuration (an object, a folder with config.json, a hub id) or a live model, which
is copied with every tensor replaced by an empty twin; the live model is not touched.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForImageClassification,
    AutoModelForMaskedLM,
    AutoModelForSequenceClassification,
    PretrainedConfig,
)

from rankworks.core.adapt import adapters, detach
from rankworks.core.delta import Delta
from rankworks.core.errors import ConfigError, UnknownNameError, did_you_mean
from rankworks.core.hub.reach import hub_reachable
from rankworks.core.hub.shapes import find_shape, shape_names
from rankworks.core.weights.holders import is_quantised

BUILDERS: dict[str, Any] = {
    "causal-lm": AutoModelForCausalLM,
    "classification": AutoModelForSequenceClassification,
    "image-classification": AutoModelForImageClassification,
    "encoder": AutoModel,
}

DTYPES = ("float32", "bfloat16", "float16", "int8", "nf4")
"""What the base weights can be held in. int8 and nf4 are those of bitsandbytes, computing in bfloat16."""

QUANTISED = "quantised"
PACKED = ("int8", "nf4", QUANTISED)
"""Those of which gradients cannot be taken; the last is what a live model's packed layers are called."""


@dataclass
class Source:
    """A model on the meta device, the bytes of its weights, and those of the largest that is unpacked to compute."""

    model: nn.Module
    title: str
    dtype: str
    parameters: int
    weight_bytes: int
    unpacked_bytes: int = 0


def open_source(
    model: str | Path | PretrainedConfig | nn.Module, dtype: str | None = None, task: str | None = None
) -> Source:
    """Return the model on the meta device.

    dtype: one of `DTYPES`; None keeps a live model's own and is bfloat16 otherwise. task: one of `BUILDERS`; None takes
    what the configuration was saved for. Raises `UnknownNameError` or `ConfigError`.
    """
    if dtype is not None and dtype not in DTYPES:
        raise ConfigError(f"no weight type is called {dtype!r}.{did_you_mean(dtype, DTYPES)}")
    if isinstance(model, nn.Module):
        return _live(model, dtype)
    config, title, usual = _config(model)
    task = task or usual or _task_of(config)
    if task not in BUILDERS:
        raise ConfigError(f"unknown task {task!r}.{did_you_mean(task, BUILDERS)}")
    compute = getattr(torch, dtype or "bfloat16") if dtype not in ("int8", "nf4") else torch.bfloat16
    try:
        with torch.device("meta"):
            built = BUILDERS[task].from_config(config, dtype=compute)
    except ValueError as error:
        raise ConfigError(f"{title} cannot be built for task {task!r}: {' '.join(str(error).split())[:300]}") from None
    return _measured(built, title, dtype or "bfloat16")


def _config(model: str | Path | PretrainedConfig) -> tuple[PretrainedConfig, str, str | None]:
    """Return the configuration, a title and the usual task of a shape, a config object, a folder or a hub id."""
    if isinstance(model, PretrainedConfig):
        return model, type(model).__name__.removesuffix("Config"), None
    shape = find_shape(str(model))
    if shape is not None:
        return AutoConfig.for_model(shape.kind, **shape.settings), shape.name, shape.task
    folder = Path(model).expanduser()
    local = folder.is_dir()
    if local and not (folder / "config.json").is_file():
        raise ConfigError(f"{folder} has no config.json: give a model folder, a shape's name or a hub id.")
    try:
        options = {"local_files_only": local or not hub_reachable()} if local or "/" in str(model) else None
        if options is not None:
            return AutoConfig.from_pretrained(str(folder if local else model), **options), str(model), None
    except (OSError, ValueError) as error:
        if local:
            raise ConfigError(
                f"{folder / 'config.json'} cannot be read: {' '.join(str(error).split())[:300]}"
            ) from None
    near = did_you_mean(str(model).rsplit("/", 1)[-1], shape_names())
    raise UnknownNameError(
        f"no built-in shape, folder or reachable hub model is called {str(model)!r}.{near} A folder with a "
        "config.json or a configuration object works too."
    )


def _task_of(config: PretrainedConfig) -> str:
    """Return the task a configuration was saved for, else the one its family is made for."""
    saved = (getattr(config, "architectures", None) or [""])[0]
    for ending, task in (
        ("ForCausalLM", "causal-lm"),
        ("LMHeadModel", "causal-lm"),
        ("ForSequenceClassification", "classification"),
        ("ForImageClassification", "image-classification"),
        ("ForMaskedLM", "encoder"),
        ("Model", "encoder"),
    ):
        if saved.endswith(ending):
            return task
    kind = type(config)
    masked = kind in AutoModelForMaskedLM._model_mapping  # type: ignore[operator]
    if not masked and kind in AutoModelForCausalLM._model_mapping:  # type: ignore[operator]
        return "causal-lm"
    return "image-classification" if kind in AutoModelForImageClassification._model_mapping else "encoder"  # type: ignore[operator]


def _live(model: nn.Module, dtype: str | None) -> Source:
    """Copy a live model to the meta device, bare of adapters, its packed linear layers as plain ones."""
    tensors = [*model.parameters(), *model.buffers()]
    memo: dict[int, Any] = {id(t): _empty(t) for t in tensors}
    memo |= {id(m.draw): m.draw for m in model.modules() if isinstance(m, Delta)}  # generators cannot be copied
    shadow = copy.deepcopy(model, memo)
    if adapters(shadow):
        detach(shadow)
    bare = _bytes(shadow)
    unpacked = 0
    compute = next((t.dtype for t in tensors if t.is_floating_point()), torch.float32)
    for module in shadow.modules():
        weight: Any = getattr(module, "weight", None)
        if isinstance(module, nn.Linear) and weight is not None and is_quantised(weight):
            dense = torch.empty(module.out_features, module.in_features, dtype=compute, device="meta")
            module.weight = nn.Parameter(dense, requires_grad=False)
            module.__class__ = nn.Linear
            unpacked = max(unpacked, dense.nbytes)
    title = str(getattr(getattr(model, "config", None), "name_or_path", "") or type(model).__name__)
    if dtype is not None and not unpacked:
        kind = getattr(torch, dtype, torch.bfloat16)
        return _measured(shadow.to(kind if kind.is_floating_point else torch.bfloat16), title, dtype)
    own = str(compute).removeprefix("torch.") if not unpacked else QUANTISED
    parameters = sum(p.numel() for p in shadow.parameters())
    return Source(shadow, title, own, parameters, bare, unpacked)


def _empty(tensor: Tensor) -> Tensor:
    empty = torch.empty_like(tensor.detach(), device="meta")
    return nn.Parameter(empty, requires_grad=tensor.requires_grad) if isinstance(tensor, nn.Parameter) else empty


def _bytes(model: nn.Module) -> int:
    return sum(t.nbytes for t in {id(t): t for t in [*model.parameters(), *model.buffers()]}.values())


def _measured(model: nn.Module, title: str, dtype: str) -> Source:
    """Count parameters and bytes; int8 and nf4 pack every linear layer but the output head."""
    parameters, total = sum(p.numel() for p in model.parameters()), _bytes(model)
    if dtype not in ("int8", "nf4"):
        return Source(model, title, dtype, parameters, total)
    getter: Any = getattr(model, "get_output_embeddings", None)
    head = getter() if callable(getter) else None
    weights = [m.weight for m in model.modules() if isinstance(m, nn.Linear) and m is not head]
    packed = sum(_packed(w, dtype) - w.nbytes for w in weights)
    return Source(model, title, dtype, parameters, total + packed, max((w.nbytes for w in weights), default=0))


def _packed(weight: Tensor, dtype: str) -> int:
    """int8: a byte a number and a float32 scale a row; nf4: half a byte and a float32 scale per 64 numbers."""
    n = weight.numel()
    return n + 4 * weight.shape[0] if dtype == "int8" else -(-n // 2) + 4 * -(-n // 64)
