"""Checks of the change itself: what `branch`, `forward`, `dense` and `factors` say of it agrees."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from rankworks.conformance import models
from rankworks.conformance.case import Case, adapter_of, bits_equal, distance, holds_numbers, random_state, shake
from rankworks.conformance.errors import ConformanceError, NotApplicable
from rankworks.conformance.run import check
from rankworks.core.adapt import disabled
from rankworks.core.registry import Method

TIGHT = 1e-10  # relative, in float64


@check("all", weight=True)
def dense_has_the_weights_shape(method: Method, case: Case) -> None:
    """dense(weight) is a finite matrix (out, in) for every site, and depends on nothing but its arguments."""
    model = case.adapted(torch.float64, shaken=True)
    adapter = adapter_of(model)
    for name, site in adapter.sites.items():
        change, again = (adapter.deltas[name].dense(site.weight) for _ in range(2))
        if tuple(change.shape) != tuple(site.shape):
            raise ConformanceError(
                f"a change of {name} of shape {tuple(site.shape)}", str(tuple(change.shape)), "dense()"
            )
        if not torch.isfinite(change).all():
            raise ConformanceError(f"a finite change of {name}", "NaN or infinite numbers", "dense()")
        if not bits_equal(change, again):
            raise ConformanceError(f"the same change of {name} twice", "another", "dense(): state that it changes")
        if holds_numbers(adapter.deltas[name]) and not change.abs().max() > 0:
            raise ConformanceError(
                f"a change of {name} once its tensors have moved", "zero", "dense(): a tensor it leaves out"
            )


@check("all", weight=True)
def forward_is_the_layer_with_the_change(method: Method, case: Case) -> None:
    """The adapted output is that of the plain model with the dense change added to its weights (float64, tight)."""
    model = case.adapted(torch.float64, shaken=True)
    x = case.inputs(dtype=torch.float64)
    plain = case.model(torch.float64)
    models.add_changes(plain, model)
    apart = distance(model(x), plain(x))
    if apart > TIGHT:
        raise ConformanceError(
            f"forward within {TIGHT} of the plain model with dense() added to its weights",
            f"{apart:.2g}",
            "branch() against dense() and bias_change(): scale, transposition, bias (a product must not scale it)",
        )
    with disabled(model):
        if not torch.equal(model(x), case.model(torch.float64)(x)):
            raise ConformanceError(
                "the base's own output while disabled", "another", "forward(): what it does to the base"
            )


def _state(delta: nn.Module) -> dict[str, Any]:
    """Return everything a delta holds, tensors copied: its registered tensors and its plain attributes."""
    held: dict[str, Any] = {}
    for path, module in delta.named_modules():
        for store in (module._parameters, module._buffers, vars(module)):
            for name, value in store.items():
                if isinstance(value, Tensor):
                    held[f"{path}.{name}"] = value.detach().clone()
                elif isinstance(value, bool | int | float | str | None):
                    held[f"{path}.{name}"] = value
                elif isinstance(value, list | dict | set) and not name.startswith("_"):
                    held[f"{path}.{name}"] = len(value)
    return held


def _changed(before: dict[str, Any], after: dict[str, Any]) -> str | None:
    for name in [*before, *(n for n in after if n not in before)]:
        a, b = before.get(name), after.get(name)
        if isinstance(a, Tensor) and isinstance(b, Tensor):
            if not bits_equal(a, b):
                return name
        elif type(a) is not type(b) or a != b:
            return name
    return None


@check("all", "delta")
def branch_is_pure(method: Method, case: Case) -> None:
    """The same input gives the same output twice, and a forward changes neither the delta nor its input."""
    model = case.adapted(shaken=True)
    x = case.inputs()
    given = x.clone()
    deltas = adapter_of(model).deltas
    for training in (False, True):
        model.train(training)
        before = {name: _state(delta) for name, delta in deltas.items()}
        first, second = model(x), model(x)
        if not torch.equal(first, second):
            raise ConformanceError(
                "the same output for the same input",
                f"a difference of {distance(first, second):.2g}",
                "branch(): state kept between calls",
            )
        for name, delta in deltas.items():
            if wrong := _changed(before[name], _state(delta)):
                raise ConformanceError(
                    "a forward to change nothing in the delta",
                    f"{name}: {wrong.strip('.')} changed",
                    "branch(): what it assigns to self",
                )
    if not torch.equal(x, given):
        raise ConformanceError("the input as it was", "changed in place", "branch(): operations that write to x")


@check("kinds", "delta")
def rows_are_independent(method: Method, case: Case) -> None:
    """What a row of a batch becomes does not depend on the other rows."""
    model = case.adapted(torch.float64, shaken=True)
    x = case.inputs(6, torch.float64)
    whole = model(x)
    for k in (1, 3):
        apart = distance(model(x[:k]), whole[:k])
        if apart > TIGHT:
            raise ConformanceError(
                f"the first {k} of 6 rows to give the same alone",
                f"a difference of {apart:.2g}",
                "branch(): sums or norms over the batch",
            )


@check("once", "delta")
def any_batch_shape_works(method: Method, case: Case) -> None:
    """A single vector, extra batch dimensions and an empty batch all go through."""
    if case.kind not in ("linear", "conv1d_hf", "rows"):
        raise NotApplicable("it takes no layer that reads plain vectors")
    model = case.adapted(torch.float64, shaken=True)
    x = case.inputs(6, torch.float64)
    flat = model(x)
    for shape in ((6, 1, 8), (2, 3, 8), (1, 3, 2, 8)):
        if distance(model(x.reshape(shape)).reshape(flat.shape), flat) > TIGHT:
            raise ConformanceError(
                f"the same numbers for an input of shape {shape}", "others", "branch(): work on the last dimension only"
            )
    if distance(model(x[0]), flat[0]) > TIGHT:
        raise ConformanceError(
            "the same numbers for a single vector", "others", "branch(): work on the last dimension only"
        )
    if model(x[:0]).shape != flat[:0].shape:
        raise ConformanceError("an empty batch to give an empty output", str(tuple(model(x[:0]).shape)), "branch()")


@check("all", weight=True)
def factors_are_exact(method: Method, case: Case) -> None:
    """Where factors() is given, B A is the dense change, and its rank is at most the factors' inner size."""
    adapter = adapter_of(case.adapted(torch.float64, shaken=True))
    exact = 0
    for name, site in adapter.sites.items():
        delta = adapter.deltas[name]
        factors = delta.factors_on(site.weight)
        if factors is None:
            continue
        exact += 1
        out, in_ = site.shape
        B, A = factors
        if B.dim() != 2 or A.dim() != 2 or B.shape[0] != out or A.shape[1] != in_ or B.shape[1] != A.shape[0]:
            raise ConformanceError(
                f"B ({out}, k) and A (k, {in_}) at {name}", f"{tuple(B.shape)} and {tuple(A.shape)}", "factors()"
            )
        change = delta.dense(site.weight)
        apart = distance(B @ A, change)
        if apart > TIGHT:
            raise ConformanceError(
                f"B A to be the dense change of {name}", f"a difference of {apart:.2g}", "factors(): fold the scale in"
            )
        rank = int(torch.linalg.matrix_rank(change))
        if rank > B.shape[1]:
            raise ConformanceError(f"rank at most {B.shape[1]} at {name}", str(rank), "factors()")
    if not exact:
        raise NotApplicable("factors() is None: its change has no exact low-rank form")


