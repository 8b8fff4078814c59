"""Gated ranks: W' = W + B diag(g) A around any inner delta with such factors, with g = 1 at the start."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from facts import (
    KINDS,
    adapted,
    backward,
    base_of,
    change_of,
    close,
    delta_of,
    layer_and_input,
    linear,
    negligible,
    rank_of,
    shake,
    weight_of,
)
from learning import losses, tiny_adapted
from torch import Tensor, nn

import rankworks as rw
from rankworks.core.errors import TargetError
from rankworks.core.ranks.surgery import gated_of, pair_of
from rankworks.core.site import Shape
from rankworks.core.state import state_of
from rankworks.core.store import adapter_state
from tiny import tiny_convnet, tiny_gpt2, tiny_llama, tiny_mlp, token_batch

INNER = ["lora", "vera", "lora-xs", "nlora"]
STARTS = [("lora", "pissa"), ("lora", "olora"), ("nlora", {"init": "nlora", "form": "nystrom"})]


def of_inner(inner: str, init: Any = "default") -> nn.Module:
    """One layer with gates around this delta, all of whose numbers are noise."""
    model = adapted(linear(9, 8), "gated", inner=inner, rank=3, init=init)
    shake(model)
    return model


# ---- the change ----


@pytest.mark.parametrize("inner", INNER)
def test_with_gates_of_one_it_is_the_inner_delta(inner: str) -> None:
    layer, x = linear(9, 8), torch.randn(4, 9)
    model = adapted(layer, "gated", inner=inner, rank=3)
    delta = shake(model)
    with torch.no_grad():
        delta.gate.fill_(1)
    close(change_of(model), delta.inner.dense(weight_of(model)))
    close(model(x), base_of(model, x) + delta.inner.branch(x))


@pytest.mark.parametrize("inner", INNER)
def test_the_gates_stand_between_the_inner_factors(inner: str) -> None:
    model, x = of_inner(inner), torch.randn(4, 9)
    delta = delta_of(model)
    B, A = delta.inner.factors()
    change = B @ torch.diag(delta.gate) @ A
    close(change_of(model), change)
    close(model(x), base_of(model, x) + x @ change.T)


@pytest.mark.parametrize("kind", KINDS)
def test_the_start_leaves_the_output_bit_identical_at_any_layer(kind: str) -> None:
    layer, x = layer_and_input(kind)
    plain = layer(x)
    for init in ("default", "pissa"):
        model = adapted(layer, "gated", rank=2, init=init)
        assert (delta_of(model).gate == 1).all()
        assert torch.equal(model(x), plain)
        rw.detach(model)


@pytest.mark.parametrize(("inner", "init"), STARTS)
def test_a_start_taken_out_of_the_base_is_not_gated(inner: str, init: Any) -> None:
    """W + s (B diag(g) A - B0 A0): with every gate closed the start is still missing from the base."""
    model = adapted(linear(9, 8), "gated", inner=inner, rank=3, alpha=6, init=init)
    delta = delta_of(model)
    start = delta.inner.scale * (
        delta.inner.B0 @ delta.inner.A0 if inner == "lora" else delta.inner.B0 @ delta.inner.N0 @ delta.inner.A0
    )
    shake(model)
    factors: list[Tensor] = [delta.inner.B, *([delta.inner.N] if inner == "nlora" else []), torch.diag(delta.gate)]
    product = torch.linalg.multi_dot([*factors, delta.inner.A])
    close(change_of(model), delta.inner.scale * product - start)
    with torch.no_grad():
        delta.gate.zero_()
    close(change_of(model), -start)
    assert not delta.empty


def test_a_gate_of_zero_takes_its_rank_out_to_the_bit() -> None:
    model, x = of_inner("lora"), torch.randn(4, 9)
    delta = delta_of(model)
    with torch.no_grad():
        delta.gate[1] = 0
    assert rank_of(change_of(model)) == 2
    assert delta.factors_on(weight_of(model)).A.shape == (2, 9)
    y = model(x)
    with torch.no_grad():
        delta.inner.A[1] = 1e3
    assert torch.equal(model(x), y)
    assert not delta.empty
    with torch.no_grad():
        delta.gate.zero_()
    assert delta.empty
    assert torch.equal(model(x), base_of(model, x))


# ---- gradients ----


@pytest.mark.parametrize("inner", INNER)
def test_the_gates_gradient_is_the_diagonal_of_bt_g_at(inner: str) -> None:
    model = of_inner(inner)
    _, G = backward(model, torch.randn(4, 9))
    delta = delta_of(model)
    B, A = delta.inner.factors()
    close(delta.gate.grad, (B.T @ G @ A.T).diagonal())


def test_the_factors_gradients_pass_the_gates() -> None:
    model = adapted(linear(), "gated", rank=3, alpha=6)
    delta = shake(model)
    _, G = backward(model, torch.randn(4, 7))
    pair, gate = delta.inner, delta.gate
    close(pair.A.grad, 2 * gate.unsqueeze(1) * (pair.B.T @ G))
    close(pair.B.grad, 2 * (G @ pair.A.T) * gate)


def test_at_a_start_of_zero_the_gates_have_no_gradient() -> None:
    model = adapted(linear(), "gated", rank=3)
    backward(model, torch.randn(4, 7))
    negligible(delta_of(model).gate.grad)
    assert delta_of(model).inner.B.grad.any()


def test_held_gates_get_no_gradient_and_the_others_the_same() -> None:
    model, x = of_inner("lora"), torch.randn(4, 9)
    delta, target = delta_of(model), torch.randn(4, 8)
    gradients = []
    for held in (None, 2):
        delta.trained_gates = held
        model.zero_grad()
        (model(x) * target).sum().backward()
        gradients.append(delta.gate.grad.clone())
    close(gradients[0][:2], gradients[1][:2])
    assert gradients[0][2:].all()
    assert not gradients[1][2:].any()


WATCHED = {
    "linear": (tiny_mlp, "first", lambda: torch.randn(3, 12)),
    "conv": (tiny_convnet, "dilated", lambda: torch.randn(2, 3, 16, 16)),
    "grouped": (tiny_convnet, "grouped", lambda: torch.randn(2, 3, 16, 16)),
    "embedding": (lambda: tiny_llama(vocab=40), "embed_tokens", lambda: token_batch(vocab=40)),
    "rows": (tiny_gpt2, "re:transformer\\.h\\.0\\.attn\\.c_attn", token_batch),
}


@pytest.mark.parametrize(
    ("kind", "delta"), [(k, d) for k in WATCHED for d in ("gated", "dora") if (k, d) != ("grouped", "dora")]
)
def test_a_watched_change_shows_the_gradient_of_its_matrix(kind: str, delta: str) -> None:
    """Against the gradient of the base weight, with which the change adds up; the loss and gradients are as ever."""
    build, target, inputs = WATCHED[kind]
    model, x = build().double(), inputs()
    around: dict[str, Any] = {"inner": "gated"} if delta == "dora" else {}
    rw.adapt(model, delta, targets=target, rank=2, **around)
    each: Any = shake(model, std=0.1)
    (site,) = state_of(model).adapter("default").sites.values()

    def run() -> tuple[Tensor, list[Tensor]]:
        model.zero_grad()
        out = model(x)
        loss = (out.logits if hasattr(out, "logits") else out).square().mean()
        loss.backward()
        return loss.detach(), [p.grad.clone() for p in each.parameters() if p.grad is not None]

    loss, gradients = run()
    seen: list[Tensor] = []
    gated_of(each).watch = lambda g: seen.append(g.detach().clone())
    again, others = run()
    gated_of(each).watch = None
    close(again, loss)
    for a, b in zip(gradients, others, strict=True):
        close(a, b)
    site.tensor.requires_grad_(True)
    run()
    wanted = site.tensor.grad
    assert wanted is not None
    if kind in ("embedding", "rows"):
        wanted = wanted.t()
    close(torch.stack(seen).sum(0), wanted.reshape(site.shape.out, site.shape.in_))


# ---- what comes of it ----


def closed(**settings: Any) -> tuple[nn.Module, dict[str, int]]:
    """A tiny Llama with 0, 1, 2, ... of four gates open at its sites."""
    model = rw.adapt(tiny_llama(), "gated", rank=4, targets="all-linear", **settings)
    shake(model, std=0.1)
    kept = {}
    with torch.no_grad():
        for i, (key, each) in enumerate(state_of(model).adapter("default").deltas.items()):
            kept[key] = i % 5
            gated_of(each).gate[i % 5 :] = 0
    return model, kept


def test_closed_gates_are_left_out_of_exports(tmp_path: Path) -> None:
    model, kept = closed()
    y = model(token_batch()).logits.detach()
    for kind in ("lora", "peft"):
        report = rw.export(model, tmp_path / kind, kind=kind)
        assert {s.site: s.rank for s in report.sites} == {k: n for k, n in kept.items() if n}
        reader = peft.PeftModel.from_pretrained(tiny_llama(), str(tmp_path / kind)).eval()
        torch.testing.assert_close(reader(token_batch()).logits, y, rtol=1e-4, atol=1e-4)


def test_closed_gates_around_frozen_factors_are_left_out_of_exports(tmp_path: Path) -> None:
    model, kept = closed(inner="vera")
    report = rw.export(model, tmp_path / "lora", kind="lora")
    assert {s.site: s.rank for s in report.sites} == {k: n for k, n in kept.items() if n}


@pytest.mark.parametrize("inner", INNER)
def test_it_is_saved_merged_and_loaded(inner: str, tmp_path: Path) -> None:
    model, x = of_inner(inner), torch.randn(4, 9)
    y = model(x)
    rw.save(model, tmp_path / "adapter")
    assert any(key.endswith("gate") for key in adapter_state(model))
    rw.merge(model)
    close(model(x), y)
    rw.unmerge(model)
    rw.detach(model)
    assert torch.equal(rw.load(model, tmp_path / "adapter")(x), y)


@pytest.mark.parametrize("kind", KINDS)
def test_merged_the_gates_act_as_in_the_branch(kind: str) -> None:
    layer, x = layer_and_input(kind)
    model = adapted(layer, "gated", rank=2)
    shake(model)
    y = model(x)
    rw.merge(model)
    close(model(x), y)


@pytest.mark.parametrize("inner", INNER)
def test_the_count_is_the_inner_deltas_and_a_gate_per_rank(inner: str) -> None:
    model, spec = of_inner(inner), rw.Gated(inner={"delta": inner, "rank": 3})
    delta, shape = delta_of(model), Shape(8, 9)
    assert spec.method.cls.count(spec, shape) == spec.inner.method.cls.count(spec.inner, shape) + len(delta.gate)
    assert len(delta.gate) == len(delta.inner.factors().A)
    shared = spec.method.cls.count_shared(spec, [shape])
    assert rw.trainable_parameters(model) == spec.method.cls.count(spec, shape) + shared


def test_dora_goes_around_it() -> None:
    """The gates act within the direction: with a gate closed it is DoRA of one rank less."""
    model, x = adapted(linear(9, 8), "dora", inner="gated", rank=3), torch.randn(4, 9)
    delta = shake(model)
    with torch.no_grad():
        gated_of(delta).gate.copy_(torch.tensor([1.0, 0.0, 1.0]))
        y = model(x)
        pair = pair_of(delta)
        other = adapted(linear(9, 8), "dora", rank=2, alpha=pair.alpha * 2 / 3)
        other.layer.load_state_dict({k: v for k, v in model.layer.state_dict().items() if "adapters" not in k}, False)
        twin = delta_of(other)
        pair_of(twin).A.copy_(pair.A[[0, 2]])
        pair_of(twin).B.copy_(pair.B[:, [0, 2]])
        own = dict(delta.named_parameters())
        for name, parameter in twin.named_parameters():
            if not name.startswith("inner"):
                parameter.copy_(own[name])
    close(other(x), y)


@pytest.mark.parametrize("inner", ["bone", "shira", "dora", "randlora"])
def test_a_delta_without_factors_is_refused(inner: str) -> None:
    with pytest.raises(TargetError, match=f"gates stand between two factors, and '{inner}' has none"):
        rw.adapt(tiny_mlp(), "gated", inner=inner, targets="second")


@pytest.mark.parametrize("inner", ["lora", "vera"])
def test_it_learns(inner: str) -> None:
    model = tiny_adapted("gated", inner=inner, rank=4)
    seen = losses(model)
    assert seen[-1] < 0.98 * seen[0]
    assert any((gated_of(d).gate != 1).any() for d in state_of(model).adapter("default").deltas.values())
