"""calibrate: run data through a model once and return what a method asks to know before it starts."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from rankworks.calibrate.agree import agreed
from rankworks.calibrate.inputs import ApartError, Kept, Masks, Reader, masks_of
from rankworks.calibrate.statistic import Statistic
from rankworks.calibrate.statistics import STATISTICS
from rankworks.calibrate.watch import quiet, watched
from rankworks.core.errors import ConfigError, UnknownNameError, did_you_mean
from rankworks.core.evidence import MEASURED, Evidence, Need, as_needs
from rankworks.core.progress import track
from rankworks.core.refuse import check
from rankworks.core.registry import MethodSpec
from rankworks.core.resolve import needs_of, resolve
from rankworks.core.site import Site
from rankworks.core.spec import AdaptSpec
from rankworks.core.targets import find_sites

Loss = Callable[[nn.Module, Any], Tensor]


def needed(model: nn.Module, spec: AdaptSpec, given: Evidence | None = None) -> tuple[str, ...]:
    """Return the statistics an adapter of this spec needs to know from data, in a fixed order; often none.

    given: what is known already.
    """
    return tuple(sorted({need.name for each in resolve(model, spec) for need in _missing(each, spec, given)}))


def _missing(each: tuple[Site, MethodSpec], spec: AdaptSpec, given: Evidence | None) -> tuple[Need, ...]:
    """Return what a site needs and is not known of it."""
    known = (given or {}).get(each[0].name, {})
    return tuple(need for need in needs_of([each], spec) if not need.met(known))


def calibrate(
    model: nn.Module,
    data: Iterable[Any],
    needs: Sequence[str | Need] | AdaptSpec = ("gradient",),
    *,
    targets: str | Sequence[str] = "all-linear",
    exclude: Sequence[str] = (),
    loss: Loss | None = None,
    masks: Callable[[Any], Masks] = masks_of,
    given: Evidence | None = None,
    progress: bool = True,
) -> Evidence:
    """Return {site name: {statistic: tensor}} over the batches of `data`, for `adapt(..., evidence=...)`.

    Args:
        model: the model as it is; in the end its tensors, flags, hooks and mode are what they were.
        data: batches, each used once in its order: mappings of the model's keyword arguments (with labels), or
            whatever `loss` takes. A statistic that seeks a limit (`input_svd`) may ask for the same again, or need no
            more of them.
        needs: names of statistics (`calibrate.STATISTICS`), such as "gradient" or "input_second_moment", or the
            `AdaptSpec` of an adapter: then what it needs is measured at its sites.
        targets: which weights, as in `adapt`.
        exclude: which of them not, as in `adapt`.
        loss: `loss(model, batch)`, a scalar; by default `model(**batch).loss`.
        masks: `masks(batch)`, which tokens count in statistics of inputs; by default those of a mapping's
            `attention_mask`, and its `labels` where a statistic asks for learned tokens only.
        given: what is known already of an `AdaptSpec`'s sites, and is not measured.
        progress: show a bar where it takes long.

    The model runs in eval mode, so that equal calls give equal numbers. Sums stand on the CPU in at least float32; on
    the model's device no more than about one layer's gradient exists at a time. Sites that read the very same tensor
    share one statistic of inputs. In a run of several processes give each the same data: all of them measure, and the
    first one's results are sent to the others. Raises `ConfigError`, `UnknownNameError` or `TargetError`.
    """
    if isinstance(needs, AdaptSpec):
        resolved = resolve(model, needs)
        check(resolved, needs)  # before the pass, which may be long
        sites, wanted = [site for site, _ in resolved], {r[0].name: _missing(r, needs, given) for r in resolved}
    else:
        sites, same = find_sites(model, targets, exclude), as_needs(needs)
        wanted = {site.name: same for site in sites}
    _check(sites, wanted)
    if masks is masks_of and getattr(getattr(model, "config", None), "is_encoder_decoder", False):
        _refuse_two_masks(wanted)
    if not isinstance(data, Sequence):
        data = list(data)
    if not data:
        raise ConfigError("calibrate was given no data: give at least one batch.")
    alone: set[str] = set()
    while True:
        try:
            kept = _measured(model, sites, wanted, data, loss or _model_loss, masks, alone, progress)
            break
        except ApartError as found:
            alone.add(found.site)
    _refuse_gaps(kept)
    return agreed(_results(kept), sites[0].tensor.device)


def _measured(
    model: nn.Module,
    sites: Sequence[Site],
    wanted: Mapping[str, Sequence[Need]],
    data: Sequence[Any],
    loss: Loss,
    masks: Callable[[Any], Masks],
    alone: set[str],
    progress: bool,
) -> Kept:
    """Run the data through the model until every statistic is done, or has seen them as often as it may."""
    kept: Kept = {site.name: {n.name: STATISTICS[n.name](**n.options) for n in wanted[site.name]} for site in sites}
    reader = Reader(kept, wanted, alone)
    passes = max((s.passes for found in kept.values() for s in found.values()), default=1)
    with quiet(model), watched(sites, kept, reader, _any(kept, lambda s: s.backward)) as watch:
        for turn in range(passes):
            if turn:
                _retire(kept, turn)
            for batch in track(data, "calibrating" + (f", pass {turn + 1}" if turn else "")) if progress else data:
                if not _any(kept, lambda s: not s.idle):
                    return kept
                backward = _any(kept, lambda s: s.backward and not s.idle)
                reader.begin(masks(batch))
                with torch.set_grad_enabled(backward):
                    value = loss(model, batch)
                if backward:
                    watch.backward(value)
                watch.end()
    return kept


def _any(kept: Kept, holds: Callable[[Statistic], bool]) -> bool:
    return any(holds(s) for found in kept.values() for s in found.values())


def _retire(kept: Kept, turn: int) -> None:
    """Let those that may see the data `turn` times only take no more."""
    for found in kept.values():
        for statistic in found.values():
            statistic.spent = statistic.passes <= turn


def _results(kept: Kept) -> dict[str, dict[str, Tensor]]:
    """Return the results by site, computing a shared one once; the parts of one that has several are "name.part"."""
    made: dict[int, Any] = {}
    results: dict[str, dict[str, Tensor]] = {}
    for site, found in kept.items():
        results[site] = {}
        for name, statistic in found.items():
            if id(statistic) not in made:
                made[id(statistic)] = statistic.result()
            result = made[id(statistic)]
            results[site] |= (
                {name: result} if isinstance(result, Tensor) else {f"{name}.{k}": t for k, t in result.items()}
            )
    return results


def _model_loss(model: nn.Module, batch: Any) -> Tensor:
    if not isinstance(batch, Mapping):
        raise ConfigError(
            f"a calibration batch is a mapping of the model's keyword arguments, not {type(batch).__name__}: give "
            "loss=lambda model, batch: ... for other data."
        )
    value = getattr(model(**batch), "loss", None)
    if value is None:
        raise ConfigError(
            "the model returned no loss for the calibration batch: put labels into it, or give loss=lambda model, "
            "batch: ..."
        )
    return value


def _reads(need: Need) -> bool:
    return STATISTICS[need.name].read is not Statistic.read


def _refuse_two_masks(wanted: Mapping[str, Sequence[Need]]) -> None:
    if any(_reads(need) for needs in wanted.values() for need in needs):
        raise ConfigError(
            "an encoder and a decoder have masks of their own, which by default cannot be told apart: give batches "
            "without padding and masks=lambda batch: rankworks.calibrate.Masks()."
        )


def _check(sites: Sequence[Site], wanted: Mapping[str, Sequence[Need]]) -> None:
    """Raise for an unknown statistic, and for one of inputs where no inputs are known."""
    for site in sites:
        for need in wanted[site.name]:
            if need.source != MEASURED:
                raise ConfigError(
                    f"the {need.name} of a weight is not measured on data but stands in evidence, {need.source}."
                )
            if need.name not in STATISTICS:
                raise UnknownNameError(f"no statistic is called {need.name!r}.{did_you_mean(need.name, STATISTICS)}")
            if _reads(need) and (
                site.kind not in ("linear", "conv1d_hf", "conv", "rows") or getattr(site.module, "groups", 1) > 1
            ):
                raise ConfigError(
                    f"{need.name} is not defined at {site.name}, of kind {site.kind!r}, whose inputs are no vectors of "
                    "their own: leave it out of targets (exclude)."
                )


def _refuse_gaps(kept: Kept) -> None:
    """Raise where a statistic has no result, naming the first site and its reason."""
    gaps = [(site, why) for site, found in kept.items() for s in found.values() if (why := s.lacks()) is not None]
    if gaps:
        site, why = gaps[0]
        others = len({name for name, _ in gaps}) - 1
        raise ConfigError(f"{site}" + (f" and {others} more" if others else "") + f" {why}.")
