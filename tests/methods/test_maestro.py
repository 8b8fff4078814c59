"""Maestro: two factors in place of the weight, ordered by a sampler and a lasso, and cut where they have emptied."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from facts import (
    KINDS,
    One,
    adapted,
    base_of,
    best_of_rank,
    change_of,
    close,
    delta_of,
    layer_and_input,
    linear,
    shake,
    weight_of,
)
from runs import same, tiny_run
from torch import nn

import rankworks as rw
from rankworks.compress import factorised
from rankworks.core.errors import ConfigError, TargetError
from rankworks.core.hooks import Moment, method_hooks
from rankworks.core.store import adapter_state
from rankworks.core.summary import trained
from rankworks.ranks.maestro import OrderedDropout
from tiny import tiny_llama

OUT, IN = 6, 9


def one(kind: str = "linear", delta: str = "maestro", **ranks: Any) -> Any:
    """A layer with Maestro's factors and schedule, its hook, and an input."""
    layer, x = layer_and_input(kind) if kind != "plain" else (linear(IN, OUT), torch.randn(5, IN))
    settings = {} if delta == "maestro" else {"rank": 4}
    model = adapted(layer, delta, ranks={"ranks": "maestro", **ranks}, **settings)
    (hook,) = method_hooks(model)
    assert isinstance(hook, OrderedDropout)
    return model, hook, x


def moment(model: nn.Module, step: int = 1, steps: int = 10, **more: Any) -> Moment:
    return Moment(model, torch.optim.SGD(trained(model), lr=0.1), step, steps, **more)


# ---- the layer -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("bias", [False, True])
def test_the_factored_layer_starts_as_the_dense_one(kind: str, bias: bool):
    if bias and kind == "embedding":
        with pytest.raises(TargetError, match="has no bias"):
            adapted(layer_and_input(kind)[0], "maestro", bias=True)
        return
    layer, x = layer_and_input(kind)
    model = adapted(layer, "maestro", bias=bias)
    close(model(x), base_of(model, x), 1e-12)
    delta, W = delta_of(model), weight_of(model)
    assert delta.rank == min(W.shape)
    close(delta.B @ delta.A, W, 1e-12)
    s = torch.linalg.svdvals(W)
    close(delta.A @ delta.A.t(), torch.diag(s), 1e-12)  # balanced
    close(delta.B.t() @ delta.B, torch.diag(s), 1e-12)
    if bias:
        with torch.no_grad():
            delta.c.fill_(0.5)
        close(model(x), base_of(model, x) + 0.5, 1e-12)


def test_a_smaller_rank_starts_from_the_best_approximation():
    model = adapted(linear(IN, OUT), "maestro", rank=3)
    W = weight_of(model)
    close(W + change_of(model), best_of_rank(W, 3), 1e-12)
    assert sum(p.numel() for p in trained(model)) == 3 * (IN + OUT)


@pytest.mark.parametrize("kind", KINDS)
def test_truncation_is_the_sliced_product_unscaled(kind: str):
    model, _, x = one(kind)
    delta = shake(model)
    W = weight_of(model)
    for b in range(1, delta.rank + 1):
        rw.set_rank(model, b)
        assert len(delta.acting()[1]) == b
        close(W + change_of(model), delta.B[:, :b] @ delta.A[:b])
        truncated = model(x)
        rw.merge(model)
        close(model(x), truncated, 1e-11)
        rw.unmerge(model)
    rw.set_rank(model, None)
    close(W + change_of(model), delta.B @ delta.A)


def test_a_convolution_is_two_convolutions():
    layer, x = layer_and_input("conv2d")
    model = adapted(layer, "maestro")
    delta = shake(model)
    first = torch.nn.functional.conv2d(
        x, delta.A.reshape(-1, *layer.weight.shape[1:]), None, layer.stride, layer.padding, layer.dilation
    )
    close(model(x), torch.nn.functional.conv2d(first, delta.B[:, :, None, None], layer.bias), 1e-12)


def test_the_frozen_product_is_never_made():
    layer = linear(IN, OUT)
    model = adapted(layer, "maestro", rank=2)
    x = torch.randn(5, IN)
    wanted = model(x)
    with torch.no_grad():
        layer.weight.fill_(float("nan"))
    assert torch.equal(model(x), wanted)


