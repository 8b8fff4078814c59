"""rw.quantise moves the base, the same way every time and for any holder; what it cannot move, it refuses untouched."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import rankworks as rw
from rankworks.core.errors import ConfigError, RankworksError, TargetError
from rankworks.core.weights.holders import dense_weight


class Stack(nn.Module):
    """Two layers, float32."""

    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.up, self.down = nn.Linear(64, 128), nn.Linear(128, 48, bias=False)
        self.to(dtype)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(torch.tanh(self.up(x)))


def test_it_is_deterministic_and_leaves_other_weights_alone() -> None:
    one, two = Stack(), Stack()
    first, second = (rw.quantise(m, "up", rank=4) for m in (one, two))
    assert list(first) == ["up"]
    assert all(torch.equal(first["up"][k], second["up"][k]) for k in first["up"])
    assert torch.equal(one.up.weight, two.up.weight)
    assert torch.equal(one.down.weight, Stack().down.weight)
    assert torch.equal(one.up.bias, Stack().up.bias)


def test_without_a_rank_it_is_the_quantised_weight_alone() -> None:
    one, two = Stack(), Stack()
    assert rw.quantise(one, rank=None) == {}
    rw.quantise(two, rank=4)  # LoftQ's first turn quantises first
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), two.parameters(), strict=True))


def test_a_16_bit_weight_is_rounded_once_more_and_the_product_knows() -> None:
    before = Stack(torch.bfloat16)
    model = copy.deepcopy(before)
    evidence = rw.quantise(model, rank=48)
    rw.adapt(model, "lora", rank=48, init="loftq", evidence=evidence)
    lost = (before.down.weight - model.down.weight - rw.delta_weights(model)["down"]).detach().float()
    assert model.down.weight.dtype == torch.bfloat16
    assert lost.norm() < 1e-3 * before.down.weight.norm()  # of full rank it makes good for everything


@pytest.mark.parametrize("order", ["loftq", "pissa"])
def test_bitsandbytes_holds_the_very_same_numbers(order: str) -> None:
    bnb = pytest.importorskip("bitsandbytes", reason="a development dependency")
    dense, held = Stack(), Stack()
    evidence = [
        rw.quantise(model, init=order, rank=8, holder=holder)  # type: ignore[arg-type]
        for model, holder in ((dense, "dense"), (held, "bitsandbytes"))
    ]
    for name in ("up", "down"):
        layer: Any = held.get_submodule(name)
        assert isinstance(layer, bnb.nn.Linear4bit)
        assert torch.equal(dense_weight(layer.weight, layer), dense.get_submodule(name).weight)
    init = "loftq" if order == "loftq" else {"init": "pissa", "quantised": True}
    for model, found in zip((dense, held), evidence, strict=True):
        rw.adapt(model, "lora", rank=8, init=init, evidence=found)
    x = torch.randn(4, 64)
    torch.testing.assert_close(held(x), dense(x), rtol=0, atol=1e-5)


# ---- refusals ----


def test_what_cannot_be_quantised_is_refused_with_the_model_untouched() -> None:
    model = Stack()
    cases: list[tuple[dict[str, Any], str]] = [
        ({"bits": 1}, "2 to 8 bits"),
        ({"rank": 0}, "at least 1"),
        ({"init": "svd"}, "'loftq' or 'pissa'"),
        ({"holder": "bitsandbytes", "bits": 3}, "holder='dense'"),
    ]
    for settings, words in cases:
        with pytest.raises(ConfigError, match=words):
            rw.quantise(model, **settings)
    with pytest.raises(RankworksError):
        rw.quantise(model, "nothing")
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), Stack().parameters(), strict=True))
    rw.adapt(model, "lora")
    with pytest.raises(ConfigError, match="quantise the base first"):
        rw.quantise(model)


def test_bitsandbytes_is_given_no_rows_of_broken_blocks() -> None:
    pytest.importorskip("bitsandbytes", reason="a development dependency")
    with pytest.raises(TargetError, match="no multiple of block = 64"):
        rw.quantise(nn.Sequential(nn.Linear(96, 64)), holder="bitsandbytes")
    with pytest.raises(TargetError, match="no plain linear layer"):
        rw.quantise(nn.Sequential(nn.Conv1d(4, 4, 3)), "0", holder="bitsandbytes")


def test_a_weight_under_two_names_is_refused() -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    model[1].weight = model[0].weight
    with pytest.raises(TargetError, match="exclude one of them"):
        rw.quantise(model)
    rw.quantise(model, exclude=["1"])
