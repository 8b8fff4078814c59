"""All methods side by side for one model, at their defaults or at an equal number of trained parameters."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from torch import Tensor, nn

from rankworks.core.errors import ConfigError, RankworksError
from rankworks.core.progress import track
from rankworks.core.refuse import check
from rankworks.core.registry import MethodSpec, methods
from rankworks.core.resolve import resolve
from rankworks.core.spec import AdaptSpec
from rankworks.plan.make import ModelLike, Step, check_length, plan_on
from rankworks.plan.result import Comparison, Plan
from rankworks.plan.source import open_source
from rankworks.plan.states import Optimizer
from rankworks.plan.units import parse_bytes

HIGHEST_RANK = 8192
"""Where the search for a rank ends."""


def compare(
    model: ModelLike,
    deltas: Sequence[str] | None = None,
    *,
    budget: int | None = None,
    optimizer: Optimizer = "adamw",
    batch_size: int = 1,
    sequence: int = 512,
    dtype: str | None = None,
    fits: str | float | None = None,
    gradient_checkpointing: bool = False,
    layerwise: bool = False,
    loss: str = "chunked",
    attention: str = "fused",
    task: str | None = None,
    example: Tensor | Mapping[str, Tensor] | None = None,
    **settings: Any,
) -> Comparison:
    """Return a plan per method, in the order of the trained parameters; `print` it for a table.

    deltas: keys of the methods; None takes all. budget: a number of trained parameters; each method gets the rank that
    comes nearest (`rank_for_budget`). settings: as in `adapt`, for every method. The rest is as in `plan`. A method
    that cannot take these settings or this model is in `skipped`, with the reason.
    """
    memory = None if fits is None else parse_bytes(fits)
    step = Step(optimizer, batch_size, sequence, gradient_checkpointing, loss, attention, example, layerwise)
    if budget is not None and "rank" in settings:
        raise ConfigError("give either a budget, which sets every method's rank, or a rank.")
    source = open_source(model, dtype, task)
    check_length(source.model, sequence)
    plans: list[Plan] = []
    skipped: dict[str, str] = {}
    keys = [m.key for m in methods("delta")] if deltas is None else list(deltas)
    for key in track(keys, f"planning {source.title}"):
        try:
            rank = {} if budget is None else {"rank": _nearest_rank(source.model, key, budget, settings)}
            spec = AdaptSpec.from_flat({"delta": key, **settings, **rank}, "plan")
            plans.append(replace(plan_on(source, spec, step, memory), delta=key))
        except RankworksError as error:
            if deltas is not None:  # named by the user: a silent gap would mislead
                raise
            skipped[key] = str(error)
    return Comparison(sorted(plans, key=lambda p: p.trainable_parameters), skipped)


def rank_for_budget(model: ModelLike, delta: str, budget: int, *, task: str | None = None, **settings: Any) -> int:
    """Return the rank at which `delta` trains a number of parameters nearest to `budget`; the lower of two as near.

    Every rank that all sites can take, up to 8,192, is tried with the method's own formula, so a count that falls as
    the rank grows, or jumps, is no trouble. Raises `ConfigError` where the method has no rank.
    """
    return _nearest_rank(open_source(model, None, task).model, delta, budget, settings)


def _nearest_rank(model: nn.Module, delta: str, budget: int, settings: Mapping[str, Any]) -> int:
    if budget < 1:
        raise ConfigError(f"a budget is a number of parameters, at least 1 (given: {budget}).")
    spec = AdaptSpec.from_flat({"delta": delta, **settings}, "plan")
    if not _has_rank(spec.delta):
        raise ConfigError(f"{delta!r} has no rank that could be set to meet a budget.")
    resolved = resolve(model, spec)
    kinds = Counter((settings.model_dump_json(), site.shape, site.shape.kernel) for site, settings in resolved)
    examples = {(s.model_dump_json(), site.shape, site.shape.kernel): s for site, s in resolved}
    best: tuple[int, int] | None = None
    for rank in range(1, HIGHEST_RANK + 1):
        count, shapes = 0, {}
        for kind, times in kinds.items():
            own = with_rank(examples[kind], rank)
            if own.method.cls.problems(own, kind[1]):
                break
            count += times * own.method.cls.count(own, kind[1])
            shapes.setdefault(own.model_dump_json(), (own, []))[1].extend([kind[1]] * times)
        else:
            count += sum(own.method.cls.count_shared(own, found) for own, found in shapes.values())
            best = min(best or (abs(count - budget), rank), (abs(count - budget), rank))
    if best is None:
        check(resolved, spec)  # says what is wrong with these sites at any rank
        raise ConfigError(f"{delta!r} takes no rank from 1 to {HIGHEST_RANK} at all of these sites.")
    return best[1]


def _has_rank(spec: MethodSpec) -> bool:
    inner = getattr(spec, "inner", None)
    return "rank" in type(spec).model_fields or (isinstance(inner, MethodSpec) and _has_rank(inner))


def with_rank(spec: MethodSpec, rank: int) -> MethodSpec:
    """Return the settings with another rank; that of the inner delta for a method that wraps one."""
    if "rank" in type(spec).model_fields:
        return spec.model_copy(update={"rank": rank})
    return spec.model_copy(update={"inner": with_rank(getattr(spec, "inner"), rank)})  # noqa: B009