@pytest.mark.parametrize("kind", KINDS)
def test_rank_zero_gives_the_bias_alone(kind: str, tmp_path: Path):
    model, hook, x = one(kind, threshold=1e9)
    y = base_of(model, x)
    hook.on_end(moment(model))
    assert (delta_of(model).rank, delta_of(model).spec.rank) == (0, 0)
    bias = model.layer.bias if kind != "embedding" else None
    wanted = torch.zeros_like(y)
    if bias is not None:
        wanted = wanted + (bias[:, None, None] if kind == "conv2d" else bias)
    close(model(x) + 1, wanted + 1, 1e-14)
    rw.merge(model)
    close(model(x) + 1, wanted + 1, 1e-12)
    rw.unmerge(model)
    rw.save(model, tmp_path / "a")
    rw.detach(model)
    close(rw.load(model, tmp_path / "a")(x) + 1, wanted + 1, 1e-14)
    assert hook.pairs.take() == {}
    assert hook.penalty(moment(model)) is None


# ---- afterwards ----------------------------------------------------------------------------------------------------


def test_the_result_merges_saves_and_exports(tmp_path: Path):
    ranks = {"ranks": "maestro", "penalty": 3.0, "threshold": 0.35, "every": 3}
    loop = tiny_run(delta="maestro", ranks=ranks, steps=12, optim={"lr": 3e-2})
    loop.run()
    model, x = loop.model.eval(), torch.arange(3, 15).unsqueeze(0)
    wanted = model(x).logits
    fresh = rw.load(tiny_llama(), rw.save(model, tmp_path / "own")).eval()
    same(adapter_state(fresh), adapter_state(model))
    assert torch.equal(fresh(x).logits, wanted)
    rw.export(model, tmp_path / "merged", kind="merged")
    plain = type(fresh).from_pretrained(tmp_path / "merged").eval()
    torch.testing.assert_close(plain(x).logits, wanted, atol=1e-4, rtol=1e-4)
    rw.set_rank(model, {"q_proj": 1})  # any smaller rank, without training again
    told = factorised(model)
    assert {f.rank for f in told.layers if "q_proj" in f.site} <= {0, 1}
    cut = model(x).logits
    rw.merge(model)
    torch.testing.assert_close(model(x).logits, cut, atol=1e-4, rtol=1e-4)


def test_the_count_of_what_is_cheaper():
    model = rw.adapt(One(linear(10, 6)), "maestro", targets="layer", ranks="maestro")
    (form,) = factorised(model).layers
    assert (form.rank, form.factored, form.dense, form.cheaper) == (6, 96, 60, "dense")
    for rank, cheaper in ((4, "dense"), (3, "factored"), (1, "factored")):
        told = factorised(rw.set_rank(model, rank))
        assert told.layers[0].cheaper == cheaper
        assert told.layers[0].factored == rank * 16 == told.factored
        assert told.best == min(60, rank * 16)
    assert "at best" in str(told)
    assert told.to_dict()["layers"][0]["cheaper"] == "factored"
    with pytest.raises(ConfigError, match="delta='maestro'"):
        factorised(adapted(linear(), "lora", rank=2))


def test_what_is_wrong_is_refused():
    with pytest.raises(TargetError, match="at most min"):
        adapted(linear(IN, OUT), "maestro", rank=7)
    with pytest.raises(TargetError, match="rank 0"):
        adapted(linear(IN, OUT), "maestro", rank=0)
    with pytest.raises(TargetError, match="lacks: choose maestro"):
        adapted(linear(IN, OUT), "vera", rank=2, ranks="maestro")
    for schedule in ("dylora", "lora-squeeze"):
        with pytest.raises(TargetError, match="trained pair"):
            adapted(linear(IN, OUT), "maestro", ranks=schedule)
    with pytest.raises(TargetError, match="additive"):
        adapted(linear(IN, OUT), {"delta": "dora", "inner": "maestro"})
    with pytest.raises(TargetError, match="fills a factor pair"):
        adapted(linear(IN, OUT), "maestro", init="pissa")
    with pytest.raises(ConfigError, match="no trained pair of factors"):
        rw.squeeze(adapted(linear(IN, OUT), "maestro"), rank=2)
