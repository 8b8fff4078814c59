"""Amounts and methods in the words people use."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def headline(config: Mapping[str, Any]) -> str:
    """Return what a run's configuration trains: `smollm2-135m on bbc-news with LoRA (rank 16)`."""
    data, model, adapt = (config.get(part) or {} for part in ("data", "model", "adapt"))
    source = data.get("name") or data.get("path") or data.get("train") or "its data"
    name = f"{model.get('name', 'a model')}{', reshaped,' if model.get('shape') else ''}"
    if adapt:
        return f"{name} on {source} with {method(adapt)}"
    key = str((config.get("optim") or {}).get("name", "adamw"))
    return f"{name} on {source}, trained as a whole by {_title('optimizer', key)}"


def _title(axis: str, key: str) -> str:
    from rankworks.core.registry import methods

    return next((m.title for m in methods(axis) if m.key == key), key)


def method(adapt: Mapping[str, Any]) -> str:
    """Return what an `adapt` block says: `LoRA (rank 16) from pissa, ranks by adalora, sites by layra`."""

    def key(axis: str) -> str:
        chosen = adapt.get(axis) or ""
        return str(chosen.get(axis, "") if isinstance(chosen, Mapping) else chosen)

    words = _title("delta", key("delta") or "lora")
    words += f" (rank {adapt['rank']})" if "rank" in adapt else ""
    others = {"init": " from ", "ranks": ", ranks by ", "select": ", sites by "}
    return words + "".join(f"{joint}{key(axis)}" for axis, joint in others.items() if key(axis))


def size(count: float) -> str:
    """Return bytes as people read them, in powers of ten."""
    for unit, name in ((1e9, "GB"), (1e6, "MB"), (1e3, "kB")):
        if count >= unit:
            return f"{count / unit:.3g} {name}"
    return f"{count:.0f} bytes"


def amount(count: float) -> str:
    """Return a number of things as people read it, in powers of ten."""
    for unit, name in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if count >= unit:
            return f"{count / unit:.3g} {name}"
    return f"{count:.0f}"


def duration(seconds: float) -> str:
    """Return seconds as people read them."""
    whole = round(seconds)
    if whole < 60:
        return f"{seconds:.1f} s" if seconds < 10 else f"{whole} s"
    return f"{whole // 60} min {whole % 60} s" if whole < 3600 else f"{whole // 3600} h {whole % 3600 // 60} min"
