"""Trees of tensors and plain values on disk: tensors in safetensors, everything else in JSON. No pickle.

A tree is made of dicts (also with integer keys), lists, tuples, tensors, numpy arrays, numbers, strings, booleans and
None: what optimisers, random generators and hooks have as their state. Floats survive exactly.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from safetensors.torch import save as safetensors_bytes
from torch import Tensor

from rankworks.core.errors import TrainingError
from rankworks.core.files import atomic_write

BROKEN = (OSError, SafetensorError, ValueError, LookupError, TypeError)
"""What reading a broken part raises: files that are not there; tensors cut short; text that is no JSON (ValueError);
structure that names other tensors than there are (LookupError), or none of the forms it can have (TypeError)."""


def flatten(value: Any, tensors: dict[str, Tensor], path: str = "") -> Any:
    """Return `value` as JSON; its tensors go to `tensors` under the path where they were found."""
    if isinstance(value, Tensor):
        tensors[path] = value.detach().cpu().contiguous().clone()
        return {"tensor": path}
    if isinstance(value, np.ndarray):
        tensors[path] = torch.from_numpy(value.astype(np.int64) if value.dtype == np.uint32 else value.copy())
        return {"array": path, "dtype": str(value.dtype)}
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, dict):
        return {"dict": [[key, flatten(item, tensors, f"{path}/{key}")] for key, item in value.items()]}
    if isinstance(value, tuple | list):
        items = [flatten(item, tensors, f"{path}/{i}") for i, item in enumerate(value)]
        return {"tuple": items} if isinstance(value, tuple) else items
    if value is None or isinstance(value, str | bool | int | float):
        return value
    raise TrainingError(
        f"a {type(value).__name__} at {path or 'the top'} cannot be saved: keep state as tensors and numbers."
    )


def unflatten(value: Any, tensors: dict[str, Tensor]) -> Any:
    """Return the tree that `flatten` took apart."""
    if isinstance(value, list):
        return [unflatten(item, tensors) for item in value]
    if not isinstance(value, dict):
        return value
    if "tensor" in value:
        return tensors[value["tensor"]]
    if "array" in value:
        return tensors[value["array"]].numpy().astype(value["dtype"])
    if "tuple" in value:
        return tuple(unflatten(item, tensors) for item in value["tuple"])
    return {key: unflatten(item, tensors) for key, item in value["dict"]}


def write_tree(folder: Path, name: str, tree: Any) -> None:
    """Write a tree as `name.safetensors` and `name.json` in `folder`, each file whole or not at all."""
    tensors: dict[str, Tensor] = {}
    structure = flatten(tree, tensors)
    atomic_write(folder / f"{name}.safetensors", safetensors_bytes(tensors))
    atomic_write(folder / f"{name}.json", json.dumps(structure))


def read_tree(folder: Path, name: str) -> Any:
    """Read what `write_tree` wrote; raises `TrainingError` where a file is missing or broken."""
    try:
        tensors = load_file(folder / f"{name}.safetensors")
        structure = json.loads((folder / f"{name}.json").read_text())
        return unflatten(structure, tensors)
    except BROKEN as error:
        raise TrainingError(
            f"{folder / name} is not a readable part of a checkpoint ({error}); use an earlier one."
        ) from error
