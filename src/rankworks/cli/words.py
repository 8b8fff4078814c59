"""A run in a few words."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rankworks.train.config import RunConfig


def title(config: RunConfig) -> str:
    """Return `smollm2-135m on bbc-news with LoRA`."""
    from rankworks.core.registry import methods

    data = config.data
    source = (data.name or data.path or data.train) if data else "no data"
    name = config.model.name if config.model else "no model"
    name += ", reshaped," if config.model and config.model.shape else ""
    axis, key = ("delta", str(config.adapt.get("delta", "lora"))) if config.adapt else ("optimizer", config.optim.name)
    method = next((m.title for m in methods(axis) if m.key == key), key)
    return f"{name} on {source} with {method}" if config.adapt else f"all of {name} on {source} by {method}"
