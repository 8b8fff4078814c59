"""Flexora: a weight per layer, its exact gradient, and which layers are kept."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from facts import EXACT, close, negligible, quick
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open
from searching import batches, differences, language_model, loss_of, relaxed, toy_scores
from torch import Tensor

import rankworks as rw
from rankworks.core.errors import ConfigError
from rankworks.core.registry import build
from rankworks.train.losses.objective import Objective
from rankworks.train.searching.relax import Relaxed, WholeObjective
from tiny import tiny_mlp, token_batch

SELECT = {"select": "flexora"}
DELTAS = {
    "lora": {"rank": 2, "bias": False},
    "dora": {"rank": 2, "detach_norm": False},
    "vera": {"rank": 4},
    "shira": {"rank": 1},
    "bone-bat": {"rank": 2},
}


def selection(**settings):
    spec = build("selection", {**SELECT, **settings})
    return spec.method.cls(spec)


def test_at_the_start_the_model_is_the_plainly_adapted_one():
    model, ids = language_model(), token_batch(vocab=32)
    with relaxed(model, SELECT) as search, torch.no_grad():
        weighed = model(ids).logits
        assert all(change.factor == 1 for change in search.changes.values())
    with torch.no_grad():
        close(weighed, model(ids).logits)
        with rw.disabled(model):
            assert not torch.allclose(weighed, model(ids).logits)


@quick
@given(st.lists(st.floats(-9, 9), min_size=1, max_size=40))
def test_the_weights_sum_to_the_number_of_layers(scores: list[float]):
    weights = selection().weights(torch.tensor(scores, dtype=torch.float64))
    assert abs(float(weights.sum()) - len(scores)) < EXACT * len(scores)
    assert (weights > 0).all()


@pytest.mark.parametrize("delta", DELTAS)
def test_the_gradient_is_that_of_finite_differences_and_sums_to_zero(delta: str):
    model, held = language_model(), batches(2, seed=5)
    with relaxed(model, SELECT, delta, **DELTAS[delta]) as search:
        search.scores.normal_()

        def loss(scores: Tensor) -> Tensor:
            with torch.no_grad():
                search.act(scores)
                return (loss_of(model, held[0]) + loss_of(model, held[1])) / 2

        expected = differences(loss, search.scores)
        gradient = search.gradient(Objective(model), held)
        close(gradient, expected, 1e-6)
        negligible(gradient.sum() / gradient.abs().max())
        assert gradient.abs().max() > 1e-4
        assert all(p.grad is None for p in model.parameters())


def test_the_change_is_multiplied_once():
    model = language_model(layers=1)
    layer = model.get_submodule("transformer.h.0.attn.c_attn")
    with relaxed(model, SELECT, targets=["c_attn"]) as search, torch.no_grad():
        (change,) = search.changes.values()
        x, once = torch.randn(3, change.shape.in_), change.owner.dense(torch.zeros(change.shape))
        one = layer(x)
        change.factor = torch.tensor(2.0)
        close(layer(x) - one, x @ once.t())
        close(change.dense(torch.zeros(change.shape)), 2 * once)


def test_a_layer_whose_change_is_zero_has_no_part_in_the_gradient_of_the_weights():
    model, (held,) = language_model(), batches()
    with relaxed(model, SELECT) as search:
        for site in search.units["transformer.h.1"]:
            with torch.no_grad():
                search.changes[site].owner.B.zero_()  # type: ignore[union-attr,operator]
        weights = [torch.ones((), requires_grad=True) for _ in search.units]
        for weight, sites in zip(weights, search.units.values(), strict=True):
            for site in sites:
                search.changes[site].factor = weight
        of_weights = torch.stack(torch.autograd.grad(loss_of(model, held), weights))
        assert of_weights[1] == 0
        assert (of_weights[[0, 2]] != 0).all()
        close(search.gradient(Objective(model), [held]), of_weights - of_weights.mean())  # w = 1: see the module's text


def after_inner_steps(model, search: Relaxed, scores: Tensor, inner, rate: float, held) -> Tensor:
    """The held-out loss after plain steps of gradient descent at these scores; the parameters are put back."""
    search.act(scores.detach())
    parameters = [p for p in model.parameters() if p.requires_grad]
    before = [p.detach().clone() for p in parameters]
    for batch in inner:
        slopes = torch.autograd.grad(loss_of(model, batch), parameters)
        with torch.no_grad():
            for parameter, slope in zip(parameters, slopes, strict=True):
                parameter.sub_(rate * slope)
    with torch.no_grad():
        loss = loss_of(model, held)
        for parameter, old in zip(parameters, before, strict=True):
            parameter.copy_(old)
    return loss


@pytest.mark.parametrize(("depth", "delta"), [(1, "lora"), (2, "lora"), (1, "dora"), (1, "vera")])
def test_the_unrolled_gradient_is_that_of_finite_differences_through_the_inner_steps(depth: int, delta: str):
    model, inner, (held,), rate = language_model(2), batches(depth, seed=7), batches(), 0.5
    with relaxed(model, SELECT, delta, **DELTAS[delta]) as search:
        search.scores.normal_()
        expected = differences(lambda a: after_inner_steps(model, search, a, inner, rate, held), search.scores)
        gradient = search.gradient(WholeObjective(model), [held], inner, rate)
        close(gradient, expected, 1e-5)
        first = search.gradient(Objective(model), [held])
        assert (gradient - first).abs().max() > 1e-2 * first.abs().max()  # the inner steps matter


def test_no_inner_step_is_the_first_order():
    assert selection(order="unrolled", unroll=0).depth == 0 == selection(order="first", unroll=3).depth
    assert selection(order="unrolled").depth == 1
    model, (held,) = language_model(2), batches()
    with relaxed(model, SELECT) as search:
        close(search.gradient(WholeObjective(model), [held], (), 0.5), search.gradient(Objective(model), [held]))


def test_layers_above_zero_are_kept_or_the_best():
    scores = {"l.0": -0.1, "l.1": 0.3, "l.2": 0.0, "l.3": 0.1}
    assert selection().decide(scores) == ["l.1", "l.3"]
    assert selection(top_k=1).decide(scores) == ["l.1"]
    assert selection(top_k=3).decide(scores) == ["l.1", "l.2", "l.3"]
    assert selection().decide({"l.0": -0.2, "l.1": -0.1}) == ["l.1"]
    with pytest.raises(ConfigError, match=r"top_k is 5, but the targets lie in 4 layers"):
        selection(top_k=5).decide(scores)


@pytest.mark.parametrize(("layers", "numbers"), [(32, 3_407_872), (16, 1_703_936), (14, 1_490_944), (12, 1_277_952)])
def test_printed_counts(layers: int, numbers: int):
    select = {**SELECT, "chosen": [f"model.layers.{2 * i % 32 + (i >= 16)}" for i in range(layers)]}
    counted = rw.plan("llama-3-8b", "lora", rank=8, targets=["q_proj", "v_proj"], select=select)
    assert counted.trainable_parameters == numbers == layers * 106_496


def test_the_layer_that_alone_can_lower_the_held_out_loss_is_chosen():
    scores = toy_scores(SELECT, ["layers.1.left", "layers.1.right"])
    assert selection().decide(scores) == ["layers.1"]


def test_what_was_not_chosen_is_in_no_file(tmp_path: Path):
    model = rw.adapt(language_model().float(), "lora", rank=2, select={**SELECT, "chosen": ["transformer.h.2"]})
    rw.save(model, tmp_path / "ours")
    rw.export(model, tmp_path / "peft", kind="peft")
    for file in (tmp_path / "ours" / "adapter.safetensors", tmp_path / "peft" / "adapter_model.safetensors"):
        with safe_open(file, "pt") as data:
            assert data.keys()
            assert all("h.2." in key for key in data.keys())  # noqa: SIM118 - not a mapping


def test_what_cannot_be_is_refused_with_the_remedy():
    with pytest.raises(ConfigError, match=r"flexora chooses by a search on data: train from a configuration"):
        rw.adapt(language_model(), "lora", select="flexora")
    with pytest.raises(ConfigError, match=r"chosen names 'transformer.h.7'.*transformer.h"):
        rw.adapt(language_model(), "lora", select={**SELECT, "chosen": ["transformer.h.7"]})
    with pytest.raises(ConfigError, match="no targeted site belongs to"):
        rw.adapt(tiny_mlp(), "lora", select={**SELECT, "chosen": ["layers.0"]})
    with pytest.raises(ConfigError, match="top_k"):
        build("selection", {**SELECT, "top_k": 0})
