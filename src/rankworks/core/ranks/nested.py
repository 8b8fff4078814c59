"""set_rank: let an adapter whose ranks are ordered act with the first b of them, and export it so.

Rank schedules that train every truncation at once (`ordered = True`: dylora, maestro) leave an adapter that is one for
every b: the first b rows of A and columns of B. Setting b reads no more than those; nothing is copied or lost.
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import nn

from rankworks.core.errors import ConfigError
from rankworks.core.forms.lowrank import Nested, Pair
from rankworks.core.merge import refuse_merged
from rankworks.core.state import Adapter, state_of
from rankworks.core.targets import check_overrides, override_for


def set_rank(model: nn.Module, rank: int | Mapping[str, int] | None, name: str | None = None) -> nn.Module:
    """Let the adapter act with its first `rank` ranks, or all of them again (None); returns the model.

    `rank` may be given by pattern, {"q_proj": 2, "mlp": 4}; sites that no pattern names keep all. A site with fewer
    ranks uses those it has. Outputs, merging and exporting then see an adapter of that rank; `rankworks.save` keeps
    every rank. Training sets the rank itself and leaves the whole at the end. `name` is the first active adapter by
    default. Raises `ConfigError` where the adapter's ranks are not ordered, and `MergeError` while it is merged.
    """
    state = state_of(model)
    refuse_merged(state, "set the rank of")
    adapter = state.adapter(name or (state.active or tuple(state.adapters_by_name))[0])
    schedule = adapter.spec.ranks
    if schedule is None or not schedule.method.cls.ordered:  # type: ignore[attr-defined]
        raise ConfigError(
            f"the ranks of the adapter {adapter.name!r} are not ordered, so its first few are no adapter by "
            "themselves: train it with ranks='dylora', or make a smaller one with rankworks.squeeze(model, rank=...)."
        )
    rescaled = schedule.method.cls.rescaled  # type: ignore[attr-defined]
    for pair, width in _widths(model, adapter, rank).items():
        pair.nested = None if width is None or width >= pair.rank else Nested(width, rescaled=rescaled)
    return model


def _widths(model: nn.Module, adapter: Adapter, rank: int | Mapping[str, int] | None) -> dict[Pair, int | None]:
    """Return how many ranks of every pair shall act; None for all of them."""
    given = [] if rank is None else list(rank.values()) if isinstance(rank, Mapping) else [rank]
    wrong = next((r for r in given if isinstance(r, bool) or not isinstance(r, int) or r < 1), None)
    if wrong is not None:
        raise ConfigError(f"a rank is a whole number of at least 1, not {wrong!r}; None lets all ranks act.")
    patterns = {k: {"rank": r} for k, r in rank.items()} if isinstance(rank, Mapping) else {}
    depth = check_overrides(model, list(adapter.sites.values()), patterns)
    widths: dict[Pair, int | None] = {}
    for key, delta in adapter.deltas.items():
        if isinstance(delta.pair, Pair):
            by_pattern = override_for(adapter.sites[key], patterns, depth).get("rank")
            widths[delta.pair] = by_pattern if isinstance(rank, Mapping) else rank
    return widths
