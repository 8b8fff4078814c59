"""Runs without an adapter, `adapt: none`: the whole model is trained, and the model itself is what they leave.

The model's folder is transformers' own (config.json, safetensors, the tokenizer's files), written beside its place and
renamed: it is there whole or not at all.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from torch import nn

from rankworks.core.errors import StoreError
from rankworks.core.hub.quiet import quiet


def train_whole(model: nn.Module) -> nn.Module:
    """Make every parameter of a model a trained one."""
    return model.requires_grad_(True)


def save_model(model: Any, tokenizer: Any, folder: Path) -> int:
    """Write a model and its tokenizer to `folder` and return the bytes of its weights. Raises `StoreError`."""
    part, old = folder.with_name(f".{folder.name}.part"), folder.with_name(f".{folder.name}.old")
    try:
        for stale in (part, old):
            shutil.rmtree(stale, ignore_errors=True)
        with quiet():
            model.save_pretrained(part, safe_serialization=True)
            tokenizer.save_pretrained(part)
        if folder.exists():
            folder.rename(old)
        part.rename(folder)
    except OSError as error:
        shutil.rmtree(part, ignore_errors=True)
        raise StoreError(f"the model cannot be written to {folder} ({error.strerror or error}).") from error
    shutil.rmtree(old, ignore_errors=True)
    return sum(file.stat().st_size for file in folder.glob("*.safetensors"))