COPIES = 4000


@check("once", "delta")
def dropout_acts_in_training_only(method: Method, case: Case) -> None:
    """Dropout changes nothing in eval mode; in training it acts, and its mean is the output without it."""
    if "dropout" not in method.cls.accepted({}):  # type: ignore[attr-defined]
        raise NotApplicable("it has no dropout")
    if case.kind not in ("linear", "conv1d_hf"):
        raise NotApplicable("it takes no layer that reads plain vectors")
    without, dropping = (case.adapted(torch.float64, dropout=p) for p in (0.0, 0.5))
    for model in (without, dropping):
        shake(model)
    x = case.inputs(dtype=torch.float64)
    if not torch.equal(without(x), dropping(x)):
        raise ConformanceError(
            "dropout to change nothing in eval mode",
            "another output",
            "branch(): dropout(x, self.dropout, self.training)",
        )
    path = next(iter(adapter_of(without).sites.values())).path
    layer, quiet = dropping.get_submodule(path), without.get_submodule(path)
    row = torch.randn(1, _width(quiet), generator=torch.Generator().manual_seed(9), dtype=torch.float64)
    layer.train()
    with random_state(11), torch.no_grad():
        samples, wanted = layer(row.expand(COPIES, -1)), quiet(row)
    spread = samples.std(dim=0)
    if not spread.max() > 0:
        raise ConformanceError(
            "dropout to act in training", "the same output every time", "branch(): dropout is never applied"
        )
    off = ((samples.mean(dim=0) - wanted[0]).abs() / (6 * spread / COPIES**0.5 + 1e-9)).max()
    if off > 1:
        raise ConformanceError(
            "the mean over masks to be the output without dropout",
            f"{6 * off:.1f} standard errors away",
            "branch(): where dropout stands, 1/(1-p)",
        )


def _width(layer: nn.Module) -> int:
    """The number of features a linear layer reads."""
    return layer.in_features if isinstance(layer, nn.Linear) else layer.weight.shape[0]  # type: ignore[return-value, union-attr]
