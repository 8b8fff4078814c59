"""LoftQ, W ~ Q + s B A found in turns on the way to a quantised base, and PiSSA's order of the same turns."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from facts import adapted, best_of_rank, close, negligible, singular
from learning import losses
from torch import Tensor, nn

import rankworks as rw
from rankworks.core.errors import ConfigError, TargetError
from rankworks.core.state import state_of
from rankworks.quantize import code_book, dequantise_blocks, quantise_blocks
from rankworks.quantize.loop import split
from tiny import tiny_gpt2, tiny_llama, token_batch

INITS: dict[str, Any] = {"loftq": "loftq", "pissa": {"init": "pissa", "quantised": True}}
both = pytest.mark.parametrize("order", list(INITS))


class Stack(nn.Module):
    """Two layers, one with a bias: (..., 64) -> (..., 48)."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(64, 128), nn.Linear(128, 48, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(torch.tanh(self.up(x)))


def nf4(matrix: Tensor) -> Tensor:
    return dequantise_blocks(quantise_blocks(matrix, code_book("nf", 4))).to(matrix.dtype)


def weight() -> Tensor:
    return nn.Linear(64, 128).weight.detach()


def started(order: str = "loftq", rank: int = 8, adapter: Any = None, **settings: Any) -> tuple[Any, nn.Module]:
    """A quantised stack with its adapter, and the stack as it was."""
    torch.manual_seed(0)
    before = Stack()
    model = copy.deepcopy(before)
    evidence = rw.quantise(model, init=order, rank=rank, **settings)  # type: ignore[arg-type]
    given = {"delta": "lora", "rank": rank, "init": INITS[order], **(adapter or {})}
    return rw.adapt(model, rw.AdaptSpec.from_flat(given), evidence=evidence), before


def weights(model: nn.Module) -> dict[str, Tensor]:
    return {name: model.get_submodule(name).weight.detach() for name in ("up", "down")}  # type: ignore[union-attr,operator]


# ---- the turns ----


def test_loftqs_first_turn_leaves_what_the_svd_left_out() -> None:
    W = weight()
    quantised, (u, s, vh) = split(W, 8, nf4, "loftq")
    assert torch.equal(quantised, nf4(W))
    rest = singular(W - quantised)
    close((W - quantised - (u * s) @ vh).square().sum(), rest[8:].square().sum())


def test_pissas_first_turn_quantises_the_residual_of_the_principal_part() -> None:
    W = weight()
    quantised, (u, s, vh) = split(W, 8, nf4, "pissa")
    close((u * s) @ vh, best_of_rank(W, 8))
    assert torch.equal(quantised, nf4(W - (u * s) @ vh))


@both
def test_more_turns_follow_the_definition_and_bring_it_nearer(order: Any) -> None:
    W, errors = weight(), []
    for turns in (1, 2, 5):
        quantised, (u, s, vh) = split(W, 8, nf4, order, turns)
        errors.append(float((W - quantised - (u * s) @ vh).norm()))
    assert errors[0] > errors[1] > errors[2]
    one, (u, s, vh) = split(W, 8, nf4, order, 1)
    two, (u2, s2, vh2) = split(W, 8, nf4, order, 2)
    if order == "loftq":
        assert torch.equal(two, nf4(W - (u * s) @ vh))
        close((u2 * s2) @ vh2, best_of_rank(W - two, 8))
    else:
        close((u2 * s2) @ vh2, best_of_rank(W - one, 8))
        assert torch.equal(two, nf4(W - (u2 * s2) @ vh2))


@both
def test_a_lossless_quantiser_loses_nothing(order: Any) -> None:
    W = weight()
    quantised, (u, s, vh) = split(W, 8, lambda matrix: matrix, order)
    close(quantised + (u * s) @ vh, W)


# ---- the start ----


@both
def test_the_base_has_quantised_values_and_the_product_is_balanced(order: str) -> None:
    model, _ = started(order, adapter={"alpha": 4})
    for name, site in state_of(model).adapter("default").deltas.items():
        delta: Any = site
        assert torch.equal(nf4(weights(model)[name]), weights(model)[name])
        close(delta.B.T @ delta.B, delta.A @ delta.A.T)
        assert delta.A0 is None  # nothing is taken out of the base


