"""A run in a few words."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rankworks.train.config import RunConfig


def title(config: RunConfig) -> str:
    """Return `smollm2-135m on bbc-news with LoRA (rank 16)`."""
    from rankworks.core.registry import methods
    from rankworks.train.report.words import method

    data = config.data
    source = (data.name or data.path or data.train) if data else "no data"
    name = config.model.name if config.model else "no model"
    name += ", reshaped," if config.model and config.model.shape else ""
    if config.adapt:
        return f"{name} on {source} with {method(config.adapt)}"
    optimizer = next((m.title for m in methods("optimizer") if m.key == config.optim.name), config.optim.name)
    return f"all of {name} on {source} by {optimizer}"