@both
def test_q_and_the_change_are_those_of_the_turns(order: Any) -> None:
    model, before = started(order, iterations=3)
    for name, change in rw.delta_weights(model).items():
        quantised, (u, s, vh) = split(weights(before)[name], 8, nf4, order, 3)
        assert torch.equal(weights(model)[name], quantised)
        close(change, (u * s) @ vh)


@both
@pytest.mark.parametrize("scaling", ["standard", "rslora"])
def test_the_product_does_not_depend_on_alpha(order: str, scaling: str) -> None:
    one, two = (started(order, adapter={"alpha": a, "scaling": scaling})[0] for a in (1.0, 32.0))
    for name, change in rw.delta_weights(one).items():
        close(change, rw.delta_weights(two)[name])


def test_a_smaller_rank_takes_the_largest_triplets() -> None:
    model, before = started(rank=8, adapter={"rank": 3})
    for name, change in rw.delta_weights(model).items():
        close(change, best_of_rank(weights(before)[name] - weights(model)[name], 3))


@both
@pytest.mark.parametrize("bits", [3, 4])
def test_the_adapter_brings_the_weights_nearer_than_quantising_alone(order: str, bits: int) -> None:
    model, before = started(order, bits=bits)
    plain = copy.deepcopy(before)
    rw.quantise(plain, bits=bits)
    for name, change in rw.delta_weights(model).items():
        lost = weights(before)[name] - weights(plain)[name]
        assert (weights(before)[name] - weights(model)[name] - change).norm() < 0.95 * lost.norm()


@both
def test_the_output_is_nearer_to_the_float_models_than_the_bases(order: str) -> None:
    model, before = started(order, rank=16, bits=3)
    x = torch.randn(32, 64)
    with torch.no_grad():
        wanted, found = before(x), model(x)
        with rw.disabled(model):
            base = model(x)
    assert (found - wanted).norm() < 0.8 * (base - wanted).norm()
    assert not torch.equal(found, base)  # it does not start as its base


def test_of_full_rank_it_makes_good_for_everything() -> None:
    model, before = started(rank=48)
    change = rw.delta_weights(model)["down"]
    negligible(weights(before)["down"] - weights(model)["down"] - change)


# ---- what comes of it ----


@pytest.mark.parametrize("build", [tiny_llama, tiny_gpt2])
def test_a_language_model_is_nearer_and_learns(build: Any) -> None:
    before, batch = build(), token_batch(batch=4)
    model = copy.deepcopy(before)
    rw.adapt(model, "lora", rank=8, init="loftq", evidence=rw.quantise(model, bits=2, rank=8))
    with torch.no_grad():
        wanted = before(input_ids=batch).logits
        with rw.disabled(model):
            base = model(input_ids=batch).logits
        found = model(input_ids=batch).logits
    assert (found - wanted).norm() < (base - wanted).norm()
    seen = losses(model.train(), steps=8)
    assert seen[-1] < 0.9 * seen[0]


def test_it_is_a_plain_lora_against_the_quantised_base(tmp_path: Path) -> None:
    model, _ = started()
    x = torch.randn(4, 64)
    y = model(x)
    assert state_of(model).adapter("default").deltas["up"].factors().A.shape == (8, 64)  # type: ignore[union-attr]
    rw.save(model, tmp_path / "adapter")
    rw.merge(model)
    close(model(x), y)
    rw.unmerge(model)
    rw.detach(model)
    assert torch.equal(rw.load(model, tmp_path / "adapter")(x), y)


def test_dora_goes_around_it() -> None:
    model, before = started(adapter={"delta": "dora"})
    x = torch.randn(32, 64)
    with torch.no_grad():
        found = model(x)
        with rw.disabled(model):
            base = model(x)
        assert (found - before(x)).norm() < (base - before(x)).norm()


# ---- refusals ----


@both
def test_without_the_step_it_is_refused(order: str) -> None:
    with pytest.raises(TargetError, match=r"rankworks.quantise\(model"):
        adapted(nn.Linear(64, 48), "lora", init=INITS[order])


def test_a_rank_above_that_of_the_step_is_refused() -> None:
    with pytest.raises(ConfigError, match="rank=8 on the unquantised"):
        started(rank=4, adapter={"rank": 8})


def test_it_is_not_measured_on_data() -> None:
    with pytest.raises(ConfigError, match="not measured on data"):
        rw.calibrate(Stack(), [{}], rw.AdaptSpec.from_flat({"delta": "lora", "init": "loftq"}), progress=False)
